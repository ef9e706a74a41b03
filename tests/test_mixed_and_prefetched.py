"""Tasks from several data sets by weight, and tasks that are drawn ahead."""

import gc
import pickle
import threading
import time

import pytest
import torch
from conftest import DEVICE
from numbered_rows import SIZES, disjoint, even, numbered, seeded, tasks_of

from fastmeta.tasks import EpisodeSampler, MixedTasks, Prefetched, SinusoidTasks, TaskBatch

# ----- several data sets


class Constant:
    """Tasks whose rows hold one number."""

    kind, output_size = "classification", 2

    def __init__(self, number, rows, shape=(2,), dtype=torch.float32, masked=False):
        self.number, self.rows, self.input_shape, self.dtype, self.masked = number, rows, shape, dtype, masked

    def sample(self, num_tasks, *, generator=None):
        x = torch.full((num_tasks, self.rows, *self.input_shape), self.number, dtype=self.dtype, device=DEVICE)
        y = torch.ones(num_tasks, self.rows, dtype=torch.int64, device=DEVICE)
        mask = (torch.arange(self.rows, device=DEVICE) > 0).expand(num_tasks, -1) if self.masked else None
        return TaskBatch(x, y, x[:, :1], y[:, :1], mask, None)


def test_mixed_by_weight():
    few, many = Constant(1.0, 2), Constant(2.0, 4)
    mixed = MixedTasks({few: 1, many: 3})
    batch = mixed.sample(4000, generator=seeded())
    assert batch.support_x.shape == (4000, 4, 2) and batch.query_x.shape == (4000, 1, 2)
    which = batch.query_x[:, 0, 0]
    assert even((which == 2.0).long().bincount(), torch.tensor([0.25, 0.75]).double())
    pairs = ((which == 2.0).view(2000, 2) * torch.tensor([2, 1], device=DEVICE)).sum(1)
    assert even(pairs.bincount(), torch.tensor([1, 3, 3, 9]).double() / 16)
    assert torch.equal(batch.support_mask.sum(1), 2 * which.long()) and batch.query_mask is None
    assert torch.equal(batch.support_x[..., 0], batch.support_mask * which.unsqueeze(1))
    assert torch.equal(batch.support_y, batch.support_mask.long())
    assert len(MixedTasks({few: 1, Constant(2.0, 2): 1}).sample(9)) == 4  # nothing to pad, no mask
    assert mixed.sample(0).num_tasks == 0
    batch = MixedTasks({Constant(1.0, 2, masked=True): 1, few: 1, Constant(2.0, 2): 1}).sample(50)
    whole = batch.support_mask.all(1)
    assert torch.equal(batch.support_mask[:, 0], whole) and batch.support_mask[:, 1].all()
    assert 0 < whole.sum() < 50 and whole[batch.query_x[:, 0, 0] == 2].all() and batch.query_mask is None


def test_mixed_samplers():
    one = EpisodeSampler(numbered(), ways=(2, 3), shots=1, query_shots=2)
    other = EpisodeSampler(numbered((20, 20, 20, 20, 20)), ways=4, shots=2, query_shots=3)
    mixed = MixedTasks({one: 1, other: 1})
    assert mixed.output_size == 4 and mixed.input_shape == (3,)
    batch = mixed.sample(60, generator=seeded())
    found = tasks_of(batch)
    assert {len(task) for task in found} == {2, 3, 4} and all(disjoint(task) for task in found)
    again = mixed.sample(60, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    waves = MixedTasks({SinusoidTasks(shots=shots, device=DEVICE): 1 for shots in (3, 5)}).sample(20)
    assert waves.support_y.shape == (20, 5, 1) and not waves.support_y[~waves.support_mask].any()


@pytest.mark.parametrize(
    "sources, message",
    [
        ({}, "sources must map sources of tasks to weights"),
        ({Constant(1.0, 2): 0}, "the weight of Constant must be above 0"),
        ({Constant(1.0, 2): 1, Constant(1.0, 2, (3,)): 1}, r"the same input_shape, got \(2,\) of Constant and \(3,\)"),
        ({Constant(1.0, 2): 1, SinusoidTasks(): 1}, "the same kind, got classification of Constant and regression"),
        ({object(): 1}, "tasks must be a source of tasks"),
    ],
)
def test_mixtures_refused(sources, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MixedTasks(sources)


def test_mixed_dtypes():
    mixed = MixedTasks({Constant(1, 2): 1, Constant(2, 2, dtype=torch.int64): 1})
    with pytest.raises(ValueError, match="must give one dtype on one device, got float32 on .* and int64"):
        mixed.sample(50, generator=seeded())


# ----- drawn ahead


def prefetching_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastmeta-prefetch"]


class Counted:
    """A sampler that counts its batches, and refuses one of them."""

    kind, input_shape, output_size = "classification", (3,), 3

    def __init__(self, fails_at=None):
        self.tasks, self.count, self.fails_at = EpisodeSampler(numbered(), **SIZES), 0, fails_at

    def sample(self, num_tasks, *, generator=None):
        self.count += 1
        if self.count == self.fails_at:
            raise OSError("the disk is gone")
        return self.tasks.sample(num_tasks, generator=generator)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_drawn_ahead_is_as_drawn_at_once():
    plain, ahead = EpisodeSampler(numbered(), **SIZES), Prefetched(EpisodeSampler(numbered(), **SIZES))
    assert (ahead.kind, ahead.input_shape, ahead.output_size) == ("classification", (3,), 3)
    one, other = seeded(), seeded()
    for n in (4, 4, 4, 2, 2, 0, 5, 5):
        assert same(plain.sample(n, generator=one), ahead.sample(n, generator=other))
        assert torch.equal(one.get_state(), other.get_state())  # what a checkpoint would hold
    for generator in (one, other):
        generator.manual_seed(3)  # as a resumed run sets it, or somebody draws from it between
    assert same(plain.sample(5, generator=one), ahead.sample(5, generator=other))
    torch.rand(1, generator=one, device=DEVICE), torch.rand(1, generator=other, device=DEVICE)
    assert same(plain.sample(5, generator=one), ahead.sample(5, generator=other))
    torch.manual_seed(0)
    first = plain.sample(3)
    torch.manual_seed(0)
    assert same(first, ahead.sample(3))
    ahead.close()


def test_it_is_ahead_and_nothing_is_drawn_twice():
    source = Counted()
    ahead, generator = Prefetched(source), seeded()
    for step in range(1, 5):
        ahead.sample(2, generator=generator)
        deadline = time.monotonic() + 10
        while source.count < step + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert source.count == step + 1
    ahead.close()


def test_errors_come_where_they_would():
    source = Counted(fails_at=3)
    ahead, generator = Prefetched(source), seeded()
    ahead.sample(2, generator=generator), ahead.sample(2, generator=generator)
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.sample(2, generator=generator)
    assert ahead.sample(2, generator=generator).num_tasks == 2
    ahead.close()
    with pytest.raises(ValueError, match="num_tasks must be at least 0"):
        ahead.sample(-1, generator=generator)


def test_threads_end():
    assert not prefetching_threads()
    ahead, generator = Prefetched(EpisodeSampler(numbered(), **SIZES)), seeded()
    ahead.sample(2, generator=generator)
    assert len(prefetching_threads()) == 1
    copied = pickle.loads(pickle.dumps(ahead))
    ahead.close()
    assert not prefetching_threads()
    assert same(ahead.sample(2, generator=seeded()), copied.sample(2, generator=seeded()))
    assert len(prefetching_threads()) == 2
    del ahead, copied
    gc.collect()
    assert not prefetching_threads()
