"""The meta-gradient of any loss of any functional model, by a reverse sweep over the inner steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta import values

from . import checks
from .known_gradients import with_gradients
from .parameter_tree import ParameterTree, lr_gradient, rates_of_steps
from .reverse_sweep import InnerLoop


class MetaGradient(NamedTuple):
    """What `meta_gradient` returns. No tensor in it has a graph."""

    loss: Tensor  # [], the outer loss after K steps
    gradient: Any  # structure of params; None at what does not adapt
    lr_gradient: Any  # structure of lr; None at what requires no gradient
    also_gradient: Any  # structure of also
    params: Any  # structure of params, after K steps
    inner_losses: Tensor  # [K], the inner loss before each step
    aux: Any  # what outer_loss returned beside its loss


def meta_gradient(
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[..., Any],
    params: Any,
    *,
    lr: Any,
    steps: int,
    inner_args: tuple = (),
    outer_args: tuple = (),
    batches: Sequence[tuple] | None = None,
    also: Any = (),
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    first_order: bool = False,
    every: int = 1,
    has_aux: bool = False,
    preserve_rng_state: bool = True,
) -> MetaGradient:
    """The gradient of `outer_loss` after `steps` steps of gradient descent on `inner_loss`, exact to rounding, with the
    memory of one step.

    For one task and any model in functional form::

        def loss(params, x, y):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

        found = meta_gradient(loss, loss, dict(model.named_parameters()), lr=0.01, steps=5,
                              inner_args=(support_x, support_y), outer_args=(query_x, query_y))

    That of MAML (Finn, Abbeel, Levine 2017, equation 1), which plain autograd finds with a graph of all steps. Here the
    steps run without a graph, and a Hessian-vector product of one step after the other, last first, leads back through
    them: the reverse mode of Franceschi et al. 2017 ("Forward and Reverse Gradient-Based Hyperparameter Optimization",
    algorithm 1) and Maclaurin et al. 2015, with checkpoints (Griewank 1992) in place of reversed steps. Each inner loss
    is computed twice, with the same random numbers. The same arguments give the same bits again wherever the losses'
    own kernels do.

    Args:
        inner_loss: `inner_loss(params, *inner_args)`, a floating tensor with one element: what step `k` descends; with
            `batches`, `inner_loss(params, *inner_args, *batches[k])`. It is plain PyTorch and may do all that autograd
            can differentiate twice. Since it is called again, it must give the same again: data are drawn and augmented
            before; buffers that it writes, such as a batch norm's running statistics, are written twice. A model that
            checkpoints activations is called by `fastmeta.functional.functional_call`.
        outer_loss: `outer_loss(params, *outer_args)`, the same of the adapted parameters; called once.
        params: a tensor or any pytree of them, of any shapes. Floating tensors that require a gradient adapt; all else
            is handed to the losses as it is. A tensor in several places is one parameter. The parameters themselves,
            their `.grad` and any graph behind them stay untouched.
        lr: a float; a tensor with one element; `[K]`, a rate for each step; or the structure of `params` with, for each
            parameter, a float or a tensor that broadcasts against its `[*shape]` (a rate per tensor, per row, per
            element: Meta-SGD), or, with one dimension more, `[K, ...]`, against `[K, *shape]` (per step and tensor:
            MAML++). Tensors that require a gradient get one.
        steps: `K`, 0 or more.
        inner_args, outer_args: what the losses take after the parameters.
        batches: for each step a tuple of further arguments, where steps have data of their own.
        also: a tensor or any pytree of them, whose gradients are wanted too: what the losses depend on beside
            `params`, as arguments or by closure. Slow weights that do not adapt, a loss's own parameters, features of
            an encoder; or the parameters before the first step in a proximal term. Each must require a gradient, and
            none may be computed from another; of what is computed before the call, name the result.
        momentum, weight_decay: as of `torch.optim.SGD`: `m <- momentum * m + gradient + weight_decay * w`,
            `w <- w - lr * m`, from `m = 0`.
        first_order: takes the inner gradients for constants (first-order MAML). Needs neither second derivatives nor,
            unless `lr` requires a gradient, a second pass.
        every: keeps the parameters before each `every`-th step and computes those between once more, so that at most
            `K / every + every` sets of them are held. 1 computes least, about `sqrt(K)` holds least.
        has_aux: `outer_loss` returns `(loss, aux)`, such as the query rows' logits; `aux` comes back without its graph.
        preserve_rng_state: gives an inner loss the random numbers of its first call when it is called again (dropout):
            those of torch's own generators, on the CPU and the parameters' devices. False saves a few microseconds a
            step where there are none.

    Returns:
        `MetaGradient(loss, gradient, lr_gradient, also_gradient, params, inner_losses, aux)`. Gradients have the shape,
        dtype and structure of what they belong to, zeros where nothing depends on it, None where no gradient is wanted.
        NaN and infinities pass as in plain autograd; `inner_losses` tells the step where they began.

    Raises:
        TypeError: an argument of the wrong type; a loss that is no floating tensor.
        ValueError: nothing in `params` adapts; an `lr` that does not fit; a loss with several elements, or which does
            not depend on the parameters that it is given.
        RuntimeError: `inner_loss` gave something else when it was called again; something that cannot be differentiated
            twice (modules compiled by `torch.compile` cannot); a part that is checkpointed under
            `torch.func.functional_call`; under transforms of `torch.func`.
    """
    return _run(
        inner_loss, outer_loss, params, lr=lr, steps=steps, inner_args=inner_args, outer_args=outer_args,
        batches=batches, also=also, momentum=momentum, weight_decay=weight_decay, first_order=first_order,
        every=every, has_aux=has_aux, preserve_rng_state=preserve_rng_state, sweep=True,
    )  # fmt: skip


def meta_loss(
    inner_loss: Callable[..., Tensor],
    outer_loss: Callable[..., Any],
    params: Any,
    *,
    lr: Any,
    steps: int,
    also: Any = (),
    has_aux: bool = False,
    **options,
) -> Tensor | tuple[Tensor, Any]:
    """`meta_gradient` for autograd: the outer loss, whose `backward` leaves the meta-gradients where they belong.

    They reach the parameters in `params`, `lr` and `also`, and through those that are no leaves what they were computed
    from (an encoder, a hypernetwork, the logarithm of a rate). They are found in this call and wait in the loss: for
    several tasks call `backward` once for each, and the memory is that of one task. Under `torch.no_grad` the steps
    alone run.

    Args:
        inner_loss, outer_loss, params, lr, steps, also, has_aux: as in `meta_gradient`.
        options: the other arguments of `meta_gradient`.

    Returns:
        The outer loss `[]`, which can be differentiated once; with `has_aux`, `(loss, aux)`.

    Raises:
        TypeError, ValueError, RuntimeError: as `meta_gradient`.
    """
    call = meta_gradient.__kwdefaults__ | dict(options, lr=lr, steps=steps, also=also, has_aux=has_aux)
    differentiable = torch.is_grad_enabled()
    found = _run(inner_loss, outer_loss, params, **call, sweep=differentiable)
    loss = found.loss
    if differentiable:
        trees = ((params, found.gradient), (lr, found.lr_gradient), (also, found.also_gradient))
        tensors, gradients = zip(*(pair for tree, of_tree in trees for pair in _pairs(tree, of_tree)), strict=True)
        loss = with_gradients(loss, gradients, tensors)
    return (loss, found.aux) if has_aux else loss


def _pairs(tree: Any, gradients: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Each tensor of `tree` that has a gradient, once: in several places, it has the whole of it at each."""
    pairs = zip(pytree.tree_leaves(tree), pytree.tree_leaves(gradients), strict=True)
    return {id(tensor): (tensor, gradient) for tensor, gradient in pairs if gradient is not None}.values()


