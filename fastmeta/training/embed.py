"""Embedding a split once, so that an episode is only a choice of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..algorithms import ProtoNet
from ..tasks import EpisodeSampler, Prefetched, TaskSource
from ..tasks.rows import as_inputs
from .distributed import ranks

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
    so. Processes of one group each embed a part of the images."""
    rows, parts, group, given_up = tasks.examples.rows, [], ranks(), False
    order = tasks.examples.order.to(rows.device)
    for part in order[group.own(len(order))].split(_IMAGES):
        if given_up := stop is not None and stop():
            break
        parts.append(encoder(as_inputs(rows[part].to(tasks.device))))
    if group.any(given_up):
        return None
    embeddings = group.gathered(torch.cat(parts), len(order))
    return tasks.over(embeddings[..., None, None], f"{tasks.name}, embedded")
