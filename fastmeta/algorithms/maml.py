"""Model-agnostic meta-learning: learn the weights that a few gradient steps adapt best."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dispatch.library import plain_call
from ..engines import InnerLoop, as_loss, choose, explain
from ..engines.fused import FusedEngine
from ..engines.inspect import inspected
from ..engines.select import check_name
from ._chunks import chunked_loss
from ._direct import DirectGradient, direct_gradient
from .output import MetaOutput, judged

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class FastWeights:
    """What `MAML.adapt` returns: the adapted parameters of `T` tasks.

    `state[t]` is task `t`'s own `{name: tensor}`, ready for `torch.func.functional_call(model, state[t],
    (x,))`; `state.stacked()` holds all tasks, `[T, *shape]` per name; `len(state)` is `T`. Parameters that no
    step has changed (`inner_steps=0`, or frozen by `requires_grad=False`) are stored once and expanded on
    reading.
    """

    def __init__(self, weights: dict[str, Tensor], shared: frozenset[str], num_tasks: int):
        self.weights = weights
        self.shared = shared
        self.num_tasks = num_tasks

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, task: int) -> dict[str, Tensor]:
        if not -self.num_tasks <= task < self.num_tasks:
            raise IndexError(f"task {task} of {self.num_tasks}")
        return {name: w if name in self.shared else w[task] for name, w in self.weights.items()}

    def stacked(self) -> dict[str, Tensor]:
        """All tasks' parameters, `[T, *shape]` by name."""
        return {
            name: w.expand(self.num_tasks, *w.shape) if name in self.shared else w for name, w in self.weights.items()
        }

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(w.shape)}" for name, w in self.stacked().items())
        return f"FastWeights({self.num_tasks} tasks: {shapes})"


class MAML(nn.Module):
    """MAML (Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    algorithm 1 and 2).

    Every task starts at the slow weights and takes `inner_steps` steps `w <- w - inner_lr * grad
    L_support(w)` (their equation in section 2.2); `forward` returns the mean query loss at the weights so
    reached, whose gradient with respect to the slow weights is the meta-gradient of their equation 1, second
    derivatives included; `gradients` returns both. `first_order=True` treats the inner gradients as constants
    (first-order MAML, their section 5.2). Departures: the mean over tasks, where the paper sums (scale the outer
    rate), and all tasks at once.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`; used as it is, and its parameters
            are the slow weights. Parameters with `requires_grad=False` are neither adapted nor trained.
        inner_lr: step size in the inner loop, 0.01 by default.
        inner_steps: `K >= 0`; 0 is ordinary training on the query sets. May be set anew between calls.
        first_order: drop the second derivatives.
        loss: `"cross_entropy"` (labels int64 `[T, B]`); `"mse"`, `"binary_cross_entropy"` (of logits) or `"huber"`
            (square below 1), with targets `[T, B, O]`; or a callable `(prediction, target) -> scalar` for one task.
        engine: `"auto"`, or one by name (`explain` lists them). An engine asked for by name that cannot serve
            the model raises ValueError.
        task_chunk: at most this many tasks at a time, to bound memory; None for all at once. The gradient is
            the same. With gradients on, each chunk's gradient is then computed during `forward` and handed
            out by `backward`, so only `loss` is differentiable, once, and only with respect to the
            parameters; inputs may not require gradients.

    Evaluate under `torch.no_grad()`: adaptation still happens, without any graph for the outer loop. Batch
    norm uses each task's own rows in train mode; what it does in eval mode is said in
    `fastmeta/engines/vmap.py`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        engine: str = "auto",
        task_chunk: int | None = None,
    ):
        super().__init__()
        check_name(engine)
        if isinstance(inner_lr, bool) or not isinstance(inner_lr, (int, float)):
            raise TypeError(f"inner_lr must be a number, got {type(inner_lr).__name__}")
        if isinstance(inner_steps, bool) or not isinstance(inner_steps, int):
            raise TypeError(f"inner_steps must be an int, got {type(inner_steps).__name__}")
        if inner_steps < 0:
            raise ValueError(f"inner_steps must be at least 0, got {inner_steps}")
        if task_chunk is not None and (
            isinstance(task_chunk, bool) or not isinstance(task_chunk, int) or task_chunk < 1
        ):
            raise ValueError(f"task_chunk must be None or an int of at least 1, got {task_chunk!r}")
        self.model = model
        self.inner_lr = float(inner_lr)
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.loss = as_loss(loss)
        self.engine = engine
        self.task_chunk = task_chunk
        self._direct: DirectGradient | None = None  # the last one, for the next call

    def adapt(self, support_x: Tensor, support_y: Tensor) -> FastWeights:
        """Run the inner loop on support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`."""
        _check_pair("support_x", support_x, "support_y", support_y)
        inner = self._inner(support_y)
        weights = choose(self.engine, self.model, inner, support_x).adapt(self.model, inner, support_x, support_y)
        slow = dict(self.model.named_parameters())
        shared = frozenset(name for name, w in weights.items() if w.dim() == slow[name].dim())
        return FastWeights(weights, shared, support_x.shape[0])

    def predict(self, state: FastWeights, query_x: Tensor) -> Tensor:
        """Predictions `[T, Q, C]` of the adapted weights for `query_x` `[T, Q, ...]`."""
        if query_x.shape[0] != len(state):
            raise ValueError(f"query_x has {query_x.shape[0]} tasks, state has {len(state)}")
        return choose(self.engine, self.model, self._inner(), query_x).predict(self.model, state.weights, query_x)

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Adapt to every task's support set and judge on its query set."""
        _check_batch(*batch)
        if self._in_chunks(batch):
            return chunked_loss(self._tasks, batch, self.task_chunk, [p for p in self.parameters() if p.requires_grad])
        return self._tasks(*batch)

    def gradients(self, batch: TaskBatch) -> tuple[MetaOutput, dict[str, Tensor]]:
        """What `forward` returns, detached, and the gradient of its loss: `{name: gradient}` for every parameter of
        `named_parameters()` that requires one. Equal to `torch.autograd.grad` of the loss, and for few small tasks much
        faster: where a kernel finds both at once no graph is made. Nothing is added to `parameter.grad`.

        Raises:
            ValueError: as `forward`; with `task_chunk` inputs may not require gradients.
        """
        inner = self._inner(batch[1], batch[3])
        if not self._in_chunks(batch) and plain_call(batch) and not any(t.requires_grad for t in batch):
            if self._direct is None or not self._direct.holds(self.model, inner, batch):
                _check_batch(*batch)
                with inspected(self.model):
                    self._direct = direct_gradient(self.engine, self.model, inner, batch, "model.")
            if self._direct is not None:
                return self._direct.run(batch)
        with torch.enable_grad():
            output = self(batch)
        wanted = {name: p for name, p in self.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(output.loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        output = MetaOutput(*(None if field is None else field.detach() for field in output))
        return output, dict(zip(wanted, found, strict=True))

    def explain(self, batch: TaskBatch) -> str:
        """Which engine serves this batch and why the others do not, as readable text. Runs nothing."""
        return explain(self.engine, self.model, self._inner(batch[1], batch[3]), batch[0])

    def extra_repr(self) -> str:
        return (
            f"inner_lr={self.inner_lr}, inner_steps={self.inner_steps}, first_order={self.first_order}, "
            f"loss={self.loss.name!r}, engine={self.engine!r}, task_chunk={self.task_chunk}"
        )

    def _inner(self, *targets: Tensor) -> InnerLoop:
        differentiable = torch.is_grad_enabled() and any(target.requires_grad for target in targets)
        return InnerLoop(self.inner_lr, self.inner_steps, self.first_order, self.loss, differentiable)

    def _in_chunks(self, batch: TaskBatch) -> bool:
        return self.task_chunk is not None and batch[0].shape[0] > self.task_chunk

    def _tasks(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> MetaOutput:
        inner = self._inner(support_y, query_y)
        with inspected(self.model):
            engine = choose(self.engine, self.model, inner, support_x)
            if isinstance(engine, FusedEngine):
                (task_loss, logits), mean = engine.meta_loss(self.model, inner, support_x, support_y, query_x, query_y)
                return judged(self.loss, logits, query_y, task_loss, mean)
            logits = engine.query(self.model, inner, support_x, support_y, query_x)
            return judged(self.loss, logits, query_y)


def _check_batch(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
    _check_pair("support_x", support_x, "support_y", support_y)
    _check_pair("query_x", query_x, "query_y", query_y)
    if support_x.shape[0] != query_x.shape[0]:
        raise ValueError(f"support_x has {support_x.shape[0]} tasks, query_x has {query_x.shape[0]}")


def _check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    if x.dim() < 2 or y.dim() < 2 or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"{x_name} and {y_name} must begin with the same tasks and examples, [T, B, ...], "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
