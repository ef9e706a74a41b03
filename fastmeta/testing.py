"""How far from right is wrong: the tolerance table, and the checks that every op must pass.

Truth is the reference in float64 on the same (already rounded) inputs. An implementation may be off by twice what the
reference itself is off in the same dtype, plus a floor; each further derivative is allowed ten times as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta.dispatch.backends import _map_tensors as map_tensors
from fastmeta.dispatch.backends import gives_gradient
from fastmeta.dispatch.spec import Args, OpSpec

# of `relative_error`
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
PER_DERIVATIVE = 10


def tolerance(dtype: torch.dtype, derivative: int, reference_error: float) -> float:
    """Largest relative error allowed in `dtype` for the given order of derivative (0: the value itself)."""
    return (2 * reference_error + FLOOR[dtype]) * PER_DERIVATIVE**derivative


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest entry of `truth`, or over 0.1 where that is less.

    Samples are of order one: what cancels to nothing is judged by the size of what cancelled. Infinite where one is NaN
    and the other is not.
    """
    value, truth = value.detach().to("cpu", torch.float64), truth.detach().to("cpu", torch.float64)
    if value.shape != truth.shape:
        raise AssertionError(f"shape {list(value.shape)}, should be {list(truth.shape)}")
    if value.numel() == 0:
        return 0.0
    if not torch.equal(value.isnan(), truth.isnan()):
        return float("inf")
    value, truth = value.nan_to_num(), truth.nan_to_num()
    return float((value - truth).abs().max() / truth.abs().max().clamp_min(0.1))


def tensors_of(outputs) -> list[Tensor]:
    """Outputs or arguments of an op as a flat list of their tensors."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, (list, tuple)):
        return [t for output in outputs for t in tensors_of(output)]
    return []


def to_float64(args: Args) -> Args:
    return map_tensors(args, lambda t: t.detach().to(torch.float64) if t.is_floating_point() else t)


def differentiable_leaves(spec: OpSpec, args: Args) -> tuple[Args, list[Tensor]]:
    """`args` with fresh leaves in place of the differentiable arguments, and those leaves."""
    leaves: list[Tensor] = []

    def leaf(t):
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1]

    positions = spec.differentiable_positions
    full = tuple(map_tensors((a,), leaf)[0] if i in positions else a for i, a in enumerate(args))
    return full, leaves


def derivative(function, spec: OpSpec, args: Args, order: int, seed: int = 0) -> list[Tensor]:
    """Values (order 0) or derivatives of `function(*args)` along fixed random directions, with respect to all leaves.

    Order 2 is the gradient of the gradient, each contracted with random cotangents.
    """
    args, leaves = differentiable_leaves(spec, args)
    # not the numbers of a sample of the same seed: along these some second derivatives vanish, and errors with them
    generator = torch.Generator().manual_seed(seed + 1)

    def contract(values):
        draws = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in values]
        # a constant takes its draw too, so that it may be one for the reference and not for the op
        return sum((v * d).sum() for v, d in zip(values, draws, strict=True) if v.requires_grad)

    values = tensors_of(function(*args))
    if order:
        values = values[: spec.differentiable_outputs]
    for remaining in range(order, 0, -1):
        total = contract(values)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return [torch.zeros_like(leaf) for leaf in leaves]
        found = torch.autograd.grad(total, leaves, create_graph=remaining > 1, allow_unused=True)
        values = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return values


def check_op(spec: OpSpec, args: Args, order: int = 0, function=None, truth=None) -> None:
    """Compare an op, or its first or second derivative, with the truth, which is the reference in float64.

    Args:
        spec: the op.
        args: op-level arguments, of any dtype and device.
        order: 0 values, 1 gradients, 2 gradients of gradients.
        function: what to check in place of the op itself; takes `args`.
        truth: what is right in place of the reference; takes `args`.

    Raises:
        AssertionError: an error above the tolerance of the dtype, with the figures.
    """
    dtype = next(t.dtype for t in tensors_of(args) if t.is_floating_point())
    truth = truth or spec.reference
    exact = derivative(truth, spec, to_float64(args), order)
    own = exact if dtype == torch.float64 else derivative(truth, spec, args, order)
    found = [derivative(function or spec, spec, args, order)]
    if order == 0 and function is None and spec.with_gradient and gives_gradient(spec, args):
        with torch.no_grad():  # where no gradient may be wanted, another kernel runs
            found.append(tensors_of(spec(*args)))
    for values in found:
        if len(values) != len(exact):
            raise AssertionError(f"{spec.name}: {len(values)} outputs, should be {len(exact)}")
        for i, (value, right, reference) in enumerate(zip(values, exact, own, strict=True)):
            expected = dtype if dtype == torch.float64 else reference.dtype
            if value.dtype != expected:
                raise AssertionError(f"{spec.name}, result {i}: dtype {value.dtype}, should be {expected}")
            error = relative_error(value, right)
            allowed = tolerance(dtype, order, relative_error(reference, right))
            if not error <= allowed:
                raise AssertionError(
                    f"{spec.name}, result {i} of derivative {order} in {dtype}: "
                    f"error {error:.2e}, allowed {allowed:.2e}"
                )
