"""Implicit MAML: the meta-gradient at the solution of a regularised inner problem, however it was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmeta._trees import first, requires_grad

from ..engines import InnerLoop, Loss, module_engine
from ..engines.inspect import mlp_spec
from ..engines.layer_formulas import why_no_formulas
from ..engines.vmap import buffers_per_task
from ..functional.known_gradients import with_gradients
from ..functional.second_order import differentiate
from ._arguments import check_count, check_number
from ._gradients import gradient_of_tasks, mlp_gradients
from ._inner_loop import InnerLoopAlgorithm, detached_weights
from .output import MetaOutput, detached, judged, weighted


class ImplicitMAML(InnerLoopAlgorithm):
    """Implicit MAML (Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", algorithms 1
    and 2).

    Every task minimises `L_support(w) + regularization / 2 * |w - theta|^2` (their equation 3), here by `inner_steps`
    steps of gradient descent from the slow weights `theta`. At the minimum, the gradient of the query loss with respect
    to `theta` is `(I + H / regularization)^-1 grad L_query(w)`, with `H` the Hessian of the support loss (their
    equation 6). It is solved for by `cg_steps` steps of conjugate gradients, on Hessian-vector products of all tasks at
    once. So memory does not grow with `inner_steps`, and the steps themselves are never differentiated.

    `forward(batch).loss.backward()` leaves that gradient, which is computed during `forward`; it is exact only as far
    as the inner problem is solved, and cannot be differentiated again. Only the parameters get one: inputs may not
    require gradients. What `adapt` returns has no graph. Departure: the mean over tasks. The authors' code takes the
    regularisation's gradient in one last step alone and adds 10 to it in the linear system; here it is in every step,
    and `cg_damping` says what is added.

    Args:
        model: any module from examples `[B, ...]` to predictions `[B, C]`. Parameters with `requires_grad=False` are
            neither adapted nor trained. Batch norms see one task's rows.
        regularization: `lambda`, above 0; 2.0 by default, the paper's for Omniglot. Too small a value leaves the
            linear system indefinite, and conjugate gradients with it.
        inner_lr: step size in the inner loop, 0.01 by default; below `2 / (regularization + curvature)`.
        inner_steps: `K >= 0`, 16 by default. May be set anew between calls.
        cg_steps: at least 1, 5 by default, as in the paper.
        cg_damping: added to `regularization` in the linear system; 0 by default.
        loss: as in `MAML`.

    Raises:
        TypeError, ValueError: arguments out of range; inputs and targets that do not fit together, inputs that require
            gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        regularization: float = 2.0,
        inner_lr: float = 0.01,
        inner_steps: int = 16,
        cg_steps: int = 5,
        cg_damping: float = 0.0,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
    ):
        super().__init__(model, inner_steps=inner_steps, loss=loss, first_order=True)
        self.regularization = check_number("regularization", regularization, 0, open=True)
        self.inner_lr = check_number("inner_lr", inner_lr, 0)
        self.cg_steps = check_count("cg_steps", cg_steps, 1)
        self.cg_damping = check_number("cg_damping", cg_damping, 0)

    def extra_repr(self) -> str:
        return (
            f"regularization={self.regularization}, inner_lr={self.inner_lr}, inner_steps={self.inner_steps}, "
            f"cg_steps={self.cg_steps}, cg_damping={self.cg_damping}, loss={self.loss.name!r}"
        )

    def _adapted(self, inner: InnerLoop, support_x: Tensor, support_y: Tensor) -> dict[str, Tensor]:
        slow, trained = detached_weights(self.model)
        return slow | self._solve(inner.loss, trained, support_x, support_y)

    def _tasks(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, weights: Tensor | None
    ) -> MetaOutput:
        slow, trained = detached_weights(self.model)
        inner = self._inner(support_y, query_y)._replace(first_order=False)
        batch = support_x, support_y, query_x, query_y
        if why_no_formulas(self.model, support_x) is not None:
            engine = module_engine(self.model, inner, support_x, support_y)
            if self._in_turn(engine, *batch, weights):
                return self._chunked(1, batch, weights)
        loss = inner.loss
        fast = self._solve(loss, trained, support_x, support_y)
        if not torch.is_grad_enabled() or not fast:
            return weighted(judged(loss, self._predicted(slow | fast, query_x), query_y), weights)
        if any(part is not None and requires_grad(part) for part in (*batch, weights)):
            raise ValueError("batch: inputs, targets and weights that require gradients get none from implicit MAML")
        fast = {name: w.requires_grad_() for name, w in fast.items()}
        leaves = list(fast.values())
        output = weighted(judged(loss, self._predicted(slow | fast, query_x), query_y), weights)
        of_tasks = output.task_loss if weights is None else weights.detach() * output.task_loss
        of_loss = self._trained_by_loss()
        found = [torch.zeros_like(p) for p in (*leaves, *of_loss)]
        if of_tasks.requires_grad:
            found = torch.autograd.grad(of_tasks.sum(), [*leaves, *of_loss], materialize_grads=True)
        right, direct = found[: len(leaves)], found[len(leaves) :]
        damped = self.regularization + self.cg_damping
        support_gradients = self._gradients(loss, slow, fast, support_x, support_y)

        def derivative(vector: Tensor, at: list[Tensor]) -> Sequence[Tensor]:
            """Of the support gradients' products with `vector` `[T, P]`, summed over tasks."""
            parts = [part.view_as(w) for part, w in zip(vector.split(sizes, 1), leaves, strict=True)]
            live = [(g, part) for g, part in zip(support_gradients, parts, strict=True) if g.requires_grad]
            if not live:  # the support loss is linear in the weights
                return [torch.zeros_like(t) for t in at]
            found, along = zip(*live, strict=True)
            return torch.autograd.grad(found, at, along, retain_graph=True, materialize_grads=True)

        def times_matrix(vector: Tensor) -> Tensor:
            return vector + _flat(derivative(vector, leaves)) / damped

        sizes = [w[0].numel() if len(w) else 0 for w in leaves]
        solution = conjugate_gradients(times_matrix, _flat(right), self.cg_steps)
        means = solution.mean(0).split(sizes)
        named = dict(self.model.named_parameters())
        gradients = [mean.view_as(named[name]) for name, mean in zip(fast, means, strict=True)]
        if of_loss:  # the minimum moves with these by -(H + regularization I)^-1 d grad L_support
            through_minimum = derivative(solution / -damped, of_loss)
            gradients += [(g + m) / len(solution) for g, m in zip(direct, through_minimum, strict=True)]
        output = detached(output)
        parameters = [*(named[name] for name in fast), *of_loss]
        return output._replace(loss=with_gradients(output.loss, gradients, parameters))

    @torch.no_grad()
    def _solve(self, loss: Loss, start: Mapping[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Weights `[T, *shape]` after gradient descent on the regularised support loss from `start` `[*shape]`."""
        fast = {name: w.unsqueeze(0).repeat(len(first(x)), *[1] * w.dim()) for name, w in start.items()}
        weights = start  # shared in the first step: one dense product for all tasks
        for _ in range(self.inner_steps if start else 0):
            gradients = gradient_of_tasks(self.model, loss, weights, x, y)
            for name, w in fast.items():
                w.lerp_(start[name].expand_as(w), self.inner_lr * self.regularization)
                w.sub_(gradients[name], alpha=self.inner_lr)
            weights = fast
        return fast

    def _gradients(
        self, loss: Loss, slow: dict[str, Tensor], fast: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> list[Tensor]:
        """Support gradients `[T, *shape]` at `fast`, to be differentiated again."""
        if why_no_formulas(self.model, x) is None:
            return list(mlp_gradients(mlp_spec(self.model), loss, slow | fast, list(fast), x, y).values())
        # the gradient is taken outside of vmap: the tasks do not meet, and plain autograd is exact to second order
        steps = max(self.inner_steps, 1)  # a gradient is taken also where there are none
        inner = self._inner(y)._replace(steps=steps, first_order=False, loss=loss)
        engine = module_engine(self.model, inner, x, y)
        with engine.exact():
            losses = engine.losses(self.model, inner, fast, buffers_per_task(self.model, len(first(x))), x, y)
            wanted = list(fast.values())
            if not losses.requires_grad:
                return [torch.zeros_like(w) for w in wanted]
            return list(differentiate(losses.sum(), wanted, create_graph=True, materialize_grads=True))


@torch.no_grad()
def conjugate_gradients(times_matrix: Callable[[Tensor], Tensor], right: Tensor, steps: int) -> Tensor:
    """Solutions `[T, P]` of `T` symmetric positive definite systems with right sides `[T, P]`, from zero.

    `times_matrix` multiplies each task's vector with its matrix, `[T, P]` to `[T, P]`. A task whose residual has
    vanished stays as it is.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, squared = right.clone(), _dot(right, right)
    for _ in range(steps):
        product = times_matrix(direction)
        curvature = _dot(direction, product)
        length = torch.where(squared > 0, squared / curvature, torch.zeros_like(squared))
        solution = solution + length * direction
        residual = residual - length * product
        before, squared = squared, _dot(residual, residual)
        direction = residual + torch.where(before > 0, squared / before, torch.zeros_like(before)) * direction
    return solution


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def _flat(tensors) -> Tensor:
    return torch.cat([t.flatten(1) if t.dim() > 1 else t.unsqueeze(1) for t in tensors], 1)
