"""Embedding a split once, so that an episode is only a choice of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..algorithms import ProtoNet
from ..tasks import EpisodeSampler

_IMAGES = 1024  # at a time


def embedding_pays(algorithm: ProtoNet, tasks: object, episodes: int) -> bool:
    """Whether embedding all images of `tasks` is allowed, and less work than embedding `episodes` episodes.

    It is not allowed where an image's embedding depends on its neighbours: batch norm that has no running
    statistics.
    """
    if not isinstance(tasks, EpisodeSampler):
        return False
    if any(
        isinstance(layer, nn.modules.batchnorm._NormBase) and layer.running_mean is None
        for layer in algorithm.modules()
    ):
        return False
    classes, instances = tasks.images.shape[:2]
    return classes * instances <= episodes * tasks.ways * (tasks.shots + tasks.query_shots)


def embed(encoder: nn.Module, tasks: EpisodeSampler, stop: Callable[[], bool] | None = None) -> EpisodeSampler | None:
    """The same episodes from the same generator, with embeddings `[D, 1, 1]` for images; None if `stop` said
    so."""
    parts = []
    for images in tasks.images.flatten(0, 1).split(_IMAGES):
        if stop is not None and stop():
            return None
        parts.append(encoder(images.float().div_(255) if images.dtype == torch.uint8 else images))
    embeddings = torch.cat(parts).unflatten(0, tasks.images.shape[:2])[..., None, None]
    sizes = {"ways": tasks.ways, "shots": tasks.shots, "query_shots": tasks.query_shots}
    return EpisodeSampler(embeddings, **sizes, name=f"{tasks.name}, embedded")
