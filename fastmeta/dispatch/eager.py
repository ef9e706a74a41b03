"""An op for plain tensors in eager mode, and gradients that a kernel has found together with its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch import backends
from fastmeta.dispatch.arguments import flat_outputs, lifted, saved
from fastmeta.dispatch.constants import filled
from fastmeta.dispatch.spec import OpSpec


def plain_function(spec: OpSpec) -> type[torch.autograd.Function]:
    """The op as an `autograd.Function` for plain tensors in eager mode.

    What each input costs autograd adds up to more than a small kernel takes: inputs are only those tensors that need
    gradients, without views of them.
    """
    extras = 6  # inputs before the tensors

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, structure, args, tensors, wanted, wants_mean, weights, *needing):
            ctx.save_for_backward(*tensors)
            ctx.structure, ctx.wanted = structure, wanted
            args = lifted(spec, args)
            found = None
            if spec.with_gradient or spec.lacks_gradients:
                ctx.set_materialize_grads(False)
            if spec.with_gradient:
                ctx.scale = mean_gradient(tensors[0], weights)
                found = backends.run_with_gradient(spec, args, _needs_of(wanted), wants_mean, ctx.scale)
            outputs, ctx.known = found or (backends.run(spec, args), None)
            outputs = structure.split_outputs(outputs)
            if spec.differentiable_outputs is not None:
                ctx.mark_non_differentiable(*outputs[spec.differentiable_outputs :])
            ctx.averaged = len(outputs[0]) if wants_mean else None
            return (*outputs, mean_of(outputs[0], weights)) if wants_mean else outputs

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * (extras + len(ctx.wanted))
            wanted = [w if n else (None, 0, 0) for w, n in zip(ctx.wanted, ctx.needs_input_grad[extras:], strict=True)]
            *grads, of_mean = grads if ctx.averaged is not None else (*grads, None)
            found = _known_gradients(ctx, spec, grads, of_mean) if spec.with_gradient else None
            if found is None:
                if of_mean is not None:
                    each = (of_mean * ctx.scale).expand(ctx.averaged)
                    grads[0] = each if grads[0] is None else grads[0] + each
                found = spec.backward(lifted(spec, saved(ctx)), ctx.structure.nest(grads), _needs_of(wanted))
            return *(None,) * extras, *(_gradient(found, *w) for w in wanted)

    Function.__name__ = Function.__qualname__ = f"fastmeta_{spec.name}"
    return Function


def _needs_of(wanted) -> int:
    needs = 0
    for bit, *_ in wanted:
        needs |= 0 if bit is None else 1 << bit
    return needs


def _gradient(found, bit: int | None, index: int | None, dims: int) -> Tensor | None:
    """That of one tensor, which may have come without its task dimension."""
    if bit is None:
        return None
    gradient = found[bit] if index is None else found[bit][index]
    return gradient if gradient is None or gradient.dim() == dims else gradient.squeeze(0)


def mean_gradient(of_tasks: Tensor, weights: Tensor | None = None) -> Tensor:
    """That of the mean of one loss for each task of `of_tasks` `[T, ...]`: `[1]`, or with `weights` `[T]` as long."""
    each = filled(of_tasks, (1,), 1 / max(len(of_tasks), 1))
    return each if weights is None else weights * each


def mean_of(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (weights * losses).mean()


def _known_gradients(ctx, spec: OpSpec, grads, of_mean: Tensor | None) -> tuple | None:
    """Those found with the outputs, for the mean of the first; None where that does not tell what is asked for, or
    where the gradients are to be differentiated again."""
    first, *others = grads
    known, ctx.known = ctx.known, None  # once: the caller may write into them
    if known is None or torch.is_grad_enabled() or any(g is not None for g in others):
        return None
    if of_mean is not None:
        return _scaled(known, of_mean) if first is None else None
    if first.numel() == 0:
        return None
    scale = ctx.scale.expand_as(first)
    if torch.equal(first, scale):
        return known
    # a multiple, but for the rounding of products with weights: each task's gradient is as right as its incoming one
    largest = scale.abs().argmax()
    factor = first[largest] / scale[largest]
    expected = factor * scale
    if bool(((first - expected).abs() <= 4 * torch.finfo(first.dtype).eps * expected.abs()).all()):
        return _scaled(known, factor)
    if not spec.per_task:
        return None
    ctx.known = known  # these are copies: the same call again gives the same bits
    return _scaled_per_task(known, first, scale)


def _scaled(known, factor: Tensor):
    """Gradients times a number that the device holds: it is waited for on the CPU alone."""
    if factor.is_cpu and float(factor) == 1:
        return known
    tensors = [t for t in flat_outputs(known) if t.numel()]
    if tensors:
        torch._foreach_mul_(tensors, factor)
    return known


def _scaled_per_task(known, wanted: Tensor, found: Tensor) -> tuple | None:
    """Gradients `[T, ...]` found for the incoming gradients `found` `[T]`, as those for `wanted`; None where they do
    not tell them: of what was infinite or had a factor of 0."""
    factors = torch.where(wanted == found, 1, wanted / found)
    tensors = [t for t in flat_outputs(known) if t.numel()]
    if not bool(factors.isfinite().all()):
        return None
    if not bool(factors.all()) and not all(bool(t.isfinite().all()) for t in tensors):
        return None
    return tuple(t * factors.view(-1, *[1] * (t.dim() - 1)) if t.numel() else t for t in known)
