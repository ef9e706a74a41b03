"""Where one way of computing begins to be faster than another on this machine: what `fastmeta tune` measures.

Every choice of `fastmeta.dispatch.tuned` has a ladder of problems. Both ways run each of them in turns, and the number
is the one that would have cost least over the whole ladder; the built-in one stays unless that saves something.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import fastmeta.nn
from fastmeta import MAML
from fastmeta.algorithms import _blocks
from fastmeta.dispatch import tuned
from fastmeta.dispatch.spec import Make
from fastmeta.engines import _convolutions, fused

from . import measure
from .measure import Contender
from .problems import episodes

WORTH = 0.03  # of the time over a ladder, that another number must save
Rung = tuple[float, Contender, Contender]  # the size that is compared with the number; the way below it, the way above


@dataclass(frozen=True)
class Found:
    """What was measured of a choice: `times` has for every size the seconds of the way below and of the way above."""

    name: str
    built_in: float
    number: float
    times: dict[float, tuple[float, float]]


def best(built_in: float, times: dict[float, tuple[float, float]]) -> float:
    """The number under which the ladder takes least, each rung counted alike, whatever its size."""
    sizes = sorted(times)
    gaps = [math.sqrt(a * b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    # beyond the ladder nothing is known: as little beyond as it takes
    candidates = [min(built_in, sizes[0] / 2), *gaps, max(built_in, sizes[-1] * 2)]

    def cost(number: float) -> float:
        return statistics.fmean(math.log(times[size][0] if size < number else times[size][1]) for size in sizes)

    quickest = min(candidates, key=cost)
    return quickest if cost(quickest) < cost(built_in) - WORTH else built_in


def ladders() -> dict[str, tuple[float, Callable[[], Iterator[Rung]]]]:
    """By choice: the built-in number, and the rungs."""
    return {
        "one_pass": (_blocks._LEAST, _one_pass),
        "mapped": (_convolutions._MOST, _mapped),
        "fused": (fused._MOST_WEIGHTS, _fused),
        "lowrank": (1.0, _lowrank),
    }


def tune(seconds: float, progress: Callable[[str, float], None]) -> Iterator[Found]:
    """Measure every choice, `seconds` for each rung; `progress` is told which one is next."""
    for name, (built_in, rungs) in ladders().items():
        times = {}
        for size, below, above in rungs():
            progress(name, size)
            found = measure.interleaved({"below": below, "above": above}, seconds, rounds=3)
            times[size] = statistics.median(found["below"]), statistics.median(found["above"])
        yield Found(name, built_in, best(built_in, times), times)


def _one_pass() -> Iterator[Rung]:
    """A training step of a convolutional encoder, by the images in a call."""
    make = Make(torch.float32)
    for images in (2, 5, 10, 20, 40, 80):
        torch.manual_seed(0)
        encoder, x = fastmeta.nn.conv4(1, 64), make.normal(images, 1, 28, 28)

        def step(number: float, encoder=encoder, x=x) -> Contender:
            def run():
                with tuned.using({"one_pass": number}):
                    loss = _blocks.call(encoder, (x,), {}).square().mean()
                return torch.autograd.grad(loss, list(encoder.parameters()))

            return run

        yield images * 64 * 28 * 28, step(math.inf), step(0)


def _engines(model: nn.Module, below: str, above: str, batch, steps: int = 1) -> tuple[Contender, Contender]:
    def run(engine: str) -> Contender:
        maml = MAML(model, inner_lr=0.01, inner_steps=steps, engine=engine)
        return lambda: list(maml.gradients(batch)[1].values())

    return run(below), run(above)


def _mapped() -> Iterator[Rung]:
    """A convolutional net that no other engine serves, by the channels."""
    tasks, rows, queries, pixels = 4, 5, 15, 14 * 14
    for channels in (8, 16, 32, 64, 128):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * channels, 5),
        )  # fmt: skip
        batch = episodes(Make(torch.float32), tasks, 5, 1, queries // 5, 4, 14, 14)
        mean = (9 * rows + 3 * queries) / 12  # as the choice counts them: a step is nine passes, the queries three
        yield channels * pixels * mean / (1 - 1 / tasks), *_engines(model, "vmap", "loop", batch)


def _fused() -> Iterator[Rung]:
    """Perceptrons with two hidden layers, by their weights."""
    for width in (128, 256, 362, 512, 724):
        torch.manual_seed(0)
        model = fastmeta.nn.mlp((8, width, width, 5))
        batch = episodes(Make(torch.float32), 8, 5, 1, 5, 8)
        _, *held = [p.numel() for p in model.parameters() if p.dim() == 2]  # the first is in low-rank form
        yield sum(held), *_engines(model, "fused", "lowrank", batch)  # so few rows: lowrank is what comes next


def _lowrank() -> Iterator[Rung]:
    """A perceptron too large for the fused loops, by the support rows."""
    torch.manual_seed(0)
    sizes = (64, 512, 512, 5)
    model = fastmeta.nn.mlp(sizes)
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    width = 2 * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)
    for share in (0.25, 0.5, 1.0, 2.0, 4.0):
        shots = max(1, round(share * width / 5))
        batch = episodes(Make(torch.float32), 2, 5, shots, 5, 64)
        yield 5 * shots / width, *_engines(model, "lowrank", "layerwise", batch)
