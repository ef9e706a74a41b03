"""Samplers: what they draw, how evenly, from what, and what they refuse."""

import math

import pytest
import torch
from conftest import DEVICE

from fastmeta.tasks import EpisodeSampler, SinusoidTasks, TaskBatch, glyphs, make_tasks
from fastmeta.tasks.episodes import subsets
from fastmeta.tasks.glyphs import _glyphs


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def numbered(classes: int = 12, instances: int = 6) -> torch.Tensor:
    """Images whose single pixel says which class and instance they are."""
    return torch.arange(classes * instances, dtype=torch.float32, device=DEVICE).view(classes, instances, 1, 1, 1)


def test_subsets_are_uniform_and_without_repeats():
    rows, population, size = 20000, 7, 3
    drawn = subsets(rows, population, size, device=DEVICE, generator=seeded())
    assert all(len(set(row)) == size for row in drawn[:500].tolist())
    for position in range(size):  # every member as likely in every place: within five standard deviations
        counts = drawn[:, position].bincount(minlength=population)
        expected = rows / population
        assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    pairs = (drawn.sort(1).values[:, :2] * torch.tensor([population, 1], device=DEVICE)).sum(1).unique()
    assert len(pairs) == sum(1 for a in range(7) for b in range(a + 1, 7) if b < 6)  # a third must come after


def test_whole_population_is_a_permutation():
    drawn = subsets(50, 5, 5, device=DEVICE, generator=seeded())
    assert torch.equal(drawn.sort(1).values, torch.arange(5, device=DEVICE).expand(50, 5))


def test_episodes():
    sampler = EpisodeSampler(numbered(), ways=4, shots=2, query_shots=3)
    batch = sampler.sample(50, generator=seeded())
    assert isinstance(batch, TaskBatch) and batch.num_tasks == 50
    assert batch.support_x.shape == (50, 8, 1, 1, 1) and batch.query_x.shape == (50, 12, 1, 1, 1)
    assert batch.support_y.dtype == torch.int64
    assert torch.equal(batch.support_y[0], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3], device=DEVICE))
    for t in range(50):
        support, query = batch.support_x[t].flatten().long(), batch.query_x[t].flatten().long()
        assert len(set(support.tolist()) | set(query.tolist())) == 20  # no image twice
        classes = (support // 6)[::2]
        assert len(set(classes.tolist())) == 4
        assert torch.equal(support // 6, classes[batch.support_y[t]])  # a label is one class, in support and query
        assert torch.equal(query // 6, classes[batch.query_y[t]])


def test_the_generator_decides():
    sampler = EpisodeSampler(numbered(), ways=4, shots=2, query_shots=3)
    first, again, other = (sampler.sample(5, generator=seeded(s)) for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.support_x, other.support_x)


def test_rotations_are_classes():
    images = torch.zeros(3, 2, 1, 5, 5, dtype=torch.uint8, device=DEVICE)
    images[..., 0, 1] = 255  # one pixel, not on a symmetry axis
    sampler = EpisodeSampler(images, ways=12, shots=1, query_shots=1, rotations=True)
    batch = sampler.sample(1)
    places = batch.support_x.flatten(2).argmax(-1).flatten().tolist()
    assert sorted(places) == sorted([1, 15, 23, 9] * 3)  # the pixel in its four places, for each of the three
    assert batch.support_x.max() == 1.0
    assert torch.equal(batch.support_x, batch.query_x)  # instances are equal here, so a label means one rotation


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"ways": 13}, "ways must be at most 12, the classes of images, got 13"),
        ({"ways": 0}, "ways must be at least 1, got 0"),
        ({"shots": 4, "query_shots": 3}, r"shots \+ query_shots must be at most 6, .* got 4 \+ 3"),
    ],
)
def test_more_than_there_is(sizes, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(numbered(), **{"ways": 4, "shots": 1, "query_shots": 1, **sizes})


def test_sinusoids():
    batch = SinusoidTasks(shots=10, query_shots=15, device=DEVICE).sample(4000, generator=seeded())
    assert batch.support_x.shape == (4000, 10, 1) and batch.query_y.shape == (4000, 15, 1)
    x, y = (
        torch.cat(pair, 1).double().squeeze(-1)
        for pair in ((batch.support_x, batch.query_x), (batch.support_y, batch.query_y))
    )
    assert -5 <= x.min() < -4.99 and 4.99 < x.max() <= 5
    # A sin(x - phase) = a sin x + b cos x: solve for each task, and look at what was drawn
    solution = torch.linalg.lstsq(torch.stack([x.sin(), x.cos()], -1), y.unsqueeze(-1)).solution.squeeze(-1)
    amplitude, phase = solution.norm(dim=1), torch.atan2(-solution[:, 1], solution[:, 0])
    assert 0.09 < amplitude.min() < 0.15 and 4.95 < amplitude.max() < 5.01
    assert -1e-3 < phase.min() < 0.01 and math.pi - 0.01 < phase.max() < math.pi + 1e-3
    assert abs(amplitude.mean() - 2.55) < 0.1 and abs(phase.mean() - math.pi / 2) < 0.06


def nearest_neighbour_accuracy(sampler: EpisodeSampler) -> float:
    batch = sampler.sample(300, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(batch.query_x.flatten(2), batch.support_x.flatten(2)).argmin(-1)
    return float((batch.support_y.gather(1, nearest) == batch.query_y).float().mean())


def test_glyphs_are_the_same_everywhere_and_differ_by_split():
    images = glyphs("val", seed=3)
    assert images.shape == (100, 20, 1, 28, 28) and images.dtype == torch.uint8
    state = torch.get_rng_state()
    _glyphs.cache_clear()
    assert torch.equal(glyphs("val", seed=3), images)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert not torch.equal(glyphs("val", seed=4), images)
    ink = images.float().mean() / 255
    assert 0.03 < ink < 0.2  # strokes, neither blank nor full


def test_glyphs_are_as_hard_as_omniglot_for_pixels():
    """1-NN on pixels, 5-way 1-shot: 42.5% on Omniglot's test characters."""
    accuracy = nearest_neighbour_accuracy(make_tasks("glyphs", "val"))
    assert 0.3 < accuracy < 0.55


@pytest.mark.learning
def test_a_linear_embedding_does_not_solve_glyphs():
    """What a Prototypical Network with a linear encoder reaches stays far from what is learnable."""
    from fastmeta import ProtoNet

    torch.manual_seed(0)
    train = make_tasks("glyphs", "train", ways=20, query_shots=5)
    model = ProtoNet(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 64)), ways=20)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(200):
        loss = model(train.sample(4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.ways = 5
    with torch.no_grad():
        accuracy = model(make_tasks("glyphs", "test").sample(300)).accuracy.mean()
    assert 0.3 < accuracy < 0.75


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mnist",), "name must be one of sinusoid, glyphs, omniglot; got 'mnist'"),
        (("glyphs", "dev"), "split must be one of train, val, test; got 'dev'"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(*arguments)
    with pytest.raises(ValueError, match="partition must be one of vinyals, 1200; got 'lake'"):
        make_tasks("omniglot", partition="lake")
