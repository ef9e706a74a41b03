"""ANIL and BOIL: MAML in which only some of the parameters adapt to a task."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ._arguments import check_number
from ._rated_loop import RatedInnerLoop
from ._rates import Rates

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
        adapts: `"head"` (default): the last module that has parameters; `"body"`: all others; or a callable that
            takes a parameter's name and says whether it adapts.
        inner_lr: step size in the inner loop, 0.1 by default.
        inner_steps: `K >= 0`, 5 by default. May be set anew between calls.
        first_order: drop the second derivatives.
        loss: as in `MAML`.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.

    Raises:
        TypeError, ValueError: arguments out of range, no parameter that adapts; inputs and targets that do not fit
            together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapts: str | Callable[[str], bool] = "head",
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | None = None,
    ):
        super().__init__(model, inner_steps=inner_steps, first_order=first_order, loss=loss, task_chunk=task_chunk)
        if not callable(adapts) and adapts not in HEAD_OR_BODY:
            raise ValueError(f"adapts must be one of {HEAD_OR_BODY} or a callable(name) -> bool, got {adapts!r}")
        self.inner_lr = check_number("inner_lr", inner_lr)
        self.adapts = adapts
        if not self.adapting:
            names = ", ".join(name for name, _ in model.named_parameters())
            raise ValueError(f"adapts picks none of the parameters that require gradients: {names}")

    @property
    def adapting(self) -> list[str]:
        """Names of the parameters that adapt."""
        named = dict(self.model.named_parameters())
        if callable(self.adapts):
            return [name for name, p in named.items() if p.requires_grad and self.adapts(name)]
        head = next(reversed(named), "").rpartition(".")[0]
        wanted = self.adapts == "head"
        return [name for name, p in named.items() if p.requires_grad and (name.rpartition(".")[0] == head) == wanted]

    def _rates(self) -> Rates:
        slow = dict(self.model.named_parameters())
        names = self.adapting
        rate = slow[names[0]].new_full((1,), self.inner_lr)
        return dict.fromkeys(names, rate)

    def extra_repr(self) -> str:
        adapts = self.adapts if isinstance(self.adapts, str) else ", ".join(self.adapting)
        return f"adapts={adapts!r}, inner_lr={self.inner_lr}, {super().extra_repr()}"


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
