"""What every algorithm on embeddings promises, and the tasks that its learning test trains on."""

import math

import torch

from fastmeta.tasks import TaskBatch


def class_batch(tasks=4, shots=2, queries=3, ways=3, width=5, spread=0.3, seed=0, dtype=torch.float32):
    """Every task has its own cluster centres; rows are ordered by class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, ways, 1, width, generator=generator, dtype=dtype)

    def rows(count):
        x = centres + spread * torch.randn(tasks, ways, count, width, generator=generator, dtype=dtype)
        return x.flatten(1, 2), torch.arange(ways).repeat_interleave(count).expand(tasks, -1).contiguous()

    return TaskBatch(*rows(shots), *rows(queries))


def hidden_signal(seed, tasks=16, shots=1, queries=5, ways=5, strength=1.5):
    """Classes differ in two of twenty columns; the others are noise that an encoder must learn to drop."""
    batch = class_batch(tasks, shots, queries, ways, 20, 0.0, seed)
    signal = torch.zeros(20).index_fill_(0, torch.tensor([3, 11]), 1.0)
    noise = torch.Generator().manual_seed(seed + 1)
    support, query = (
        x * signal + torch.randn(x.shape, generator=noise) * (strength * (1 - signal) + 0.05)
        for x in (batch.support_x, batch.query_x)
    )
    return batch._replace(support_x=support, query_x=query)


def sinusoids(seed, tasks=25, shots=10):
    """y = A sin(x - phase), as in Finn et al. 2017, section 5.1."""
    generator = torch.Generator().manual_seed(seed)
    amplitude = torch.rand(tasks, 1, 1, generator=generator) * 4.9 + 0.1
    phase = torch.rand(tasks, 1, 1, generator=generator) * math.pi
    x = torch.rand(tasks, 2 * shots, 1, generator=generator) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


def check_protocol(algorithm, batch, shuffles=True, inert=()):
    """`forward` is `adapt` and `predict`; tasks do not mix; support rows have no order; gradients reach everything but
    the `inert` parameters, whose gradient is zero up to rounding."""
    close = dict(rtol=1e-4, atol=1e-5)
    output = algorithm(batch)
    state = algorithm.adapt(batch.support_x, batch.support_y)
    torch.testing.assert_close(algorithm.predict(state, batch.query_x), output.logits, **close)
    torch.testing.assert_close(output.loss, output.task_loss.mean())
    assert output.task_loss.shape == (batch.num_tasks,)
    if output.accuracy is not None:
        torch.testing.assert_close(output.accuracy, (output.logits.argmax(-1) == batch.query_y).float().mean(1))

    order = torch.randperm(batch.num_tasks, generator=torch.Generator().manual_seed(0))
    permuted = algorithm(TaskBatch(*(tensor[order] for tensor in batch)))
    torch.testing.assert_close(permuted.logits, output.logits[order], **close)
    torch.testing.assert_close(permuted.task_loss, output.task_loss[order], **close)
    for task in range(batch.num_tasks):
        alone = algorithm(TaskBatch(*(tensor[task : task + 1] for tensor in batch)))
        torch.testing.assert_close(alone.logits[0], output.logits[task], **close)

    rows = torch.randperm(batch.support_x.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = batch._replace(support_x=batch.support_x[:, rows], support_y=batch.support_y[:, rows])
    if shuffles:
        torch.testing.assert_close(algorithm(shuffled).logits, output.logits, **close)
    rows = torch.randperm(batch.query_x.shape[1], generator=torch.Generator().manual_seed(2))
    shuffled = batch._replace(query_x=batch.query_x[:, rows], query_y=batch.query_y[:, rows])
    torch.testing.assert_close(algorithm(shuffled).logits, output.logits[:, rows], **close)

    parameters = dict(algorithm.named_parameters())
    if parameters and output.loss.requires_grad:
        gradients = torch.autograd.grad(output.loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            assert gradient is not None and gradient.isfinite().all(), name
            largest = gradient.abs().max()
            assert largest < 1e-6 if name in inert else largest > 0, name


def train(algorithm, sample, steps, lr=1e-2):
    """Adam on `sample(seed)`."""
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=lr)
    algorithm.train()
    for step in range(steps):
        optimizer.zero_grad()
        algorithm(sample(step * 2)).loss.backward()
        optimizer.step()


@torch.no_grad()
def judge(algorithm, sample, batches=10):
    """Mean accuracy, or for regression mean loss, on tasks that `train` has not seen."""
    algorithm.eval()
    outputs = [algorithm(sample(10**6 + 2 * i)) for i in range(batches)]
    scores = [o.loss if o.accuracy is None else o.accuracy.mean() for o in outputs]
    return sum(score.item() for score in scores) / batches
