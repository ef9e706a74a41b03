"""Episodes from classes of unequal size: every row of its class, every option, and how evenly all is drawn."""

import copy
import math

import pytest
import torch
from conftest import DEVICE
from numbered_rows import COUNTS, SIZES, disjoint, even, numbered, seeded, tasks_of
from torch import nn

from fastmeta import ProtoNet
from fastmeta.tasks import Augmentation, EpisodeSampler, Examples, Prefetched
from fastmeta.tasks.drawing import natural_sizes, subsets, subsets_by_weight
from fastmeta.training import evaluate
from fastmeta.training.embed import embed

# ----- where rows come from


def test_equal_classes_are_drawn_as_ever():
    """The stream of random numbers that committed results were trained with, whatever the rows come as."""
    images = torch.randint(256, (6, 5, 2, 4, 4), dtype=torch.uint8, device=DEVICE)
    batch = EpisodeSampler(images, **SIZES).sample(7, generator=seeded())
    generator = seeded()
    cls = subsets(7, 6, 3, device=DEVICE, generator=generator).view(7, 3, 1)
    member = subsets(21, 5, 5, device=DEVICE, generator=generator).view(7, 3, 5)
    x = images[cls, member].float() / 255
    assert torch.equal(batch.support_x, x[:, :, :2].flatten(1, 2))
    assert torch.equal(batch.query_x, x[:, :, 2:].flatten(1, 2))
    labels = torch.arange(6, device=DEVICE).repeat_interleave(5)
    for same in (list(images), Examples(images.flatten(0, 1), labels)):
        again = EpisodeSampler(same, **SIZES).sample(7, generator=seeded())
        assert len(again) == 4 and all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))


@pytest.mark.parametrize(
    "dtype, given",
    [(torch.uint8, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float16),
     (torch.int16, torch.int64), (torch.int64, torch.int64)],
)  # fmt: skip
def test_what_rows_become(dtype, given):
    rows = torch.randint(100, (4, 6, 3), device=DEVICE).to(dtype)
    x = EpisodeSampler(rows, ways=4, shots=1, query_shots=5).sample(1).query_x
    assert x.dtype == given and x.shape == (1, 20, 3)
    expected = rows.double() / (255 if dtype == torch.uint8 else 1)
    assert torch.isin(x.double(), expected.to(given).double()).all()


@pytest.mark.parametrize("examples", [numbered(), numbered().only([2, 5, 0])], ids=["all", "some"])
def test_unequal_classes(examples):
    sampler = EpisodeSampler(examples, **SIZES)
    assert sampler.input_shape == (3,) and sampler.output_size == 3 and sampler.name == "letters"
    batch = sampler.sample(6000, generator=seeded())
    assert len(batch) == 4 and batch.support_x.shape == (6000, 6, 3) and batch.query_x.shape == (6000, 9, 3)
    found = tasks_of(batch._replace(**{key: value[:200] for key, value in zip(batch._fields, batch, strict=True)}))
    assert all(disjoint(task) for task in found)
    kept = torch.tensor([int(name) for name in examples.names])
    for x, each in ((batch.support_x, 2), (batch.query_x, 3)):  # classes alike, and rows of a class alike
        rows = x.flatten(0, 1)
        assert torch.equal(rows[:, 0].unique().cpu(), kept.sort().values)
        assert even(rows[::each, 0].bincount()[kept])
        for cls in kept.tolist():
            assert even(rows[rows[:, 0] == cls, 1].bincount(minlength=COUNTS[cls - 1] + 1)[1:])
    again = sampler.sample(6000, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch.query_x, sampler.sample(6000, generator=seeded(1)).query_x)
    assert sampler.sample(0).support_x.shape == (0, 6, 3)


# ----- sizes that differ


def test_ways_and_shots_from_ranges():
    sampler = EpisodeSampler(numbered(), ways=(2, 5), shots=(1, 3), query_shots=2)
    batch = sampler.sample(1500, generator=seeded())
    assert sampler.output_size == 5
    found = tasks_of(batch)
    assert all(disjoint(task) for task in found)
    assert even(torch.tensor([len(task) for task in found]).bincount(minlength=6)[2:])
    shots = [{len(support) for _, support, _ in task.values()} for task in found]
    assert all(len(one) == 1 for one in shots)
    assert even(torch.tensor([min(one) for one in shots]).bincount(minlength=4)[1:])
    assert {len(query) for task in found for _, _, query in task.values()} == {2}
    assert batch.support_x.shape[1] == max(sum(len(s) for _, s, _ in task.values()) for task in found)
    assert even(torch.tensor([task[0][0] for task in found]).bincount()[1:])
    numbers = torch.tensor([i for task in found for cls, s, q in task.values() if cls == 2 for i in s])
    assert even(numbers.bincount(minlength=12)[1:])
    assert sampler.sample(0, generator=seeded()).query_mask.shape == (0, 0)


