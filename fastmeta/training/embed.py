"""Embedding a split once, so that an episode is only a choice of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..algorithms import ProtoNet
from ..tasks import EpisodeSampler, Prefetched, TaskSource
from ..tasks.rows import as_inputs

_IMAGES = 1024  # at a time


def at_once(tasks: TaskSource) -> TaskSource:
    """The same tasks, drawn when they are asked for: what is embedded once need not be drawn ahead."""
    return tasks.tasks if isinstance(tasks, Prefetched) else tasks


def embedding_pays(algorithm: ProtoNet, tasks: object, episodes: int) -> bool:
    """Whether embedding all images of `tasks` is allowed, and less work than embedding `episodes` episodes.

    It is not allowed where an image's embedding depends on its neighbours (batch norm that has no running
    statistics), nor where images are augmented.
    """
    if not isinstance(tasks, EpisodeSampler) or tasks.augment is not None:
        return False
    if any(
        isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is None
        for layer in algorithm.modules()
    ):
        return False
    return len(tasks.examples.order) <= episodes * tasks.fewest_rows


def embed(encoder: nn.Module, tasks: EpisodeSampler, stop: Callable[[], bool] | None = None) -> EpisodeSampler | None:
    """The same episodes from the same generator, with embeddings `[D, 1, 1]` for images; None if `stop` said
    so."""
    rows, parts = tasks.examples.rows, []
    for part in tasks.examples.order.to(rows.device).split(_IMAGES):
        if stop is not None and stop():
            return None
        parts.append(encoder(as_inputs(rows[part].to(tasks.device))))
    return tasks.over(torch.cat(parts)[..., None, None], f"{tasks.name}, embedded")
