"""An encoder in pieces, for one that does not fit: each process holds a part of every layer (PyTorch's FSDP), and has
a whole layer only while it computes with it. Without torchrun the same training, in one piece.

    torchrun --nproc-per-node 2 examples/fsdp_encoder.py [--steps 50]
"""

import argparse

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastmeta
from fastmeta.tasks import EpisodeSampler
from fastmeta.training.distributed import joined, ranks

WAYS, SHOTS, QUERY_SHOTS, TASKS = 5, 1, 5, 16


def rows(classes=30, each=10, width=32):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 1, width, generator=generator)
    return centres + torch.randn(classes, each, width, generator=generator)


def main(steps, dtype=torch.float32):
    group = ranks()
    tasks = EpisodeSampler(rows().to(dtype), ways=WAYS, shots=SHOTS, query_shots=QUERY_SHOTS)
    torch.manual_seed(0)  # the same weights everywhere; and then each keeps its part
    widths = (32, 128, 128, 64)
    layers = [nn.Sequential(nn.Linear(*sizes), nn.Tanh()) for sizes in zip(widths, widths[1:], strict=False)]
    encoder = nn.Sequential(*layers).to(dtype)
    if not group.alone:
        for layer in layers:
            fully_shard(layer)
        fully_shard(encoder)
    learner = fastmeta.ProtoNet(encoder)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        # this process's part of one batch; FSDP makes the mean of the parts' gradients
        output = learner(group.sample(tasks, TASKS, generator))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = group.total([output.loss.item() / group.world])[0]
        if group.first and step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in learner.parameters())
    return loss, held


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    with joined("cpu"):
        loss, held = main(**vars(parser.parse_args()))
        print(f"{ranks()}: loss {loss:.4f}, holds {held:,} weights")
