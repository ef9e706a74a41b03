"""Nets and task batches that several groups of the suite time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import fastmeta.nn
from fastmeta import MAML, TaskBatch
from fastmeta.dispatch.spec import Make

from . import counts


def maml_batch(sizes, tasks: int, shots: int, queries: int, steps: int, make: Make | None = None):
    """An MLP, its loss, a task batch and `MAML` of them; regression if the net has one output."""
    make = make or Make(torch.float32)
    torch.manual_seed(0)
    model = fastmeta.nn.mlp(sizes).to(make.device, make.dtype)
    regression = sizes[-1] == 1

    def targets(rows):
        return make.normal(tasks, rows, 1) if regression else make.labels(sizes[-1], tasks, rows)

    batch = TaskBatch(
        make.normal(tasks, shots, sizes[0]), targets(shots), make.normal(tasks, queries, sizes[0]), targets(queries)
    )
    loss = F.mse_loss if regression else F.cross_entropy
    maml = MAML(model, inner_lr=0.01, inner_steps=steps, loss="mse" if regression else "cross_entropy")
    return model, loss, batch, maml


def episodes(make: Make, tasks: int, ways: int, shots: int, queries: int, *shape: int) -> TaskBatch:
    """Balanced tasks of random examples, `queries` of each class."""
    return TaskBatch(
        make.normal(tasks, ways * shots, *shape),
        make.balanced_labels(tasks, ways, shots),
        make.normal(tasks, ways * queries, *shape),
        make.balanced_labels(tasks, ways, queries),
    )


def rows_and_gradients(model: torch.nn.Module, batch: TaskBatch) -> int:
    """Bytes of the tasks' rows, of the slow weights and of their gradients."""
    return counts.nbytes([*batch, *model.parameters(), *model.parameters()])
