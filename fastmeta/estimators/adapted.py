"""A learner that has adapted to one support set, and predicts from it piece by piece."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import values
from ..tasks import DataWarning
from ..tasks.inputs import as_numbers, told_of_pixels
from ..training.run import check_ways, device_of, load
from .batch_norms import beside_support, by_rows_at_hand
from .calibrate import left_out_logits, temperature
from .rules import RULES, rule


def learner_of(given: str | os.PathLike | nn.Module, kind: str, device: str | None = None) -> nn.Module:
    """The learner that is meant, in eval mode.

    Args:
        given: the name of a rule without training, a run's folder or checkpoint, or a module with `adapt` and
            `predict`, of which this is a copy.
        kind: "classification" or "regression".
        device: "auto", "cpu", "cuda" or "cuda:N"; None leaves a module where it is, takes a GPU for a run where there
            is one, and the CPU for rules.

    Raises:
        ValueError: no such rule or folder, a run of another kind. TypeError: what is none of these.
    """
    rules = RULES[kind]
    if isinstance(given, nn.Module):
        learner = copy.deepcopy(given)
        learner = learner if device is None else learner.to(device_of(device))
    elif isinstance(given, str) and given in rules:
        learner = rule(given, kind, device_of(device or "cpu"))
    elif not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"learner must be a name, a run's folder or an nn.Module, got {values.shown(given)}")
    elif os.path.exists(given):
        learner = load(given, device=device or "auto")
    else:
        names = ", ".join(rules)
        raise ValueError(f"learner of {kind} must be {names}, a run's folder or a module; got {os.fspath(given)!r}")
    for name in ("adapt", "predict"):
        if not callable(getattr(learner, name, None)):
            raise TypeError(
                f"learner must have adapt and predict, as those of fastmeta.algorithms; {type(learner).__name__} has "
                f"no {name}"
            )
    inputs = getattr(learner, "inputs", None)
    if inputs is not None and inputs.kind != kind:
        raise ValueError(f"learner must be one of {kind}; {os.fspath(given)} was trained on {inputs.kind}")
    return learner.eval()


class Adapted:
    """A learner and what it made of one support set.

    Args:
        learner: from `learner_of`.
        x: the support rows `[S, ...]`, uint8 (of which 255 is 1.0) or other numbers. What a run reads is said by its
            `~fastmeta.tasks.Inputs`; other learners are given rows as they are, in the dtype of their weights, uint8
            `[S, H, W, C]` of 1 or 3 channels with channels first.
        y: labels int64 `[S]` from 0 to N - 1, each there, or targets floating `[S, O]`.
        calibrate: fit `temperature` to predictions of each support row from the others; where a class has one row, or
            there is one class, it stays 1, as in regression.
        chunk_size: rows that go through the learner at a time.

    A learner with batch norms that have no running statistics sees each query beside the support set alone, so that
    what it says of one does not depend on the others.

    Raises:
        ValueError: rows, targets or a number of classes that the learner does not serve.
    """

    @torch.no_grad()
    def __init__(self, learner: nn.Module, x: Tensor, y: Tensor, *, calibrate: bool = False, chunk_size: int = 1024):
        self.learner = learner
        self.chunk_size = values.count("chunk_size", chunk_size)
        values.flag("calibrate", calibrate)
        rows = self._rows(x)
        told = told_of_pixels(rows) if hasattr(learner, "inputs") else ""
        if told:
            warnings.warn(f"support rows are {told}", DataWarning, stacklevel=3)
        classifies = not y.is_floating_point()
        size = int(y.max()) + 1 if classifies else y.shape[1]
        if classifies and hasattr(learner, "config"):
            check_ways(learner.config, size)
        if not classifies and hasattr(learner, "inputs"):
            y = learner.inputs.prepare_targets(y)
        y = y.to(rows.device, rows.dtype if rows.is_floating_point() and not classifies else None)
        self.state = learner.adapt(rows.unsqueeze(0), y.unsqueeze(0))
        self._beside = rows if by_rows_at_hand(learner) else None
        outputs = learner.predict(self.state, rows[None, : self.chunk_size]).shape[2]
        if outputs != size:
            what = "classes" if classifies else "numbers a row"
            raise ValueError(f"learner has {outputs} outputs, and y has {size} {what}: they must be as many")
        self.temperature = 1.0
        if calibrate and classifies and size > 1 and int(y.bincount().min()) > 1:
            self.temperature = temperature(*left_out_logits(learner, rows, y, chunk_size))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits `[n, N]` or predictions `[n, O]` of rows `[n, ...]`, float64 on the CPU.

        Raises:
            ValueError: a row whose prediction is NaN or all infinite: its numbers, or the support set's, are too large.
        """
        size = self.chunk_size if self._beside is None else max(1, self.chunk_size // (len(self._beside) + 1))
        found = torch.cat([self._piece(part) for part in x.split(size)])
        wrong = found.isnan().any(1) | found.isinf().all(1)
        if wrong.any():
            raise ValueError(
                f"predictions of {int(wrong.sum())} rows are not finite, first of row {int(wrong.nonzero()[0])}, "
                "counted from 0: its numbers, or those of the support set, are too large for the learner"
            )
        inputs = getattr(self.learner, "inputs", None)
        return found if inputs is None else inputs.restore_targets(found)

    def _piece(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        if self._beside is not None:
            return beside_support(self.learner, self.state, self._beside, rows).double().cpu()
        return self.learner.predict(self.state, rows.unsqueeze(0))[0].double().cpu()

    def probabilities(self, x: Tensor) -> Tensor:
        """Of each class, `[n, N]`."""
        return torch.softmax(self.predict(x) / self.temperature, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """What the learner reads, on its device."""
        inputs = getattr(self.learner, "inputs", None)
        tokens = any(isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) for layer in self.learner.modules())
        if x.dtype in (torch.int32, torch.int64) and not tokens:
            x = x.double()  # float32 would round times in seconds, say, before they are centred or standardised
        if inputs is not None:
            x = inputs.prepare(x)
        elif x.dtype == torch.uint8:
            x = as_numbers(_channels_first(x))
        elif not tokens:
            x = as_numbers(x)
        like = next((p for p in self.learner.parameters() if p.is_floating_point()), None)
        if like is None:
            return x
        return x.to(like.device, like.dtype if x.is_floating_point() else None)


def _channels_first(images: Tensor) -> Tensor:
    last = images.dim() == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    return images.movedim(3, 1) if last else images


def as_host(given: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if not isinstance(given, Tensor):
        return given
    given = given.detach().cpu()
    return (given.float() if given.dtype in (torch.bfloat16, torch.float16) else given).numpy()
