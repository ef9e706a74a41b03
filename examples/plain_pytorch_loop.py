"""A prototypical network trained by a plain PyTorch loop, then asked about classes that it has never seen.

    python examples/plain_pytorch_loop.py
"""

import torch

from fastmeta.algorithms import ProtoNet
from fastmeta.nn import conv4
from fastmeta.tasks import EpisodeSampler, glyphs


def main(steps: int = 200, ways: int = 5) -> float:
    torch.manual_seed(0)
    train = EpisodeSampler(glyphs("train"), ways=ways, shots=1, query_shots=5)
    test = EpisodeSampler(glyphs("test"), ways=ways, shots=1, query_shots=10)

    learner = ProtoNet(conv4(in_channels=1, hidden=32))  # any nn.Module with rows in and embeddings out
    optimizer = torch.optim.Adam(learner.parameters(), lr=2e-3)
    for step in range(steps):
        batch = train.sample(4)  # four tasks: support_x [4, ways, 1, 28, 28], support_y [4, ways], query_x, query_y
        output = learner(batch)  # adapts to every support set, judged on every query set
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {output.loss.item():.3f}  accuracy {output.accuracy.mean().item():.3f}")

    learner.eval()
    with torch.no_grad():
        accuracy = learner(test.sample(100)).accuracy.mean().item()
        # one task by hand: adapt to its support set, predict its queries
        support_x, support_y, query_x, query_y = test.sample(1)
        logits = learner.predict(learner.adapt(support_x, support_y), query_x)
    print(f"100 tasks of unseen classes: {100 * accuracy:.1f} % right")
    print(f"one task: {100 * logits.argmax(2).eq(query_y).float().mean().item():.0f} % right")
    return accuracy


if __name__ == "__main__":
    main()
