"""Small runs, for the tests of what a run leaves behind."""

import os

import pytest
import torch

from fastmeta.training import CheckpointFolder, run_config
from fastmeta.training.run import build_trainer

posix = pytest.mark.skipif(os.name != "posix", reason="locks and signals as on POSIX")

SINUSOID = ["train", "maml", "--data", "sinusoid", "--hidden", 8, "--task-batch", 4, "--eval-tasks", 8, "--threads", 1,
            "--no-report"]  # fmt: skip


def sinusoid(**changed):
    small = {"hidden": (8,), "task_batch": 4, "iterations": 20, "eval_tasks": 8, "eval_every": 10, "save_every": 5}
    return run_config("maml", "sinusoid", **{**small, **changed})


def trained(folder, steps=20, **changed):
    """A run of `steps`, saved every 5."""
    build_trainer(sinusoid(iterations=steps, **changed), folder).run()
    return CheckpointFolder(folder)


def put(folder, *steps, score=None):
    for step in steps:
        folder.save(step, {"model/w": torch.full((3,), float(step))}, {"score": score})
