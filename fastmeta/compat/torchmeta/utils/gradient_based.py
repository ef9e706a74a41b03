"""One inner step of gradient descent, and the parameters of many tasks to take it from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from fastmeta.compat.torchmeta.modules import MetaModule
from fastmeta.functional.second_order import differentiate

__all__ = ["gradient_update_parameters", "task_parameters"]


def gradient_update_parameters(
    model: MetaModule,
    loss: Tensor,
    params: Mapping[str, Tensor] | None = None,
    step_size: float | Tensor | Mapping[str, float | Tensor] = 0.5,
    first_order: bool = False,
) -> OrderedDict[str, Tensor]:
    """The parameters after one step, `p - step_size * d loss / d p`, differentiable.

    Args:
        model: says which parameters are adapted, where `params` does not.
        loss: one element.
        params: of the step before, by name; None (default) for `model.meta_named_parameters()`.
        step_size: a number, a tensor, or a dict of these by the names of `params`. Default 0.5.
        first_order: take the gradient for a constant. Default False.

    Returns:
        The new parameters, by the names of `params` and in their order.

    Raises:
        ValueError: `model` is no `MetaModule`.
        RuntimeError: from autograd, where `loss` does not depend on one of the parameters.
    """
    _check(model)
    if params is None:
        params = OrderedDict(model.meta_named_parameters())
    gradients = differentiate(loss, tuple(params.values()), create_graph=not first_order)
    by_name = isinstance(step_size, Mapping)
    return OrderedDict(
        (name, value - (step_size[name] if by_name else step_size) * gradient)
        for (name, value), gradient in zip(params.items(), gradients, strict=True)
    )


def task_parameters(model: MetaModule, num_tasks: int) -> OrderedDict[str, Tensor]:
    """The meta-parameters with a task dimension, `[T, *shape]`, as views: where the inner loops of all tasks begin.

    Not in torchmeta. A loop over tasks becomes one pass: `model(x, params=params)` for `x` `[T, S, ...]`, and
    `gradient_update_parameters` of the sum of the tasks' losses, in which each task's parameters are its own. The
    layers of `modules` take such parameters; a model with others goes as it is into `fastmeta.MAML`.

    Raises:
        ValueError: `model` is no `MetaModule`.
    """
    _check(model)
    return OrderedDict((name, value.expand(num_tasks, *value.shape)) for name, value in model.meta_named_parameters())


def _check(model: MetaModule) -> None:
    if not isinstance(model, MetaModule):
        raise ValueError(f"model must be a MetaModule, got {type(model)}")
