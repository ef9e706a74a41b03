"""CAVIA: only a small context vector adapts to a task; all weights are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..engines import InnerLoop, as_loss
from ..engines._exact import gradients_per_task
from ..engines.inspect import mlp_spec
from ..engines.layerwise import _backward, _forward, _layers, why_no_formulas
from ..engines.vmap import _buffers_per_task
from ._adaptation import check_batch, check_count, check_number, judged, trained
from ._chunks import chunked_loss
from .maml import _check_pair
from .output import MetaOutput

if TYPE_CHECKING:
    from ..tasks import TaskBatch


class Context(NamedTuple):
    """What `CAVIA.adapt` returns: every task's context parameters, `[T, P]`."""

    context: Tensor


class CAVIA(nn.Module):
    """CAVIA (Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, "Fast Context Adaptation via Meta-Learning", section 3,
    algorithm 1).

    Every task has context parameters `phi`, which start at zero and take `inner_steps` steps
    `phi <- phi - inner_lr * grad_phi L_support(phi, theta)`; the weights `theta` are shared by all tasks and trained on
    the query loss at the adapted `phi`, second derivatives included. So no task has weights of its own, and every
    product is one over the rows of all tasks. Departures: none in the rule; the authors' code for regression also
    clamps each task's gradient to [-10, 10], which is left to the outer loop here.

    Args:
        model: with `concatenate`, a module from rows `[B, I + P]` to predictions `[B, C]`: the task's context stands
            behind each input. Without, one that is called with the examples `[B, ...]` of a task and its context
            `[P]`, such as `FiLMConv4`, and may use it where it likes. Batch norms see one task's rows, as in `MAML`.
        context_size: `P`, the number of context parameters; the paper has 2 to 5 for sinusoids, 100 for images.
        concatenate: whether the context joins the input; True by default.
        inner_lr: step size of the context, 1.0 by default, as in the paper.
        inner_steps: `K >= 0`, 1 by default; the paper has 1 for regression, 2 for images. May be set anew between
            calls.
        first_order: drop the second derivatives.
        loss: `"cross_entropy"`, `"mse"`, `"binary_cross_entropy"` (of logits), `"huber"`, or a callable
            `(prediction, target) -> scalar` for one task.
        task_chunk: at most this many tasks at a time, to bound memory; as in `MAML`.

    Multi-layer perceptrons run as batched formulas, other modules under `torch.func`.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together, inputs that are no
            rows where the context is to join them.
    """

    def __init__(
        self,
        model: nn.Module,
        context_size: int,
        *,
        concatenate: bool = True,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        first_order: bool = False,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        task_chunk: int | None = None,
    ):
        super().__init__()
        self.context_size = check_count("context_size", context_size, 1)
        self.inner_lr = check_number("inner_lr", inner_lr)
        self.inner_steps = check_count("inner_steps", inner_steps, 0)
        self.task_chunk = None if task_chunk is None else check_count("task_chunk", task_chunk, 1)
        self.model = model
        self.concatenate = concatenate
        self.first_order = first_order
        self.loss = as_loss(loss)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Context:
        """Context parameters of support sets `[T, S, ...]` with targets `[T, S]` or `[T, S, O]`."""
        _check_pair("support_x", support_x, "support_y", support_y)
        gradient = self._context_gradient(support_x, support_y)
        like = next(self.model.parameters(), support_x)
        context = like.new_zeros(support_x.shape[0], self.context_size)
        second_order = torch.is_grad_enabled() and not self.first_order
        for _ in range(self.inner_steps):
            with torch.set_grad_enabled(second_order):
                step = gradient(context)
            context = context - self.inner_lr * step
        return Context(context)

    def predict(self, state: Context, query_x: Tensor) -> Tensor:
        """Predictions `[T, Q, C]` for `query_x` `[T, Q, ...]`."""
        if query_x.shape[0] != len(state.context):
            raise ValueError(f"query_x has {query_x.shape[0]} tasks, state has {len(state.context)}")
        if self._is_mlp(query_x):
            spec = mlp_spec(self.model)
            layers = _layers(spec, dict(self.model.named_parameters()))
            return _forward(spec, *layers, self._joined(query_x, state.context))[2]
        weights, buffers = dict(self.model.named_parameters()), _buffers_per_task(self.model, query_x.shape[0])
        run = vmap(self._task, in_dims=(0, None, 0, 0), randomness="different")
        return run(state.context, weights, buffers, query_x)

    def forward(self, batch: TaskBatch) -> MetaOutput:
        """Adapt every task's context to its support set and judge on its query set."""
        check_batch(batch)
        if self.task_chunk is not None and batch[0].shape[0] > self.task_chunk:
            return chunked_loss(self._tasks, batch, self.task_chunk, trained(self))
        return self._tasks(*batch)

    def extra_repr(self) -> str:
        return (
            f"context_size={self.context_size}, concatenate={self.concatenate}, inner_lr={self.inner_lr}, "
            f"inner_steps={self.inner_steps}, first_order={self.first_order}, loss={self.loss.name!r}, "
            f"task_chunk={self.task_chunk}"
        )

    def _tasks(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> MetaOutput:
        return judged(self.loss, self.predict(self.adapt(support_x, support_y), query_x), query_y)

    def _joined(self, x: Tensor, context: Tensor) -> Tensor:
        """Rows `[T, B, I]` with their task's context behind each, `[T, B, I + P]`."""
        return torch.cat([x, context.unsqueeze(1).expand(-1, x.shape[1], -1)], -1)

    def _is_mlp(self, x: Tensor) -> bool:
        if not self.concatenate:
            return False
        if x.dim() != 3:
            raise ValueError(
                f"the context joins rows [T, B, I], got inputs of shape {list(x.shape)}: flatten them, or give a model "
                "that takes the context and concatenate=False"
            )
        spec, width = mlp_spec(self.model), x.shape[2] + self.context_size
        if isinstance(spec, str):
            return False
        if width != spec.in_features:
            raise ValueError(
                f"the model takes {spec.in_features} features, but an input has {x.shape[2]} and its context "
                f"{self.context_size}"
            )
        joined = x.new_empty(()).expand(*x.shape[:2], width)
        return why_no_formulas(self.model, InnerLoop(0.0, 0, False, self.loss), joined) is None

    def _context_gradient(self, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The function from contexts `[T, P]` to the gradient of each task's support loss `[T, P]`."""
        if self._is_mlp(x):
            spec = mlp_spec(self.model)
            weights, biases = _layers(spec, dict(self.model.named_parameters()))

            def formula(context: Tensor) -> Tensor:
                inputs, pre, prediction = _forward(spec, weights, biases, self._joined(x, context))
                self.loss.check(prediction.shape, y, "support_y")
                gradient = self.loss.gradient(prediction, self.loss.constant(y, prediction))
                first = _backward(spec, weights, inputs, pre, prediction, gradient)[0]
                return first.sum(1) @ weights[0][:, x.shape[2] :]

            return formula

        def task_loss(context, weights, buffers, x, y):
            prediction = self._task(context, weights, buffers, x)
            self.loss.check((1, *prediction.shape), y.unsqueeze(0), "support_y")
            return self.loss.one_task(prediction, y)

        weights = dict(self.model.named_parameters())

        def transformed(context: Tensor) -> Tensor:
            buffers = _buffers_per_task(self.model, x.shape[0])
            gradient = gradients_per_task(task_loss, (0, None, 0, 0, 0), second_order=torch.is_grad_enabled())
            return gradient(context, weights, buffers, x, y)

        return transformed

    def _task(self, context: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        """One task's predictions `[B, C]`."""
        if self.concatenate:
            args = (torch.cat([x, context.expand(x.shape[0], -1)], -1),)
        else:
            args = (x, context)
        return functional_call(self.model, (weights, buffers), args)


class FiLM(nn.Module):
    """Feature-wise modulation (Perez et al. 2018) by a task's context: `(1 + gamma) * h + beta` per channel, with
    `gamma` and `beta` linear in the context, so that a context of zeros changes nothing.

    Args:
        context_size: `P`.
        channels: of the features `[B, channels, ...]`.
    """

    def __init__(self, context_size: int, channels: int):
        super().__init__()
        self.modulation = nn.Linear(context_size, 2 * channels, bias=False)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """`h` `[B, channels, ...]`, `context` `[P]`."""
        gamma, beta = self.modulation(context).view(2, -1, *[1] * (h.dim() - 2))
        return (1 + gamma) * h + beta


class FiLMConv4(nn.Module):
    """The four-block network of few-shot image classification with FiLM after one block's batch norm (Zintgraf et al.
    2019, section 5.2: the third), for `CAVIA(..., concatenate=False)`.

    Each block is a 3x3 convolution, batch norm (of the rows at hand, in eval mode too), ReLU and 2x2 max-pooling; then
    a linear layer.

    Args:
        outputs: classes.
        context_size: `P`, 100 by default.
        in_channels: 1 by default.
        hidden: channels of every block, 32 by default.
        image_size: of the square images, 28 by default; at least 16.
        film_after: which block, 3 by default.
    """

    def __init__(
        self,
        outputs: int,
        context_size: int = 100,
        *,
        in_channels: int = 1,
        hidden: int = 32,
        image_size: int = 28,
        film_after: int = 3,
    ):
        super().__init__()
        if film_after not in range(1, 5):
            raise ValueError(f"film_after must be 1, 2, 3 or 4, got {film_after!r}")
        if image_size < 16:
            raise ValueError(f"image_size must be at least 16: four poolings halve it, got {image_size}")
        widths = (in_channels, hidden, hidden, hidden)
        self.film_after = film_after
        self.convolutions = nn.ModuleList(nn.Conv2d(width, hidden, 3, padding=1) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden, track_running_stats=False) for _ in widths)
        self.film = FiLM(context_size, hidden)
        self.head = nn.Linear(hidden * (image_size // 16) ** 2, outputs)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`[B, in_channels, image_size, image_size]` and `[P]` to `[B, outputs]`."""
        for block, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True), 1):
            x = norm(convolution(x))
            if block == self.film_after:
                x = self.film(x, context)
            x = nn.functional.max_pool2d(torch.relu(x), 2)
        return self.head(x.flatten(1))
