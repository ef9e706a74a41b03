"""Losses, gradients and weights that are not finite: named with their step and tasks, left out, never saved."""

import math

import pytest
import torch
from small_runs import SINUSOID
from torch import nn

from fastmeta.algorithms import MetaOutput
from fastmeta.tasks import TaskBatch
from fastmeta.training import (
    CheckpointFolder,
    NonFiniteError,
    Trainer,
)
from fastmeta.training.log import LogReporter, read_log

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Loss of each task from its first query, whose square root has no slope at 0; a buffer that sees it too."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch):
        x = batch.query_x[:, 0, 0]
        self.seen += x.sum().detach()
        task_loss = self.w.sum() + (self.w.sum() * x).sqrt()
        return MetaOutput(task_loss.mean(), task_loss)


class Tasks:
    """At some steps, and in tasks 2 and 5 of 6, a value that is no good."""

    kind, input_shape, output_size = "regression", (1,), 1

    def __init__(self, value, *steps):
        self.value, self.steps, self.drawn = value, steps, 0

    def sample(self, num_tasks, *, generator=None):
        self.drawn += 1
        x = torch.ones(num_tasks, 1, 1)
        if self.drawn in self.steps:
            x[[2, 5]] = self.value
        return TaskBatch(x, x, x, x)


def test_a_loss_that_overflows_while_those_of_the_tasks_do_not_ends_the_run():
    class Sum(Net):
        def forward(self, batch):
            output = super().forward(batch)
            return output._replace(loss=output.task_loss.sum())

    trainer = Trainer(Sum(), Tasks(1.0), task_batch=6, iterations=4)
    with torch.no_grad():
        trainer.algorithm.w.fill_(8e37)  # 1.6e38 a task
    for late in (False, True):  # as on a GPU
        trainer._check_every_step = not late
        with pytest.raises(NonFiniteError, match="the loss is inf, while the largest query loss is 1.6e[+]38"):
            trainer.train_step()
            trainer._guard.check()


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.nan, "the query loss is NaN in tasks 2, 5 of 6"), (0.0, "not finite in parameter w.*comes from tasks 2, 5")],
    ids=["loss", "gradient"],
)
def test_step_and_tasks_are_named(value, text):
    trainer = Trainer(Net(), Tasks(value, 3), task_batch=6, iterations=4)
    with pytest.raises(NonFiniteError, match=f"step 3: .*{text}") as error:
        trainer.run()
    assert error.value.tasks == [2, 5]


@pytest.mark.parametrize("value", [math.nan, 0.0], ids=["loss", "gradient"])
def test_steps_that_are_not_finite_are_left_out(tmp_path, value):
    def train(tasks, iterations, **options):
        trainer = Trainer(Net(), tasks, task_batch=6, iterations=iterations, **options)
        trainer.run()
        return trainer

    saved = CheckpointFolder(tmp_path)
    log = LogReporter(tmp_path, device=torch.device("cpu"))
    skipping = {"skip_non_finite": True, "reporters": (log,), "checkpoints": saved}
    trainer, straight = train(Tasks(value, 2, 5), 7, **skipping), train(Tasks(value), 5)
    assert trainer.skipped == 2 and trainer.step == 7
    assert torch.equal(trainer.algorithm.w, straight.algorithm.w)
    assert torch.equal(trainer.algorithm.seen, straight.algorithm.seen)
    state, wanted = (list(one.optimizer.state.values())[0] for one in (trainer, straight))
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if "the query loss is" in line.get("left_out", "")] == [2, 5]
    assert lines[-1]["skipped"] == 2
    again = Trainer(Net(), Tasks(value), task_batch=6, iterations=7)
    again.restore(saved.newest()[0])
    assert again.skipped == 2


def test_a_run_of_left_out_steps_alone_ends(monkeypatch):
    monkeypatch.setattr("fastmeta.training.loop._MOST_SKIPPED", 3)
    trainer = Trainer(Net(), Tasks(math.nan, 2, 4, 5, 6), task_batch=6, iterations=10, skip_non_finite=True)
    with pytest.raises(NonFiniteError, match="step 6: 3 steps in a row were left out; of the last, the query"):
        trainer.run()


def test_the_command_leaves_steps_out_and_says_so(tmp_path, run, monkeypatch):
    from fastmeta.tasks import SinusoidTasks

    sample, drawn = SinusoidTasks.sample, []

    def bad_once(self, num_tasks, *, generator=None):
        batch = sample(self, num_tasks, generator=generator)
        drawn.append(num_tasks)
        return TaskBatch(*batch[:3], batch[3] * math.nan) if len(drawn) == 3 else batch

    monkeypatch.setattr(SinusoidTasks, "sample", bad_once)
    options = ["--iterations", 6, "--eval-every", 0, "--out", tmp_path]
    _, stderr = run(*SINUSOID, *options, "--skip-non-finite")
    assert "warning: 1 step was left out" in stderr
    drawn.clear()
    options[-1] = tmp_path / "stops"
    _, stderr = run(*SINUSOID, *options, code=1)
    assert stderr.startswith("error: step 3: the query loss is NaN in tasks 0, 1, 2, 3 of 4")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = Trainer(Net(), Tasks(0.0), task_batch=6, iterations=1, checkpoints=CheckpointFolder(tmp_path))
    with torch.no_grad():
        trainer.algorithm.w[1] = math.inf
    with pytest.raises(NonFiniteError, match="the weights are not finite in parameter w"):
        trainer.save()
    assert not list(tmp_path.iterdir())
