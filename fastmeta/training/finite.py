"""Finding the first non-finite loss or meta-gradient, without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..algorithms import MetaOutput


class NonFiniteError(RuntimeError):
    """Training met a loss or meta-gradient that is not finite. `step` is the step it happened in, counted
    from 1; `tasks` of the batch are those it comes from, as far as that is known."""

    def __init__(self, step: int, cause: str, tasks: Sequence[int] = ()):
        super().__init__(
            f"step {step}: {cause}. Nothing was saved after it; a smaller inner or outer learning rate often helps, "
            "and --skip-non-finite leaves such steps out"
        )
        self.step = step
        self.cause = cause
        self.tasks = list(tasks)


class FiniteGuard:
    """Watches losses and gradients; `check` raises `NonFiniteError` about the first bad step it saw.

    `watch` only queues work on the device and keeps what the first bad step looked like, so that the check
    may come many steps later and still name the cause.
    """

    def __init__(self, module: nn.Module):
        self._parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._bad_step: Tensor | None = None

    def watch(self, step: int, output: MetaOutput) -> None:
        """Called between `backward` and the optimizer's step with what that step's losses are."""
        task_loss, found = output.task_loss.detach(), torch.stack(self._found(output)).detach()
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, dtype=torch.int64, device=task_loss.device)
            self._losses, self._kept = task_loss.clone(), found
        first = (self._bad_step < 0) & ~found.isfinite().all()
        self._bad_step = torch.where(first, step, self._bad_step)
        if self._losses.shape == task_loss.shape:
            # Kept from the first bad step on; before that, overwritten every time.
            self._losses = torch.where(first | (self._bad_step < 0), task_loss, self._losses)
            self._kept = torch.where(first | (self._bad_step < 0), found, self._kept)

    def check(self) -> None:
        """Wait for the device and raise if any step that was watched was bad."""
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            self._raise(step, self._losses, self._kept.tolist())

    def check_now(self, step: int, output: MetaOutput) -> float:
        """`watch` and `check` of this step alone: wait for the device, and keep nothing. Returns the loss."""
        found = self._found(output)
        # a device is waited for once; on the CPU it takes longer to join them than to read each
        found = [one.item() for one in found] if output.loss.is_cpu else torch.stack(found).tolist()
        if not all(map(math.isfinite, found)):
            self._raise(step, output.task_loss.detach(), found)
        return found[0]

    def _found(self, output: MetaOutput) -> list[Tensor]:
        """The loss, and the norms of the gradients that there are. Norms, since squares that overflow would stay in
        Adam's second moments."""
        gradients = [p.grad for _, p in self._parameters if p.grad is not None]
        return [output.loss, *(torch._foreach_norm(gradients) if gradients else ())]

    def _raise(self, step: int, losses: Tensor, found: Sequence[float]) -> None:
        losses = losses.cpu()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        raise NonFiniteError(step, self._cause(losses, bad, found), bad)

    def finite_gradients(self) -> bool:
        """Whether the gradients that the parameters have are finite; waits for the device."""
        return all(bool(p.grad.isfinite().all()) for _, p in self._parameters if p.grad is not None)

    def check_weights(self, step: int) -> None:
        """Wait for the device and raise if a trained parameter is not finite, as after too large a step."""
        bad = [name for name, p in self._parameters if not p.isfinite().all()]
        if bad:
            raise NonFiniteError(step, f"the weights are not finite in {some(bad, 'parameter')}")

    def _cause(self, losses: Tensor, bad: list[int], found: Sequence[float]) -> str:
        if bad:
            value = float(losses[bad[0]])
            return f"the query loss is {_value(value)} in {some(bad, 'task')} of {losses.numel()}"
        if not math.isfinite(found[0]):
            return f"the loss is {_value(found[0])}, while the largest query loss is {float(losses.max()):.3g}"
        with_gradient = [name for name, p in self._parameters if p.grad is not None]
        names = [name for name, norm in zip(with_gradient, found[1:], strict=True) if not math.isfinite(norm)]
        still = f"while the query loss is still {found[0]:.4g}"
        return f"the meta-gradient is not finite in {some(names, 'parameter')}, {still}"


def _value(value: float) -> str:
    return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def some(items: list, noun: str, most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {', '.join(str(item) for item in items[:most])}{rest}"