def _run(
    inner_loss, outer_loss, params, *, lr, steps, inner_args, outer_args, batches, also, momentum, weight_decay,
    first_order, every, has_aux, preserve_rng_state, sweep,
) -> MetaGradient:  # fmt: skip
    """`meta_gradient`; without `sweep` only what lies ahead of the gradients, which are None."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("meta_gradient and meta_loss cannot run under transforms of torch.func: call them outside")
    values.function("inner_loss", inner_loss)
    values.function("outer_loss", outer_loss)
    values.count("steps", steps, 0)
    values.count("every", every)
    momentum, weight_decay = values.number("momentum", momentum, 0), values.number("weight_decay", weight_decay, 0)
    for name, flag in (("first_order", first_order), ("has_aux", has_aux), ("preserve_rng_state", preserve_rng_state)):
        values.flag(name, flag)
    _check_arguments(steps, inner_args, outer_args, batches)
    adapting = ParameterTree(params)
    aux = None

    def inner(weights: list[Tensor], step: int) -> Tensor:
        data = () if batches is None else batches[step]
        return _scalar("inner_loss", inner_loss(adapting.tree(weights), *inner_args, *data))

    def outer(weights: list[Tensor]) -> Tensor:
        nonlocal aux
        loss = outer_loss(adapting.tree(weights), *outer_args)
        if has_aux:
            if not isinstance(loss, tuple) or len(loss) != 2:
                raise TypeError(f"outer_loss must return (loss, aux) with has_aux, got {type(loss).__name__}")
            loss, aux = loss[0], pytree.tree_map_only(Tensor, Tensor.detach, loss[1])
        return _scalar("outer_loss", loss)

    with torch.inference_mode(False), torch.enable_grad():
        slow = _also(also)
        rates = rates_of_steps(lr, steps, adapting)
        loop = InnerLoop(
            inner, rates, momentum=momentum, weight_decay=weight_decay, first_order=first_order, every=every,
            preserve_rng_state=preserve_rng_state,
        )  # fmt: skip
        weights = loop.adapt(adapting.tensors, sweep=sweep)
        swept = None
        if sweep:
            loss, adjoint, also_adjoint = loop.outer_gradient(outer, weights, slow)
            swept = loop.sweep(adjoint, slow, also_adjoint)
            of_also = [torch.zeros_like(t) if g is None else g for t, g in zip(slow, swept.also_gradients, strict=True)]
        else:
            with torch.no_grad():
                loss = outer(weights)
    return MetaGradient(
        loss,
        swept and adapting.tree(swept.gradients, rest=False),
        swept and lr_gradient(lr, swept.rate_gradients),
        swept and pytree.tree_unflatten(of_also, pytree.tree_structure(also)),
        adapting.tree(weights),
        torch.stack(loop.losses) if loop.losses else loss.new_zeros(0),
        aux,
    )


def _also(also: Any) -> list[Tensor]:
    with_paths, _ = pytree.tree_flatten_with_path(also)
    tensors = []
    for path, tensor in with_paths:
        name = "also" + pytree.keystr(path)
        checks.tensor_of_any_shape(name, tensor)
        if not tensor.requires_grad:
            raise ValueError(f"{name} must require a gradient: call requires_grad_(), or leave it out")
        tensors.append(tensor)
    for (path, _), tensor in zip(with_paths, tensors, strict=True):
        others = [t for t in tensors if t is not tensor]
        if tensor.grad_fn is not None and others:
            through = torch.autograd.grad(tensor.sum(), others, retain_graph=True, allow_unused=True)
            if any(g is not None for g in through):
                raise ValueError(
                    f"also{pytree.keystr(path)} is computed from another tensor in it, whose gradient would count "
                    "twice: leave that one out, and hand the gradient on to it by hand, or use meta_loss, which does"
                )
    return tensors


def _scalar(name: str, loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        what = str(loss.dtype) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"{name} must return a floating tensor with one element, got {what}")
    if loss.numel() != 1:
        raise ValueError(f"{name} must return a tensor with one element, got shape {list(loss.shape)}")
    return loss.reshape(())


def _check_arguments(steps: int, inner_args: Any, outer_args: Any, batches: Any) -> None:
    if batches is not None:
        if not isinstance(batches, Sequence):  # each is used twice
            raise TypeError(f"batches must be a list of tuples, one for each step, got {type(batches).__name__}")
        if len(batches) != steps:
            raise ValueError(f"batches must hold a tuple for each of the {steps} steps, got {len(batches)}")
    of_steps = {f"batches[{i}]": batch for i, batch in enumerate(batches or ())}
    for name, value in {"inner_args": inner_args, "outer_args": outer_args, **of_steps}.items():
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name} must be a tuple of arguments, got {type(value).__name__}")
