"""The meta-loss of many tasks in chunks, with the memory of one chunk.

Adding up chunk losses and calling `backward` once would keep every chunk's graph alive. Instead each chunk's
gradient is taken as soon as its loss is known, and the sum waits in an autograd node for `backward` to be
called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastmeta._trees import cat, first, kind, requires_grad, tree_map

from ..functional.known_gradients import with_gradients
from ._arguments import check_size
from ._auto_chunk import AUTO, AutoChunk
from .output import MetaOutput, detached, over_tasks, weighted


class ChunkedLearner(nn.Module):
    """What learners share that take tasks in chunks. `task_chunk` may be set anew between calls."""

    def __init__(self, task_chunk: int | str | None = None):
        super().__init__()
        self.task_chunk, self.auto_chunk = check_chunk(task_chunk), AutoChunk()

    def _in_chunks(self, batch: Sequence[Tensor], weights: Tensor | None = None) -> bool:
        """Whether `batch` is more than one chunk, or with "auto" may be."""
        tasks = len(first(batch[0]))
        if self.task_chunk != AUTO:
            return self.task_chunk is not None and tasks > self.task_chunk
        if tasks < 2 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        wanted = any(part is not None and requires_grad(part) for part in (*batch, weights))
        return not (wanted and torch.is_grad_enabled())

    def _over_chunks(self, size: int | str, batch: Sequence[Tensor], work: Callable[[int, int], None]) -> None:
        """`work(start, end)` for all tasks in order, `size` at a time."""
        like = first(batch[0])
        if size == AUTO:
            modes = torch.is_grad_enabled(), self.training, getattr(self, "inner_steps", None)
            name = repr((modes, [None if part is None else kind(part) for part in batch]))
            self.auto_chunk.over(name, len(like), work, self, like.device)
            return
        for start in range(0, len(like), size):
            work(start, min(start + size, len(like)))

    def _chunked_loss(
        self,
        run: Callable[..., MetaOutput],
        batch: Sequence[Tensor],
        weights: Tensor | None,
        size: int | str,
        parameters: list[Tensor],
        embedded: Tensor | None = None,
    ) -> MetaOutput:
        """`run(*batch, weights)`, `size` tasks at a time. `task_loss` and `logits` come back detached.

        embedded: `[T, ...]`, what was made of the batch for all tasks at once: `run(*batch, embedded, weights)`. The
        gradient goes on through it, to what made it.
        """
        differentiable = torch.is_grad_enabled() and bool(parameters)
        if differentiable and any(part is not None and requires_grad(part) for part in (*batch, weights)):
            raise ValueError("task_chunk: inputs that require gradients are not supported, use task_chunk=None")
        receivers = parameters
        if embedded is not None:
            leaf = embedded.detach().requires_grad_(differentiable and embedded.requires_grad)
            batch = (*batch, leaf)
            if leaf.requires_grad:
                parameters, receivers = [*parameters, leaf], [*parameters, embedded]

        def with_gradient(*parts: Tensor | None) -> tuple[MetaOutput, Sequence[Tensor | None]]:
            output, gradients = run(*parts), []
            if differentiable and output.loss.requires_grad:
                gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
            # Detached at once: a result that held on to its graph would keep the chunk in memory.
            return detached(output), gradients

        output, gradients = self._added_up(with_gradient, batch, weights, size, parameters)
        if not differentiable:
            return output
        return output._replace(loss=with_gradients(output.loss, gradients, receivers))

    def _added_up(
        self,
        run: Callable[..., tuple[MetaOutput, Sequence[Tensor | None]]],
        batch: Sequence[Tensor],
        weights: Tensor | None,
        size: int | str,
        parameters: Sequence[Tensor],
    ) -> tuple[MetaOutput, list[Tensor | None]]:
        """`run(*batch, weights)`, `size` tasks at a time, which gives an output without a graph and the gradients of
        its loss for `parameters`, or none of them."""
        num_tasks, outputs = len(first(batch[0])), []
        sums: list[Tensor | None] = [None] * len(parameters)

        def work(start: int, end: int) -> None:
            output, gradients = run(*(_some(part, start, end) for part in (*batch, weights)))
            share, fresh = (end - start) / num_tasks, list(sums)
            gradients = [None if g is None else g.to(_wide(g)) for g in gradients]
            for i, gradient in enumerate(gradients):
                if gradient is not None and sums[i] is None:
                    fresh[i] = gradient * share
            for total, gradient in zip(sums, gradients, strict=False):  # needs no memory: nothing fails half done
                if total is not None and gradient is not None:
                    total.add_(gradient, alpha=share)
            sums[:] = fresh
            outputs.append(output)

        self._over_chunks(size, batch, work)
        found = [None if g is None else g.to(p.dtype) for g, p in zip(sums, parameters, strict=True)]
        return weighted(joined(outputs), weights), found


def _wide(gradient: Tensor) -> torch.dtype:
    """What many of them are added up in: float32 at least."""
    return torch.promote_types(gradient.dtype, torch.float32)


def check_chunk(value: int | str | None) -> int | str | None:
    """`value`, if it is None, "auto", or an int of at least 1."""
    return AUTO if isinstance(value, str) and value == AUTO else check_size("task_chunk", value, or_none=True)


def _some(part: Tensor | None, start: int, end: int) -> Tensor | None:
    """The tasks from `start` to `end`."""
    return None if part is None else tree_map(lambda leaf: leaf[start:end], part)


def joined(outputs: Sequence[MetaOutput]) -> MetaOutput:
    """One result of those of several groups of tasks, the loss without weights."""

    def join(field: str) -> Tensor | None:
        parts = [getattr(output, field) for output in outputs]
        return None if parts[0] is None else cat(parts, 0, "the model's outputs for the tasks")

    return over_tasks(join("task_loss"), join("accuracy"), join("logits"))
