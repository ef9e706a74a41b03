"""Registers an op: makes of its `OpSpec` a dispatcher op that autograd, `torch.compile` and `torch.func` understand.

Every formula hangs on the op and the backend is chosen below it (`backends.run`), so that all backends share one
gradient, switch per call and break no graph.

Five ways into an op:
- on plain tensors in eager mode straight to the backend, through a small `autograd.Function` if there is something to
  differentiate: the dispatcher's way for Python ops costs more than a small kernel runs;
- while compiling, tracing or in a dispatch mode the dispatcher op itself, with the gradient registered on it;
- under `torch.func` transforms an `autograd.Function` with a vmap rule, because gradients registered on a dispatcher
  op fail there;
- while compiling under such a transform the plain-torch reference, because an `autograd.Function` inside
  `torch.compile` gives wrong second derivatives;
- in forward mode the reference, because a dispatcher op would return a zero tangent without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from fastmeta.dispatch import backends
from fastmeta.dispatch.arguments import Structure, is_list, lifted, save, saved, tensors_of
from fastmeta.dispatch.eager import mean_of, plain_function
from fastmeta.dispatch.spec import REGISTRY, Args, OpSpec
from fastmeta.dispatch.transforms import dispatcher_op, gradients_of, transformed_function

LIBRARY = torch.library.Library("fastmeta", "DEF")
_functions: dict[str, type[torch.autograd.Function]] = {}  # for torch.func
_plain_functions: dict[str, type[torch.autograd.Function]] = {}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


class Op(OpSpec):
    """An `OpSpec` that can be called once it is registered."""

    def __call__(self, *args, weights: Tensor | None = None):
        """The outputs. `weights` `[T]` change nothing in them: they say what the caller will multiply the first with
        before it takes the mean, so that a kernel can find the gradient of that beside it."""
        return call(self, args, weights=weights)[0]

    def with_mean(self, *args, weights: Tensor | None = None):
        """The outputs, and the mean of the first, or of `weights` `[T]` times the first: what to differentiate where a
        kernel finds gradients beside it."""
        constant = weights is None or not weights.requires_grad  # a mean made beside the outputs has no other gradient
        outputs, mean = call(self, args, wants_mean=constant, weights=weights)
        return outputs, mean_of(outputs[0], weights) if mean is None else mean


def register(op: Op) -> Op:
    """Enter an op into `REGISTRY` and into the dispatcher."""
    if op.name in REGISTRY:
        raise ValueError(f"op {op.name} is registered already")
    REGISTRY[op.name] = op
    _define(op)
    return op


def _define(spec: OpSpec) -> None:
    LIBRARY.define(spec.schema)
    # now: dynamo cannot trace how a cached property is first found
    _ = spec.tensor_arguments, spec.string_arguments, spec.rank_by_position
    qualified = f"fastmeta::{spec.name}"

    # called from a frame that dynamo runs, it must not be traced: it is a kernel. Not torch.compiler.disable, which
    # imports all of dynamo, two seconds
    @_disable_dynamo
    def implementation(*args):
        return backends.run(spec, args)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(spec.name, implementation, key)
    torch.library.register_fake(qualified, spec.fake, lib=LIBRARY)

    def setup_context(ctx, inputs, output):
        save(ctx, spec, inputs)
        if spec.differentiable_outputs is not None:
            ctx.mark_non_differentiable(*output[spec.differentiable_outputs :])

    def backward(ctx, *grads):
        args = saved(ctx)
        gradients: list = [[None] * len(arg) if is_list(arg) else None for arg in args]
        for position, gradient in gradients_of(spec, args, grads, ctx.needs_input_grad):
            gradients[position] = gradient
        return tuple(gradients)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    _functions[spec.name] = transformed_function(spec, call)
    _plain_functions[spec.name] = plain_function(spec)


def call(spec: OpSpec, args: Args, wants_mean: bool = False, weights: Tensor | None = None):
    """The outputs of an op, by the way in that is right where the caller stands; and with `wants_mean` the mean of the
    first, weighted where there are `weights`, or None where it is found as well by the caller."""
    transformed = torch._C._are_functorch_transforms_active()
    compiling = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 or transformed and compiling:
        args = lifted(spec, args)
        check_data(spec, args)
        with torch.autocast(tensors_of(args)[0].device.type, enabled=False):  # the inputs have been cast
            return spec.reference(*args), None
    if transformed:
        args = lifted(spec, args)
        structure = Structure(spec, args)
        outputs = _functions[spec.name].apply(structure, *tensors_of(args))
        return structure.join_outputs(outputs), None
    if compiling or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return dispatcher_op(spec)(*lifted(spec, args)), None
    if weights is not None and type(weights) not in _PLAIN:
        return dispatcher_op(spec)(*lifted(spec, args)), None
    tensors, needing, wanted = [], [], []
    for position, bit, many in spec.tensor_arguments:
        arg = args[position]
        for index, t in enumerate(arg if many else (arg,)):
            if type(t) not in _PLAIN:
                return dispatcher_op(spec)(*lifted(spec, args)), None
            if t.requires_grad:
                needing.append(t)
                wanted.append((bit, index if many else None, t.dim()))
            tensors.append(t)
    if not (needing and torch.is_grad_enabled()):
        return backends.run(spec, lifted(spec, args)), None
    structure = Structure(spec, args)
    if weights is not None:
        weights = weights.detach()
    wants_mean = wants_mean and spec.with_gradient
    flat = _plain_functions[spec.name].apply(structure, args, tensors, wanted, wants_mean, weights, *needing)
    return structure.join_outputs(flat), flat[-1] if wants_mean else None


def plain_call(tensors) -> bool:
    """Whether nothing stands between the caller and a kernel: no transform, no tracing, and no graph."""
    return plain_or_graph(tensors) and not (torch.is_grad_enabled() and any([t.requires_grad for t in tensors]))


def plain_or_graph(tensors) -> bool:
    """Whether nothing but a graph of plain autograd stands between the caller and a kernel."""
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    return True


def check_data(spec: OpSpec, args: Args) -> None:
    """What `backends.run` checks, for calls that do not get there; not where a label stands for many or for none."""
    if spec.check is None or torch.compiler.is_compiling():
        return
    labels = [t for t in tensors_of(args) if not t.is_floating_point()]
    if not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in labels):
        spec.check(*args)
