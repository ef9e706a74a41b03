"""Processes that train together: the same run as one process, whatever happens to one of them."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import check_names, images
from torch import nn

from fastmeta.algorithms._norms_of_all import NormsOfAll
from fastmeta.tasks import (
    ClusterTasks,
    MixedTasks,
    PersonTasks,
    Prefetched,
    RegressionTasks,
    SinusoidTasks,
    TaskBatch,
    TaskRows,
)
from fastmeta.tasks.source import sample_part
from fastmeta.testing import relative_error, tolerance
from fastmeta.training import CheckpointFolder

HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def wrong():
    """Name of a check and what went wrong in it: one process does them all, see ranks.py."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    done = subprocess.run(
        [sys.executable, HERE / "ranks.py"], capture_output=True, text=True, timeout=600, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", check_names())
def test_many_processes(wrong, name):
    assert wrong[name] is None, wrong[name]


def test_torchrun_trains(tmp_path):
    words = ["train", "maml", "--data", "sinusoid", "--hidden", "4", "--task-batch", "4", "--iterations", "4"]
    words += ["--eval-tasks", "4", "--test-tasks", "4", "--no-report", "--threads", "1", "--out", tmp_path / "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "fastmeta", *words], capture_output=True, text=True, timeout=300, env=ONE_THREAD, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("on 2 processes") == done.stdout.count("finished at step 4") == 1
    assert done.stdout.count("test split") == 1
    assert CheckpointFolder(tmp_path / "run").newest()[0].record["world_size"] == 2


@pytest.mark.parametrize("norm", [
    nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False, momentum=None), nn.BatchNorm3d(3, track_running_stats=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_of_all_ranks_is_torchs_where_there_is_one(norm, dtype):
    norm, plain = copy.deepcopy(norm).to(dtype), copy.deepcopy(norm).to(dtype)
    shape = {nn.BatchNorm1d: (6, 3), nn.BatchNorm2d: (6, 3, 2, 2), nn.BatchNorm3d: (2, 3, 2, 1, 2)}[type(norm)]
    torch.manual_seed(0)
    for training in (True, True, False):
        x = (torch.randn(shape, dtype=torch.float64) + 2).to(dtype).requires_grad_()
        weight = torch.randn(shape).to(dtype)
        found = []
        for layer, mode in ((norm, NormsOfAll(0, 1, lambda tensor: tensor, 0.5)), (plain, contextlib.nullcontext())):
            layer.train(training)
            with mode:
                y = layer(x)
            wanted = [x, *layer.parameters()]
            found.append([y, *torch.autograd.grad((weight * y).sum(), wanted), *layer.buffers()])
        for one, other in zip(*found, strict=True):
            assert one.dtype == other.dtype
            assert relative_error(one.double(), other.double()) <= tolerance(dtype, 1, 0)


def test_a_norm_of_all_ranks_loses_nothing_to_a_large_mean():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    with NormsOfAll(0, 1, lambda tensor: tensor, 1.0):
        y = nn.BatchNorm1d(3)(x)
    # float32 tells numbers of 10,000 apart by 0.001; of their squares it would be 8
    assert relative_error(y, nn.BatchNorm1d(3).double()(x.double())) < 2e-3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the agent's processes")
def test_a_process_that_is_killed_is_started_anew_and_nothing_is_lost():
    words = ["--ranks", "2", "--runs", "1", "--kills", "2", "--steps", "40"]
    done = subprocess.run([sys.executable, HERE / "kills.py", *words], capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0 and "1 runs, " in done.stdout and " 0 kills" not in done.stdout, done.stderr


class Negated(SinusoidTasks):
    """A subclass that gives other tasks, and says nothing of parts."""

    def sample(self, num_tasks, *, generator=None):
        support_x, support_y, query_x, query_y = super().sample(num_tasks, generator=generator)
        return TaskBatch(support_x, -support_y, query_x, -query_y)


def of_groups():
    """Sources over 24 rows of 4 groups, each with 3 rows of 2 classes."""
    rows, group, kind = torch.arange(24.0).unsqueeze(1), torch.arange(24) % 4, torch.arange(24) // 4 % 2
    yield RegressionTasks(TaskRows(rows, -rows, group[:21].tolist() + [0, 0, 0]), shots=1, query_shots="all")
    yield PersonTasks(rows, kind, group, ways=2, shots=1, query_shots=2)
    yield ClusterTasks(rows.view(24, 1, 1, 1), torch.stack([group, kind]), ways=2, shots=1, query_shots=2)


@pytest.mark.parametrize(
    "tasks",
    [
        images(), images(ways=(2, 4), shots=(1, 3), query_shots="all"),
        images(augment=lambda x, generator: x + torch.rand(x.shape, dtype=x.dtype, generator=generator)),
        Prefetched(images(query_shots=1)), MixedTasks({images(): 1, images(shots=2): 2}), SinusoidTasks(),
        Negated(), *of_groups(),
    ],
    ids=["episodes", "unlike", "augmented", "prefetched", "mixed", "sinusoid", "sinusoid's kin", "rows", "persons",
         "clusters"],
)  # fmt: skip
def test_parts_are_of_the_whole(tasks):
    """Every rank's part of two batches one after the other, from generators of its own."""

    def drawn(*parts):
        generator = torch.Generator().manual_seed(1)
        return [sample_part(tasks, 5, part, generator=generator) for part in parts], generator.get_state()

    generator = torch.Generator().manual_seed(1)
    whole = [tasks.sample(5, generator=generator) for _ in range(2)]
    for rank in range(3):
        parts, state = drawn(slice(rank, 5, 3), slice(rank, 5, 3))
        assert torch.equal(state, generator.get_state())
        for part, batch in zip(parts, whole, strict=True):
            for mine, of_all in zip(part, batch, strict=True):
                assert (mine is None) if of_all is None else torch.equal(mine, of_all[rank::3])
    assert not drawn(slice(5, 5, 7))[0][0].num_tasks
    if isinstance(tasks, Prefetched):  # pytest holds the parameter until the end
        tasks.close()
