"""Finding the first non-finite loss or meta-gradient, without waiting for the device at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


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

    def watch(self, step: int, task_loss: Tensor) -> None:
        """Called between `backward` and the optimizer's step. `task_loss` `[T]` are the query losses of this
        step."""
        task_loss = task_loss.detach()
        norms = self._gradient_norms(task_loss)
        finite = task_loss.sum().isfinite() & norms.sum().isfinite()
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, dtype=torch.int64, device=task_loss.device)
            self._losses, self._norms = task_loss.clone(), norms
        first = (self._bad_step < 0) & ~finite
        self._bad_step = torch.where(first, step, self._bad_step)
        if self._losses.shape == task_loss.shape:
            # Kept from the first bad step on; before that, overwritten every time.
            self._losses = torch.where(first | (self._bad_step < 0), task_loss, self._losses)
            self._norms = torch.where(first | (self._bad_step < 0), norms, self._norms)

    def check(self) -> None:
        """Wait for the device and raise if any step that was watched was bad."""
        if self._bad_step is not None and (step := int(self._bad_step)) >= 0:
            self._raise(step, self._losses, self._norms)

    def check_now(self, step: int, task_loss: Tensor) -> None:
        """`watch` and `check` of this step alone: wait for the device, and keep nothing."""
        task_loss = task_loss.detach()
        norms = self._gradient_norms(task_loss)
        if not (math.isfinite(task_loss.sum().item()) and math.isfinite(norms.sum().item())):
            self._raise(step, task_loss, norms)

    def _gradient_norms(self, like: Tensor) -> Tensor:
        gradients = [p.grad for _, p in self._parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)) if gradients else like.new_zeros(0)

    def _raise(self, step: int, losses: Tensor, norms: Tensor) -> None:
        losses = losses.cpu()
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        raise NonFiniteError(step, self._cause(losses, bad, norms.cpu()), bad)

    def finite_gradients(self) -> bool:
        """Whether the gradients that the parameters have are finite; waits for the device."""
        return all(bool(p.grad.isfinite().all()) for _, p in self._parameters if p.grad is not None)

    def check_weights(self, step: int) -> None:
        """Wait for the device and raise if a trained parameter is not finite, as after too large a step."""
        bad = [name for name, p in self._parameters if not p.isfinite().all()]
        if bad:
            raise NonFiniteError(step, f"the weights are not finite in {some(bad, 'parameter')}")

    def _cause(self, losses: Tensor, bad: list[int], norms: Tensor) -> str:
        if bad:
            value = float(losses[bad[0]])
            return f"the query loss is {_value(value)} in {some(bad, 'task')} of {losses.numel()}"
        if not math.isfinite(float(losses.sum())):
            return f"the sum of the query losses overflows (the largest is {float(losses.max()):.3g})"
        with_gradient = [name for name, p in self._parameters if p.grad is not None]
        names = [name for name, norm in zip(with_gradient, norms.tolist(), strict=True) if not math.isfinite(norm)]
        what = some(names, "parameter") if names else "the sum over all parameters"
        return f"the meta-gradient is not finite in {what}, while the query loss is still {float(losses.mean()):.4g}"


def _value(value: float) -> str:
    return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def some(items: list, noun: str, most: int = 5) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {', '.join(str(item) for item in items[:most])}{rest}"
