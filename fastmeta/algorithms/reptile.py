"""Reptile: move the slow weights towards where training on each task leads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta._trees import cat, first, split, tree_map

from ..engines import PLAIN, Adam, InnerLoop, Loss, Rule, Steps
from ..functional.known_gradients import with_gradients
from ._arguments import check_count, check_number
from ._gradients import gradient_of_tasks
from ._inner_loop import InnerLoopAlgorithm, detached_weights
from ._rows import Group, dense_batch, joined, row_counts_of
from .output import MetaOutput, judged, weighted

if TYPE_CHECKING:
    from ..tasks import TaskBatch

OPTIMIZERS = ("sgd", "adam")
ROWS = ("all", "support")
_ADAM = Rule(adam=Adam(betas=(0.0, 0.999)))


class Reptile(InnerLoopAlgorithm):
    """Reptile (Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithms 1 and 2).

    Every task's weights `w` start at the slow weights `phi` and take `inner_steps` steps of an ordinary optimiser on
    minibatches of the task's rows; then `phi <- phi + epsilon * mean_t(w_t - phi)`. There is no second derivative and
    no need for query rows. All tasks train at once, with per-task weights and batched products.

    The outer step is handed out as a gradient: `forward(batch).loss.backward()` leaves `phi - mean_t(w_t)` in the
    slow weights' `.grad` (times whatever multiplies the loss), so that `torch.optim.SGD` with rate `epsilon` is the
    paper's outer step, and any other optimiser may take it. It is *not* the gradient of the number that `loss` holds,
    the mean query loss at the fast weights, which is there to be watched. It cannot be differentiated again, and
    what `adapt` returns has no graph.

    `serial=True` is algorithm 1, a task at a time: each task starts from where the tasks before it in the batch have
    moved the slow weights, by `serial_rate` each; the gradient left is `phi - phi_after_all`, for SGD with rate 1. This
    is the one loop over tasks in this package, since each depends on the last; with one task per batch the two versions
    are the same.

    Departures: Adam's moments start anew in each task, where the authors' code keeps them from task to task, which
    tasks that train at once cannot. Mean over tasks as in the paper.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`. Parameters with `requires_grad=False` are
            neither adapted nor trained. Batch norms see one task's minibatch.
        inner_lr: rate of the inner optimiser, 1e-3 by default, the paper's for Omniglot.
        inner_steps: `K >= 0`, 5 by default; the paper evaluates with more, 50. May be set anew between calls.
        optimizer: `"adam"` (default; beta1 = 0, beta2 = 0.999, as in the paper) or `"sgd"`.
        batch_size: rows of a minibatch, 10 by default; None for all rows at each step. Every row is used once before
            any is used again; a task with fewer rows than that has some twice in a minibatch.
        train_on: what `forward` trains on in train mode: `"all"` rows of a task (default; the paper has no query rows
            in training), or its `"support"` rows. In eval mode always the support rows. With `"all"`, the loss and
            accuracy reported in train mode are those of rows that were trained on.
        serial: one task after another; False by default.
        serial_rate: `epsilon` of the serial version, 0.1 by default. May be set anew between calls.
        loss: as in `MAML`, but parameters of its own must be frozen.

    Minibatches are drawn by torch's global random state of the device in train mode; in eval mode they are the same
    at every call, and the same for all tasks.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 1e-3,
        inner_steps: int = 5,
        optimizer: str = "adam",
        batch_size: int | None = 10,
        train_on: str = "all",
        serial: bool = False,
        serial_rate: float = 0.1,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    ):
        super().__init__(model, inner_steps=inner_steps, loss=loss, first_order=True)
        self._refuse_loss_parameters()
        values.choice("optimizer", optimizer, OPTIMIZERS)
        values.choice("train_on", train_on, ROWS)
        self.inner_lr = check_number("inner_lr", inner_lr, 0)
        self.batch_size = None if batch_size is None else check_count("batch_size", batch_size, 1)
        self.serial_rate = check_number("serial_rate", serial_rate, 0)
        self.optimizer = optimizer
        self.train_on = train_on
        self.serial = values.flag("serial", serial)

    def extra_repr(self) -> str:
        serial = f", serial_rate={self.serial_rate}" if self.serial else ""
        return (
            f"inner_lr={self.inner_lr}, inner_steps={self.inner_steps}, optimizer={self.optimizer!r}, "
            f"batch_size={self.batch_size}, train_on={self.train_on!r}, serial={self.serial}{serial}, "
            f"loss={self.loss.name!r}"
        )

    def _refuse_loss_parameters(self) -> None:
        if self._trained_by_loss():
            raise ValueError(
                "loss has parameters or captures tensors that require gradients, and Reptile has none for them: its "
                "outer step is the way that the weights went; freeze them, or take an algorithm with a meta-gradient, "
                "such as MAML"
            )

    def _in_chunks(self, batch, weights: Tensor | None = None) -> bool:
        if self.serial and isinstance(self.task_chunk, int):
            raise ValueError("task_chunk: a serial Reptile takes one task after the other anyway, use task_chunk=None")
        return not self.serial and super()._in_chunks(batch, weights)

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        slow, trained = detached_weights(self.model)
        return slow | self._train(inner.loss, trained, support_x, support_y)

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        """Train on every task; the loss's `backward` leaves the outer step as a gradient."""
        x, y = self._training_rows(support_x, support_y, query_x, query_y)
        _check_detached(weights)
        self._refuse_loss_parameters()
        slow, trained = detached_weights(self.model)
        loss = self._inner(support_y, query_y).loss
        with torch.no_grad():
            if self.serial:
                of_tasks, moved = self._one_by_one(trained, zip(split(x, 1), split(y, 1), strict=True), weights)
                fast = {name: torch.cat([fast[name] for fast in of_tasks]) for name in trained}
            else:
                fast, moved = self._at_once(loss, trained, x, y, weights)
            output = weighted(judged(loss, self._predicted(slow | fast, query_x), query_y), weights)
        return self._handing_out(output, trained, moved)

    def _masked(self, batch: TaskBatch, weights: Tensor | None) -> MetaOutput:
        if not self.serial:
            return super()._masked(batch, weights)
        # each task is a group: they keep their order
        device, counts = first(batch.support_y).device, row_counts_of(batch)
        groups = [Group(torch.tensor([t], device=device), sizes) for t, sizes in enumerate(counts)]
        tasks = [dense_batch(batch, *group) for group in groups]
        _check_detached(weights)
        self._refuse_loss_parameters()
        slow, trained = detached_weights(self.model)
        with torch.no_grad():
            fast, moved = self._one_by_one(trained, (self._training_rows(*task) for task in tasks), weights)
            outputs = [
                judged(self._inner(support_y, query_y).loss, self._predicted(slow | own, query_x), query_y)
                for own, (_, support_y, query_x, query_y) in zip(fast, tasks, strict=True)
            ]
            output = weighted(joined(outputs, groups, batch.query_mask), weights)
        return self._handing_out(output, trained, moved)

    def _training_rows(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.training and self.train_on == "all":
            x = cat([support_x, query_x], 1, "support_x and query_x")
            return x, cat([support_y, query_y], 1, "support_y and query_y")
        return support_x, support_y

    def _handing_out(self, output: MetaOutput, start: dict[str, Tensor], moved: dict[str, Tensor]) -> MetaOutput:
        """The output whose loss's `backward` leaves the way from `moved` to the slow weights."""
        if not torch.is_grad_enabled() or not start:
            return output
        named = dict(self.model.named_parameters())
        gradients = [start[name] - w for name, w in moved.items()]
        return output._replace(loss=with_gradients(output.loss, gradients, [named[name] for name in moved]))

    def _at_once(self, loss: Loss, slow: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor | None):
        """Fast weights `[T, *shape]`, and where the slow weights are to go: each task pulls as its weight says."""
        fast = self._train(loss, slow, x, y)
        if weights is None:
            return fast, {name: w.mean(0) for name, w in fast.items()}
        shares = weights / len(weights)
        return fast, {n: slow[n] + torch.tensordot(shares.to(w.dtype), w - slow[n], 1) for n, w in fast.items()}

    def _one_by_one(
        self, slow: dict[str, Tensor], rows: Iterable[tuple[Tensor, Tensor]], weights: Tensor | None
    ):
        """Fast weights `[1, *shape]` of each task, whose rows are `[1, B, ...]`, and where the slow weights are to
        go."""
        moved, fasts = dict(slow), []
        for task, (x, y) in enumerate(rows):
            fasts.append(self._train(self._inner(y).loss, moved, x, y))
            rate = self.serial_rate if weights is None else self.serial_rate * float(weights[task])
            moved = {name: w.lerp(fasts[-1][name][0], rate) for name, w in moved.items()}
        return fasts, moved

    @torch.no_grad()
    def _train(self, loss: Loss, start: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Weights `[T, *shape]` after `inner_steps` steps from `start` `[*shape]`."""
        like = first(x)
        tasks = len(like)
        fast = {name: w.unsqueeze(0).repeat(tasks, *[1] * w.dim()) for name, w in start.items()}
        order = self._order(tasks, like.shape[1], like.device)
        steps, weights = Steps(self.inner_lr, _ADAM if self.optimizer == "adam" else PLAIN), start
        for step in range(self.inner_steps if fast else 0):
            batch = (x, y) if order is None else (_take(x, order[step]), _take(y, order[step]))
            weights = fast = steps.take(fast, gradient_of_tasks(self.model, loss, weights, *batch))
        return fast

    def _order(self, tasks: int, rows: int, device: torch.device) -> Tensor | None:
        """Which rows each step takes, `[K, T, batch_size]`; None for all."""
        if self.batch_size is None or rows == 0:
            return None
        needed = self.inner_steps * self.batch_size
        rounds = -(-needed // rows)
        if self.training:
            keys = torch.rand(tasks, rounds, rows, device=device)
        else:  # an evaluation must not depend on what was drawn before, nor a task on its neighbours
            generator = torch.Generator(device).manual_seed(0)
            keys = torch.rand(1, rounds, rows, device=device, generator=generator).expand(tasks, -1, -1)
        order = keys.argsort(-1).flatten(1)[:, :needed]
        return order.unflatten(1, (self.inner_steps, self.batch_size)).transpose(0, 1)


def _check_detached(weights: Tensor | None) -> None:
    if torch.is_grad_enabled() and weights is not None and weights.requires_grad:
        raise ValueError("weights: those that require gradients get none from Reptile")


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[T, B, ...]` of `x` `[T, N, ...]` by `index` `[T, B]`."""
    return tree_map(lambda leaf: leaf[torch.arange(len(leaf), device=leaf.device).unsqueeze(1), index], x)