@pytest.mark.parametrize("shots", [2, (1, 4), "natural"])
@pytest.mark.parametrize("most", [None, 3])
def test_all_that_the_support_leaves_over(shots, most):
    sampler = EpisodeSampler(numbered(), ways=3, shots=shots, query_shots="all", most_queries=most)
    found = tasks_of(sampler.sample(400, generator=seeded()))
    for task in found:
        assert disjoint(task)
        for cls, support, query in task.values():
            rest = COUNTS[cls - 1] - len(support)
            assert len(query) == (rest if most is None else min(rest, most))
    queries = torch.tensor([i for task in found for cls, _, q in task.values() if cls == 6 for i in q])
    assert even(queries.bincount(minlength=18)[1:])


def test_natural_sizes_are_those_of_meta_dataset():
    """One task after the other, in plain Python, from the same random numbers."""
    counts = torch.tensor([[30, 5, 900, 2], [150, 700, 40, 260], [2, 3, 0, 0]]).repeat(100, 1)
    there = (counts > 0).to(DEVICE)
    shots, queries = natural_sizes(counts.clamp(min=1).to(DEVICE), there, 10, seeded())
    generator = seeded()
    drawn = {"dtype": torch.float64, "device": DEVICE, "generator": generator}
    beta, alpha = torch.rand(300, 1, **drawn).tolist(), torch.rand(300, 4, **drawn).tolist()
    for t, row in enumerate(counts.tolist()):
        row = [n for n in row if n]
        q = min(10, min(n // 2 for n in row))
        support = min(500, sum(math.ceil((1 - beta[t][0]) * min(100, n - q)) for n in row))
        weight = [n * math.exp(math.log(0.5) + a * math.log(4)) for n, a in zip(row, alpha[t], strict=False)]
        expected = [
            min(math.floor(w / sum(weight) * (support - len(row))) + 1, n - q)
            for n, w in zip(row, weight, strict=True)
        ]
        assert shots[t].tolist() == expected + [0] * (4 - len(row))
        assert queries[t].tolist() == [q] * len(row) + [0] * (4 - len(row))
    many = torch.full((200, 50), 2000, device=DEVICE)
    shots, _ = natural_sizes(many, torch.ones_like(many, dtype=torch.bool), 10, seeded())
    assert 400 < shots.sum(1).max() <= 500


def test_natural_episodes():
    found = tasks_of(EpisodeSampler(numbered(), ways=(2, 4), shots="natural", query_shots=10).sample(300))
    for task in found:
        assert disjoint(task)
        half = min(COUNTS[cls - 1] // 2 for cls, *_ in task.values())
        assert {len(query) for *_, query in task.values()} == {half} and all(support for _, support, _ in task.values())
    assert len({len(support) for task in found for _, support, _ in task.values()}) > 5


def test_with_replacement():
    sampler = EpisodeSampler(numbered((1, 3, 2)), ways=(2, 3), shots=4, query_shots=3, replace=True)
    found = tasks_of(sampler.sample(1500, generator=seeded()))
    assert {(len(s), len(q)) for task in found for _, s, q in task.values()} == {(4, 3)}
    triples = torch.tensor([s[:3] for task in found for cls, s, _ in task.values() if cls == 2]) - 1
    assert even((triples * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27))  # every place by itself
    fixed = EpisodeSampler(numbered((1, 3, 2)), ways=3, shots=4, query_shots=3, replace=True).sample(5)
    assert len(fixed) == 4 and len(tasks_of(fixed)[0]) == 3


@pytest.mark.parametrize("ways", [2, (1, 3)])
def test_classes_by_size(ways):
    counts = (4, 8, 16, 12)
    sampler = EpisodeSampler(numbered(counts), ways=ways, shots=1, query_shots=1, classes="size")
    batch = sampler.sample(6000, generator=seeded())
    tasks_of(sampler.sample(100))
    cls = batch.support_x[:, :, 0].cpu() - 1
    number = (cls >= 0).sum(1)
    share = torch.tensor(counts).double() / sum(counts)
    pairs = cls[number == 2][:, :2]
    # one after the other without replacement, and then in either order
    first = share.unsqueeze(1) * share / (1 - share.unsqueeze(1))
    expected = ((first + first.T) / 2).masked_fill(torch.eye(4, dtype=torch.bool), 0)
    off = ~torch.eye(4, dtype=torch.bool).flatten()
    assert even((pairs[:, 0] * 4 + pairs[:, 1]).bincount(minlength=16)[off], expected.flatten()[off])
    if ways != 2:
        assert even(cls[number == 1, 0].bincount(minlength=4), share)
    drawn = subsets_by_weight(6000, torch.tensor(counts, device=DEVICE), 1, device=DEVICE, generator=seeded())
    assert even(drawn.flatten().bincount(minlength=4), share)


def test_subsets_of_different_sizes():
    population = torch.tensor([4, 9, 1, 6], device=DEVICE).repeat(3000)
    size = torch.tensor([2, 0, 1, 6], device=DEVICE).repeat(3000)
    rows = subsets(12000, population, size, device=DEVICE, generator=seeded()).view(3000, 4, 6)
    assert torch.equal((rows >= 0).sum(2), size.view(3000, 4)) and (rows[:, 0, 2:] == -1).all()
    assert even((rows[:, 0, 0] * 4 + rows[:, 0, 1]).bincount(minlength=16)[~torch.eye(4, dtype=torch.bool).flatten()])
    assert torch.equal(rows[:, 3].sort(1).values, torch.arange(6, device=DEVICE).expand(3000, 6))
    assert all(even(rows[:, 3, place].bincount(minlength=6)) for place in range(6))


# ----- images


def test_rotations_of_unequal_classes():
    images = [torch.rand(count, 1, 5, 5, device=DEVICE) for count in (3, 6, 4)]
    shuffled = torch.randperm(13)
    labels = torch.arange(3).repeat_interleave(torch.tensor([3, 6, 4]))[shuffled]
    examples = Examples(torch.cat(images)[shuffled.to(DEVICE)], labels)
    sampler = EpisodeSampler(examples, ways=12, shots=1, query_shots="all", rotations=True)
    batch = sampler.sample(2, generator=seeded())
    turned = [[part.rot90(turns, (-2, -1)) for part in images] for turns in range(4)]
    turned = [(number, row) for number, part in enumerate(sum(turned, [])) for row in part]
    where = torch.stack([row for _, row in turned])
    cls = torch.tensor([number for number, _ in turned], device=DEVICE)

    def classes(x):
        same = (x.unsqueeze(1) == where).flatten(2).all(2)
        assert same.any(1).all()
        return cls[same.float().argmax(1)]

    for t in range(2):
        support = classes(batch.support_x[t])
        assert len(support.unique()) == 12
        own = batch.query_mask[t]
        assert torch.equal(classes(batch.query_x[t][own]), support[batch.query_y[t][own]])
        assert own.sum() == 4 * 13 - 12


def test_augmented_support_and_query():
    images = [torch.rand(count, 3, 4, 4, device=DEVICE) for count in (3, 5, 4)]
    plain = EpisodeSampler(images, ways=(1, 3), shots=1, query_shots=2).sample(5, generator=seeded())
    sampler = EpisodeSampler(images, ways=(1, 3), shots=1, query_shots=2, augment=Augmentation(brightness=0.5))
    batch = sampler.sample(5, generator=seeded())
    for before, after, mask in zip(plain[::2], batch[::2], (plain.support_mask, plain.query_mask), strict=False):
        assert not (before == after)[mask].flatten(1).all(1).any()
        assert not after[~mask].any()
    batch = EpisodeSampler(images, **(SIZES | {"shots": 1, "query_shots": 1}), augment=lambda x, _: x + 1).sample(2)
    assert batch.support_x.min() >= 1 and batch.query_x.min() >= 1
    padded = EpisodeSampler(images, ways=(1, 3), shots=1, query_shots=2, augment=lambda x, _: x + 1).sample(5)
    assert not padded.query_x[~padded.query_mask].any()


@pytest.mark.gpu
def test_rows_in_host_memory_for_a_gpu():
    rows = torch.randint(256, (8, 9, 3, 6, 6), dtype=torch.uint8)
    for options in (SIZES, SIZES | {"ways": (2, 4)}):
        there = EpisodeSampler(rows.cuda(), **options).sample(6, generator=seeded())
        moved = EpisodeSampler(rows, **options, device="cuda").sample(6, generator=seeded())
        assert all(a.device.type == "cuda" and torch.equal(a, b) for a, b in zip(moved, there, strict=True))


# ----- learners


def test_embedded_once():
    """The same episodes of embeddings, in the order of classes, though rows lie in another."""
    examples = Examples(numbered().rows.double(), numbered().labels, name="letters").only([5, 0, 2, 4])
    for options in (SIZES, {"ways": (2, 4), "shots": "natural", "query_shots": 3}):
        sampler = EpisodeSampler(examples, **options)
        plain = sampler.sample(4, generator=seeded())
        embedded = embed(nn.Identity(), sampler).sample(4, generator=seeded())
        assert torch.equal(embedded.support_x.flatten(2), plain.support_x)
        assert torch.equal(embedded.query_x.flatten(2), plain.query_x) and torch.equal(embedded.query_y, plain.query_y)


def test_embedding_pays_whether_drawn_ahead_or_not():
    rows = [torch.randn(count, 4, device=DEVICE) for count in COUNTS]
    sampler = EpisodeSampler(rows, ways=(2, 4), shots=2, query_shots=3)
    learner, calls = ProtoNet(nn.Linear(4, 3).to(DEVICE), ways=4), []
    learner.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    found = [evaluate(learner, tasks, episodes=40) for tasks in (sampler, Prefetched(sampler))]
    assert found[0] == found[1] and calls == [sum(COUNTS)] * 2
    calls.clear()
    changed = copy.copy(sampler)
    changed.augment = lambda x, _: x  # another embedding each time
    torch.testing.assert_close(evaluate(learner, changed, episodes=40).loss.mean, found[0].loss.mean)
    assert sum(calls) > 2 * sum(COUNTS)


def test_padded_tasks_are_judged_as_if_alone():
    rows = [torch.randn(count, 4, device=DEVICE, dtype=torch.float64) for count in COUNTS]
    batch = EpisodeSampler(rows, ways=(2, 5), shots="natural", query_shots="all").sample(6, generator=seeded())
    learner = ProtoNet(nn.Identity(), ways=5)
    output = learner(batch)
    for t in range(6):
        support, query = batch.support_mask[t], batch.query_mask[t]
        ways = int(batch.support_y[t].max()) + 1
        alone = ProtoNet(nn.Identity(), ways=ways)(
            (batch.support_x[t : t + 1, support], batch.support_y[t : t + 1, support],
             batch.query_x[t : t + 1, query], batch.query_y[t : t + 1, query])
        )  # fmt: skip
        torch.testing.assert_close(output.task_loss[t], alone.task_loss[0])
        torch.testing.assert_close(output.accuracy[t], alone.accuracy[0])


# ----- what is refused


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"ways": 8}, "ways must be at most 7, the classes of letters, got 8"),
        ({"ways": (2, 8)}, r"ways must be at most 7, the classes of letters, got \(2, 8\)"),
        ({"ways": (4, 2)}, r"ways must be \(lo, hi\) with lo at most hi, got \(4, 2\)"),
        ({"shots": "many"}, "shots must be an int, .lo, hi. or 'natural', got 'many'"),
        ({"shots": 6}, r"shots \+ query_shots must be at most 5, .* class '4' of letters, got 6 \+ 3; 2 more of its"),
        ({"shots": (1, 5), "query_shots": "all"}, "shots must be below 5, the examples of class '4' of letters"),
        ({"query_shots": "some"}, "query_shots must be an int or 'all', got 'some'"),
        ({"most_queries": 3}, "most_queries goes with query_shots 'all', and query_shots is 3"),
        ({"replace": True, "query_shots": "all"}, "replace goes with numbers of rows"),
        ({"replace": True, "shots": "natural"}, "replace goes with numbers of rows"),
        ({"classes": "large"}, "classes must be one of even, size; got 'large'"),
        ({"rotations": True}, r"rotations need square images \[C, H, W\], and rows of letters are \[3\]"),
        ({"augment": Augmentation()}, r"augment needs images \[C, H, W\], and rows are \[3\]"),
    ],
)
def test_refused(changed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EpisodeSampler(numbered(), **(SIZES | changed))


def test_refused_rows():
    with pytest.raises(ValueError, match=r"images\[1\] must have shape \[instances, 4\].*got \[3, 5\]"):
        EpisodeSampler([torch.rand(3, 4), torch.rand(3, 5)], **SIZES)
    with pytest.raises(ValueError, match=r"images\[0\] must have shape .* got \[0, 4\]"):
        EpisodeSampler([torch.rand(0, 4), torch.rand(3, 4)], **SIZES)
    with pytest.raises(ValueError, match="one dtype and device, got float32 on cpu and, in images.1., uint8 on cpu"):
        EpisodeSampler([torch.rand(3, 4), torch.rand(3, 4).byte()], **SIZES)
    with pytest.raises(TypeError, match="images must be uint8, floating or integers, got bool"):
        EpisodeSampler(torch.ones(3, 4, 5, dtype=torch.bool), **SIZES)
    with pytest.raises(ValueError, match=r"images must have shape \[classes, instances, ...\].*got \[3, 4\]"):
        EpisodeSampler(torch.rand(3, 4), **SIZES)
    with pytest.raises(ValueError, match="shots 'natural' takes 2 of .* class '2' of letters, and there is 1"):
        EpisodeSampler(numbered((3, 1, 4)), ways=2, shots="natural", query_shots=10)
    with pytest.raises(ValueError, match=r"rotations need square images .* \[1, 4, 5\]"):
        EpisodeSampler(torch.rand(3, 9, 1, 4, 5), **SIZES, rotations=True)
