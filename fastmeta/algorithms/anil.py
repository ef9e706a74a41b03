"""ANIL and BOIL: MAML in which only some of the parameters adapt to a task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import first, tree_map

from ..engines import Rates
from ..engines.last_layer import last_constructed, last_layer
from ._inner_lr import InnerLR, as_inner_lr, as_rule, described, rates_like, rates_of
from ._rated_loop import RatedInnerLoop

HEAD_OR_BODY = ("head", "body")


class ANIL(RatedInnerLoop):
    """ANIL (Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse? Towards Understanding the
    Effectiveness of MAML", section 4): MAML whose inner loop changes the head alone.

    With `adapts` a predicate, this is MAML with any split into task-specific and shared parameters: the inner loop
    takes `inner_steps` steps `phi <- phi - inner_lr * grad_phi L_support(theta, phi)`, and the outer loop trains
    `theta` and the start of `phi` on the query loss, second derivatives included; `theta` trains through the support
    features, too. Departure: the mean over tasks, where the paper sums.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`. Where it is an `nn.Sequential` that begins
            with layers of which none adapts, these encode every example once, whatever the number of steps; a head that
            is a multi-layer perceptron then adapts in the fused inner loops. Batch norms see one task's rows, support
            and query apart, as in `MAML`; those in such first layers that have running statistics see the whole task
            batch in train mode and use the statistics in eval mode. Parameters with `requires_grad=False` are neither
            adapted nor trained.
        adapts: `"head"` (default): the layer that `forward` uses last of those that have parameters, looked for anew in
            each call; `"body"`: all others; or a callable that takes a parameter's name and says whether it adapts. A
            parameter that the head shares with another layer is the head's, and adapts for both. Where a chain of
            layers does not say which is last, the model runs once more on one task's support rows, without its hooks
            and with nothing that it writes kept.
        inner_lr: step size in the inner loop, 0.1 by default; per step or layer as in `MAML`.
        inner_steps: `K >= 0`, 5 by default. May be set anew between calls.
        learn_inner_lr, momentum, weight_decay, clip_norm, clip_value: of the inner steps, as in `MAML`.
        first_order: drop the second derivatives.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.
        memory, every: `"sweep"` finds the gradient without a graph over the steps, `"auto"` (default) where that would
            be large; as in `MAML`.

    Raises:
        TypeError, ValueError: arguments out of range, no parameter that adapts (of those that require gradients, when
            it is called); inputs and targets that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapts: str | Callable[[str], bool] = "head",
        inner_lr: InnerLR = 0.1,
        inner_steps: int = 5,
        learn_inner_lr: bool = False,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | str | None = None,
        memory: str = "auto",
        every: int = 1,
    ):
        if not callable(adapts) and not (isinstance(adapts, str) and adapts in HEAD_OR_BODY):
            raise ValueError(
                f"adapts must be one of {', '.join(HEAD_OR_BODY)}, or a callable(name) -> bool; "
                f"got {values.shown(adapts)}"
            )
        super().__init__(
            model, inner_steps=inner_steps, loss=loss, first_order=first_order, task_chunk=task_chunk, memory=memory,
            every=every,
        )  # fmt: skip
        self.inner_lr = as_inner_lr(model, inner_lr, learn_inner_lr, inner_steps)
        self.rule = as_rule(momentum, weight_decay, clip_norm, clip_value)
        self.adapts = adapts
        self._seen_last: tuple[str, ...] | None = None  # the head of the last batch
        if not self._picked(self._head()):
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ValueError(f"adapts picks none of the parameters: {names}")

    @property
    def adapting(self) -> list[str]:
        """Names of the parameters that adapt. Where that takes a run of the model: those of the last batch, or, before
        any, by the layer that was constructed last."""
        return self._requiring_gradients(self._picked(self._head()))

    def _picked(self, head: Collection[str]) -> list[str]:
        names = [name for name, _ in self.model.named_parameters()]
        if callable(self.adapts):
            return [name for name in names if self.adapts(name)]
        return [name for name in names if (name in head) == (self.adapts == "head")]

    def _requiring_gradients(self, names: list[str]) -> list[str]:
        named = dict(self.model.named_parameters())
        return [name for name in names if named[name].requires_grad]

    def _head(self, support_x: Tensor | None = None) -> Collection[str]:
        if callable(self.adapts):
            return ()
        if support_x is not None and len(first(support_x)) and not torch.compiler.is_compiling():
            found = last_layer(self.model, tree_map(lambda leaf: leaf[0], support_x))
            if isinstance(found, str):
                warnings.warn(
                    f"adapts={self.adapts!r}: which layer is used last cannot be seen ({found}), and the one that was "
                    "constructed last is taken; adapts can be a callable(name) -> bool",
                    stacklevel=2,
                )
                found = last_constructed(self.model)
            self._seen_last = found
            return found
        found = last_layer(self.model)
        if not isinstance(found, str):
            return found
        known = self._seen_last is not None and set(self._seen_last) <= {n for n, _ in self.model.named_parameters()}
        return self._seen_last if known else last_constructed(self.model)

    def _rates(self, support_x: Tensor) -> Rates:
        slow = dict(self.model.named_parameters())
        picked = self._picked(self._head(support_x))
        names = self._requiring_gradients(picked)
        if not names:
            raise ValueError(f"adapts picks none of the parameters that require gradients: {', '.join(picked)} do not")
        rates = rates_of(self.inner_lr, names)
        return rates if isinstance(rates, Mapping) else rates_like(slow, names, rates)

    def extra_repr(self) -> str:
        adapts = self.adapts if isinstance(self.adapts, str) else ", ".join(self.adapting)
        return f"adapts={adapts!r}, inner_lr={described(self.inner_lr)}, {super().extra_repr()}"


class BOIL(ANIL):
    """BOIL (Oh, Yoo, Kim, Yun 2021, "BOIL: Towards Representation Change for Few-shot Learning", section 3): MAML whose
    inner loop changes the body alone and leaves the head as it is.

    `ANIL` with `adapts="body"`, and the authors' defaults: `inner_lr` 0.5, one inner step. The outer loop trains all
    parameters, the head included.
    """

    def __init__(self, model: nn.Module, *, inner_lr: float = 0.5, inner_steps: int = 1, **options):
        if "adapts" in options:
            raise TypeError("BOIL adapts the body; ANIL takes adapts")
        super().__init__(model, adapts="body", inner_lr=inner_lr, inner_steps=inner_steps, **options)
