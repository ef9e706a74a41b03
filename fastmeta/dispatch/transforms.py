"""An op as what the dispatcher and eager `torch.func` call: with gradients of all its arguments, and a vmap rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fastmeta.dispatch.arguments import as_list, is_list, save
from fastmeta.dispatch.spec import Args, OpSpec


@cache
def _dispatcher_op(name: str):
    return getattr(torch.ops.fastmeta, name).default


def dispatcher_op(spec: OpSpec):
    if not torch.compiler.is_compiling():
        return _dispatcher_op(spec.name)
    return getattr(torch.ops.fastmeta, spec.name).default


def transformed_function(spec: OpSpec, call: Callable) -> type[torch.autograd.Function]:
    """The op as an `autograd.Function` for eager `torch.func`: the same gradient, and a vmap rule."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(structure, *tensors):
            return structure.split_outputs(dispatcher_op(spec)(*structure.join(tensors)))

        @staticmethod
        def setup_context(ctx, inputs, output):
            structure, *tensors = inputs
            save(ctx, spec, structure.join(tensors))
            ctx.output_structure = structure
            if spec.differentiable_outputs is not None:
                ctx.mark_non_differentiable(*output[spec.differentiable_outputs :])

        @staticmethod
        def backward(ctx, *grads):
            return None, *_flat_gradients(ctx, spec, grads, ctx.needs_input_grad[1:])

        @staticmethod
        def vmap(info, in_dims, structure, *tensors):
            outputs = _fold_and_call(call, spec, info.batch_size, structure.join(in_dims[1:]), structure.join(tensors))
            flat = structure.split_outputs(outputs)
            return flat, (0,) * len(flat)

    Function.__name__ = Function.__qualname__ = f"fastmeta_{spec.name}"
    return Function


def _fold_and_call(call: Callable, spec: OpSpec, batch: int, in_dims: Args, args: Args):
    """The vmap rule: the mapped dimension joins the task dimension, and the op is called once."""
    moved = [
        (tensor, dim) if dim is None else (tensor.movedim(dim, 0), 0)
        for arg, dims in zip(args, in_dims, strict=True)
        if is_list(arg) or isinstance(arg, Tensor)
        for tensor, dim in zip(as_list(arg), as_list(dims), strict=True)
    ]
    sizes = [t.shape[0 if dim is None else 1] for t, dim in moved if not _not_needed(t, dim)]
    tasks = next((n for n in sizes if n != 1), 1)
    it = iter(moved)

    def fold(tensor, dim, keep_shared):
        if tasks and _not_needed(tensor, dim):
            return tensor.new_empty(0)
        if dim is None:
            if tensor.shape[0] == 1 and keep_shared:
                return tensor  # shared by all tasks of all elements
            tensor = tensor.expand(batch, *tensor.shape)
        if tensor.shape[1] != tasks:
            tensor = tensor.expand(batch, tasks, *tensor.shape[2:])
        return tensor.reshape(batch * tasks, *tensor.shape[2:])

    shared_sizes = {}
    folded = []
    for name, arg in zip(spec.argument_names, args, strict=True):
        if not (is_list(arg) or isinstance(arg, Tensor)):
            folded.append(arg)
            continue
        pairs = [next(it) for _ in as_list(arg)]
        # a gradient summed over tasks must not be summed over the mapped dimension: such inputs are never left shared;
        # of one task a leading 1 does not tell whether the op lets tasks share it
        keep_shared = name not in spec.gradient_of and (tasks != 1 or name in spec.may_share)
        values = [fold(t, dim, keep_shared) for t, dim in pairs]
        shared_sizes[name] = [t.shape[0 if dim is None else 1] for t, dim in pairs]
        folded.append(values if is_list(arg) else values[0])

    outputs, _ = call(spec, tuple(folded))
    single = not isinstance(outputs, tuple)  # one Tensor, or one Tensor[]
    unfolded = []
    for i, output in enumerate((outputs,) if single else outputs):
        values = []
        for j, value in enumerate(as_list(output)):
            if value.shape == (0,) and spec.gradient_of:  # a gradient that was not needed
                values.append(value.expand(batch, 0))
                continue
            rows = value.shape[0] // batch if batch else tasks
            value = value.reshape(batch, rows, *value.shape[1:])
            if spec.gradient_of and shared_sizes[spec.gradient_of[i]][j] != value.shape[1]:
                value = value.sum(1, keepdim=True)
            values.append(value)
        unfolded.append(values if is_list(output) else values[0])
    return unfolded[0] if single else tuple(unfolded)


def _not_needed(tensor: Tensor, dim: int | None) -> bool:
    """Whether it stands for a gradient that was not needed: of one dimension, without numbers."""
    return tensor.shape[0 if dim is None else 1 :] == (0,)


def gradients_of(spec: OpSpec, args: Args, grads, needs_input_grad):
    """(position, gradient) of each differentiable argument that needs one."""
    needs = _needs(spec, needs_input_grad)
    gradients = spec.backward(args, grads, needs)
    for bit, position in enumerate(spec.differentiable_positions):
        if needs >> bit & 1:
            yield position, gradients[bit]


def _needs(spec: OpSpec, needs_input_grad) -> int:
    """The bit mask of the differentiable arguments that need a gradient."""
    needs = 0
    for bit, position in enumerate(spec.differentiable_positions):
        needed = needs_input_grad[position]
        needs |= (any(needed) if is_list(needed) else bool(needed)) << bit
    return needs


def _by_argument(args: Args, flags) -> list:
    """Flags of an op's tensors, nested as its arguments are."""
    flags = iter(flags)
    return [[next(flags) for _ in a] if is_list(a) else next(flags) if isinstance(a, Tensor) else False for a in args]


def _flat_gradients(ctx, spec: OpSpec, grads, needs_input_grad) -> list:
    """What an `autograd.Function` of an op returns: a gradient, or None, for each of its tensors."""
    # what torch.func.vjp returns is called when its transform is over: of the wrappers that are left from it autograd
    # would find no gradient, without a word
    args = ctx.structure.join(map(torch._C._functorch.unwrap_if_dead, ctx.saved_tensors))
    needed = _by_argument(args, needs_input_grad)
    found = dict(gradients_of(spec, args, ctx.output_structure.nest(grads), needed))
    flat: list = []
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            flat.append(found.get(position))
        elif isinstance(arg, (list, tuple)):
            flat.extend(found.get(position) or [None] * len(arg))
    return flat
