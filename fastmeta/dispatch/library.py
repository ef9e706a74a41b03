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

from functools import cache

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

from fastmeta.dispatch import backends
from fastmeta.dispatch.constants import filled
from fastmeta.dispatch.spec import REGISTRY, Args, OpSpec

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
        return outputs, _mean(outputs[0], weights) if mean is None else mean


def register(op: Op) -> Op:
    """Enter an op into `REGISTRY` and into the dispatcher."""
    if op.name in REGISTRY:
        raise ValueError(f"op {op.name} is registered already")
    REGISTRY[op.name] = op
    _define(op)
    return op


def _define(spec: OpSpec) -> None:
    LIBRARY.define(spec.schema)
    _ = spec.bits, spec.rank_by_position  # now: dynamo cannot trace how a cached property is first found
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
        _save(ctx, spec, inputs)
        if spec.differentiable_outputs is not None:
            ctx.mark_non_differentiable(*output[spec.differentiable_outputs :])

    def backward(ctx, *grads):
        args = _saved(ctx)
        gradients: list = [[None] * len(arg) if _is_list(arg) else None for arg in args]
        for position, gradient in _gradients(spec, args, grads, ctx.needs_input_grad):
            gradients[position] = gradient
        return tuple(gradients)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    _functions[spec.name] = _make_function(spec)
    _plain_functions[spec.name] = _make_plain_function(spec)


def call(spec: OpSpec, args: Args, wants_mean: bool = False, weights: Tensor | None = None):
    """The outputs of an op, by the way in that is right where the caller stands; and with `wants_mean` the mean of the
    first, weighted where there are `weights`, or None where it is found as well by the caller."""
    transformed = torch._C._are_functorch_transforms_active()
    compiling = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 or transformed and compiling:
        args = _lifted(spec, args)
        _check_data(spec, args)
        with torch.autocast(_tensors(args)[0].device.type, enabled=False):  # the inputs have been cast
            return spec.reference(*args), None
    if transformed:
        args = _lifted(spec, args)
        structure = _Structure(args)
        outputs = _functions[spec.name].apply(structure, *_tensors(args))
        return structure.join_outputs(outputs), None
    if compiling or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return dispatcher_op(spec)(*_lifted(spec, args)), None
    if weights is not None and type(weights) not in _PLAIN:
        return dispatcher_op(spec)(*_lifted(spec, args)), None
    tensors, needing, wanted = [], [], []
    for arg, bit in zip(args, spec.bits, strict=True):
        for index, t in enumerate((arg,) if isinstance(arg, Tensor) else arg if _is_list(arg) else ()):
            if type(t) not in _PLAIN:
                return dispatcher_op(spec)(*_lifted(spec, args)), None
            if t.requires_grad:
                needing.append(t)
                wanted.append((bit, index if _is_list(arg) else None, t.dim()))
            tensors.append(t)
    if not (needing and torch.is_grad_enabled()):
        return backends.run(spec, _lifted(spec, args)), None
    structure = _Structure(args)
    if weights is not None:
        weights = weights.detach()
    wants_mean = wants_mean and spec.with_gradient
    flat = _plain_functions[spec.name].apply(structure, args, tensors, wanted, wants_mean, weights, *needing)
    return structure.join_outputs(flat), flat[-1] if wants_mean else None


def plain_call(tensors) -> bool:
    """Whether nothing stands between the caller and a kernel: no transform, no tracing, and no graph."""
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    graph = torch.is_grad_enabled()
    for t in tensors:
        if type(t) not in _PLAIN or (graph and t.requires_grad):
            return False
    return True


def _lifted(spec: OpSpec, args: Args) -> Args:
    """The arguments with the task dimension that shared tensors may come without."""
    if not spec.ranks:
        return args
    lifted = list(args)
    for position, rank in spec.rank_by_position:
        lifted[position] = [t if t.dim() == rank else t.unsqueeze(0) for t in args[position]]
    return tuple(lifted)


def _check_data(spec: OpSpec, args: Args) -> None:
    """What `backends.run` checks, for calls that do not get there; not where a label stands for many or for none."""
    if spec.check is None or torch.compiler.is_compiling():
        return
    labels = [t for t in _tensors(args) if not t.is_floating_point()]
    if not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in labels):
        spec.check(*args)


@cache
def _dispatcher_op(name: str):
    return getattr(torch.ops.fastmeta, name).default


def dispatcher_op(spec: OpSpec):
    if not torch.compiler.is_compiling():
        return _dispatcher_op(spec.name)
    return getattr(torch.ops.fastmeta, spec.name).default


def vjp_of_reference(spec: OpSpec):
    """A `backward` that differentiates the reference: plain torch, hence differentiable to any order."""

    def backward(args: Args, grads, needs: int):
        wanted = [position for bit, position in enumerate(spec.differentiable_positions) if needs >> bit & 1]
        inputs = [tensor for position in wanted for tensor in _as_list(args[position])]

        def function(*tensors):
            it = iter(tensors)
            full = list(args)
            for position in wanted:
                full[position] = [next(it) for _ in args[position]] if _is_list(args[position]) else next(it)
            outputs = spec.reference(*full)
            return tuple(_flat_outputs(outputs)[: spec.differentiable_outputs])

        flat_grads = _flat_outputs(grads)[: spec.differentiable_outputs]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            outputs, pull = torch.func.vjp(function, *inputs)
            results = pull(tuple(_like(grad, output) for grad, output in zip(flat_grads, outputs, strict=True)))
        else:  # nothing will be differentiated further: plain autograd is the cheaper way
            with torch.enable_grad():
                inputs = [tensor.detach().requires_grad_() for tensor in inputs]
                outputs = function(*inputs)
            if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradCPU):
                raise AssertionError(f"{spec.name}: differentiated where autograd is switched off by key")
            live = [
                (output, _like(grad, output))
                for grad, output in zip(flat_grads, outputs, strict=True)
                if output.requires_grad
            ]
            results = (
                torch.autograd.grad([o for o, _ in live], inputs, [g for _, g in live], allow_unused=True)
                if live
                else [None] * len(inputs)
            )
        found = iter(results)
        gradients = []
        for bit, position in enumerate(spec.differentiable_positions):
            needed = bool(needs >> bit & 1)
            values = [
                _or_zeros(next(found), tensor) if needed else tensor.new_empty(0) for tensor in _as_list(args[position])
            ]
            gradients.append(values if _is_list(args[position]) else values[0])
        return tuple(gradients)

    return backward


def derive_backward(spec: OpSpec) -> dict:
    """The parts of the op `<name>_bwd` that follow from `spec`: its reference is the vjp of the forward's reference.

    Its arguments are the gradients of the differentiable outputs, the forward's arguments, and `needs`; its outputs
    the gradients of the differentiable arguments, of size 0 where `needs` has no bit for them.
    """
    returns = [kind.strip() for kind in spec.returns.strip("()").split(",")][: spec.differentiable_outputs]
    grads = [f"grad_{i}" if len(returns) > 1 else "grad" for i in range(len(returns))]
    types = dict(zip(spec.argument_names, spec.argument_types, strict=True))
    count = len(grads)
    pull = vjp_of_reference(spec)

    def unpack(outputs):
        return outputs[0] if len(outputs) == 1 else outputs

    def reference(*args):
        return unpack(pull(args[count:-1], args[:count], args[-1]))

    def fake(*args):
        inputs, needs = args[count:-1], args[-1]
        gradients = []
        for bit, position in enumerate(spec.differentiable_positions):
            values = [
                torch.empty_like(t, memory_format=torch.contiguous_format) if needs >> bit & 1 else t.new_empty(0)
                for t in _as_list(inputs[position])
            ]
            gradients.append(values if _is_list(inputs[position]) else values[0])
        return unpack(tuple(gradients))

    outputs = ", ".join(types[name] for name in spec.differentiable)
    return {
        "name": f"{spec.name}_bwd",
        "arguments": ", ".join(
            [f"{kind} {name}" for kind, name in zip(returns, grads, strict=True)] + [spec.arguments, "int needs"]
        ),
        "returns": f"({outputs})" if len(spec.differentiable) > 1 else outputs,
        "summary": f"gradient of `{spec.name}`",
        "reference": reference,
        "fake": fake,
        "differentiable": (*grads, *spec.differentiable),
        "gradient_of": spec.differentiable,
        "check": None,
        "autocast": spec.autocast,
    }


def _gradients(spec: OpSpec, args: Args, grads, needs_input_grad):
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
        needs |= (any(needed) if _is_list(needed) else bool(needed)) << bit
    return needs


class _Structure:
    """The arguments without their tensors: opaque to pytree, so that `torch.func` hands it through untouched."""

    def __init__(self, args: Args):
        # of a tensor None, of a list of tensors its length, of anything else a box with it
        self.kinds = tuple(
            None if isinstance(a, Tensor) else len(a) if isinstance(a, (list, tuple)) else (a,) for a in args
        )
        self.lengths: tuple | None = None  # how the outputs were nested

    def join(self, tensors) -> Args:
        it = iter(tensors)
        return tuple(
            [
                next(it) if kind is None else kind[0] if isinstance(kind, tuple) else [next(it) for _ in range(kind)]
                for kind in self.kinds
            ]
        )

    def split_outputs(self, outputs) -> tuple[Tensor, ...]:
        single = not isinstance(outputs, tuple)  # one Tensor, or one Tensor[]
        nested = (outputs,) if single else outputs
        self.lengths = (single, tuple(len(o) if _is_list(o) else None for o in nested))
        return tuple(_flat_outputs(outputs))

    def nest(self, flat) -> tuple:
        it = iter(flat)
        return tuple(next(it) if n is None else [next(it) for _ in range(n)] for n in self.lengths[1])

    def join_outputs(self, flat):
        nested = self.nest(flat)
        return nested[0] if self.lengths[0] else nested


def _make_function(spec: OpSpec) -> type[torch.autograd.Function]:
    """The op as an `autograd.Function` for eager `torch.func`: the same gradient, and a vmap rule."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(structure, *tensors):
            return structure.split_outputs(dispatcher_op(spec)(*structure.join(tensors)))

        @staticmethod
        def setup_context(ctx, inputs, output):
            structure, *tensors = inputs
            _save(ctx, spec, structure.join(tensors))
            ctx.output_structure = structure
            if spec.differentiable_outputs is not None:
                ctx.mark_non_differentiable(*output[spec.differentiable_outputs :])

        @staticmethod
        def backward(ctx, *grads):
            return None, *_flat_gradients(ctx, spec, grads, ctx.needs_input_grad[1:])

        @staticmethod
        def vmap(info, in_dims, structure, *tensors):
            outputs = _fold_and_call(spec, info.batch_size, structure.join(in_dims[1:]), structure.join(tensors))
            flat = structure.split_outputs(outputs)
            return flat, (0,) * len(flat)

    Function.__name__ = Function.__qualname__ = f"fastmeta_{spec.name}"
    return Function


def _make_plain_function(spec: OpSpec) -> type[torch.autograd.Function]:
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
            args = _lifted(spec, args)
            found = None
            if spec.with_gradient:
                ctx.set_materialize_grads(False)
                ctx.scale = mean_gradient(tensors[0], weights)
                found = backends.run_with_gradient(spec, args, _needs_of(wanted), wants_mean, ctx.scale)
            outputs, ctx.known = found or (backends.run(spec, args), None)
            outputs = structure.split_outputs(outputs)
            if spec.differentiable_outputs is not None:
                ctx.mark_non_differentiable(*outputs[spec.differentiable_outputs :])
            ctx.averaged = len(outputs[0]) if wants_mean else None
            return (*outputs, _mean(outputs[0], weights)) if wants_mean else outputs

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
                found = spec.backward(_lifted(spec, _saved(ctx)), ctx.structure.nest(grads), _needs_of(wanted))
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


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
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
    return _scaled_per_task(known, first, scale) if spec.per_task else None


def _scaled(known, factor: Tensor):
    """Gradients times a number that the device holds: it is waited for on the CPU alone."""
    if factor.is_cpu and float(factor) == 1:
        return known
    tensors = [t for t in _flat_outputs(known) if t.numel()]
    if tensors:
        torch._foreach_mul_(tensors, factor)
    return known


def _scaled_per_task(known, wanted: Tensor, found: Tensor) -> tuple | None:
    """Gradients `[T, ...]` found for the incoming gradients `found` `[T]`, as those for `wanted`; None where they do
    not tell them: of what was infinite or had a factor of 0."""
    factors = torch.where(wanted == found, 1, wanted / found)
    tensors = [t for t in _flat_outputs(known) if t.numel()]
    if not bool(factors.isfinite().all()):
        return None
    if not bool(factors.all()) and not all(bool(t.isfinite().all()) for t in tensors):
        return None
    for t in tensors:
        t.mul_(factors.view(-1, *[1] * (t.dim() - 1)))
    return known


def _by_argument(args: Args, flags) -> list:
    """Flags of an op's tensors, nested as its arguments are."""
    flags = iter(flags)
    return [[next(flags) for _ in a] if _is_list(a) else next(flags) if isinstance(a, Tensor) else False for a in args]


def _flat_gradients(ctx, spec: OpSpec, grads, needs_input_grad) -> list:
    """What an `autograd.Function` of an op returns: a gradient, or None, for each of its tensors."""
    args = _saved(ctx)
    needed = _by_argument(args, needs_input_grad)
    found = dict(_gradients(spec, args, ctx.output_structure.nest(grads), needed))
    flat: list = []
    for position, arg in enumerate(args):
        if isinstance(arg, Tensor):
            flat.append(found.get(position))
        elif isinstance(arg, (list, tuple)):
            flat.extend(found.get(position) or [None] * len(arg))
    return flat


def _fold_and_call(spec: OpSpec, batch: int, in_dims: Args, args: Args):
    """The vmap rule: the mapped dimension joins the task dimension, and the op is called once."""
    moved = [
        (tensor, dim) if dim is None else (tensor.movedim(dim, 0), 0)
        for arg, dims in zip(args, in_dims, strict=True)
        if _is_list(arg) or isinstance(arg, Tensor)
        for tensor, dim in zip(_as_list(arg), _as_list(dims), strict=True)
    ]
    tasks = next((n for n in (t.shape[0 if dim is None else 1] for t, dim in moved) if n != 1), 1)
    it = iter(moved)

    def fold(tensor, dim, keep_shared):
        if dim is None:
            if tensor.shape[0] == 1 and keep_shared and tasks != 1:
                return tensor  # shared by all tasks of all elements
            tensor = tensor.expand(batch, *tensor.shape)
        if tensor.shape[1] != tasks:
            tensor = tensor.expand(batch, tasks, *tensor.shape[2:])
        return tensor.reshape(batch * tasks, *tensor.shape[2:])

    shared_sizes = {}
    folded = []
    for name, arg in zip(spec.argument_names, args, strict=True):
        if not (_is_list(arg) or isinstance(arg, Tensor)):
            folded.append(arg)
            continue
        pairs = [next(it) for _ in _as_list(arg)]
        # a gradient summed over tasks must not be summed over the mapped dimension: such inputs are never left shared
        values = [fold(t, dim, name not in spec.gradient_of) for t, dim in pairs]
        shared_sizes[name] = [t.shape[0 if dim is None else 1] for t, dim in pairs]
        folded.append(values if _is_list(arg) else values[0])

    outputs, _ = call(spec, tuple(folded))
    single = not isinstance(outputs, tuple)  # one Tensor, or one Tensor[]
    unfolded = []
    for i, output in enumerate((outputs,) if single else outputs):
        values = []
        for j, value in enumerate(_as_list(output)):
            if value.shape == (0,) and spec.gradient_of:  # a gradient that was not needed
                values.append(value.expand(batch, 0))
                continue
            rows = value.shape[0] // batch if batch else tasks
            value = value.reshape(batch, rows, *value.shape[1:])
            if spec.gradient_of and shared_sizes[spec.gradient_of[i]][j] != value.shape[1]:
                value = value.sum(1, keepdim=True)
            values.append(value)
        unfolded.append(values if _is_list(output) else values[0])
    return unfolded[0] if single else tuple(unfolded)


def _save(ctx, spec: OpSpec, args: Args) -> None:
    ctx.save_for_backward(*_tensors(args))
    ctx.structure = _Structure(args)


def _saved(ctx) -> Args:
    return ctx.structure.join(ctx.saved_tensors)


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def _as_list(value) -> list:
    return list(value) if _is_list(value) else [value]


def _tensors(args: Args) -> list[Tensor]:
    tensors: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            tensors.append(arg)
        elif isinstance(arg, (list, tuple)):
            tensors.extend(arg)
    return tensors


def _flat_outputs(outputs) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for output in outputs for t in _as_list(output)]


def _like(grad: Tensor | None, output: Tensor) -> Tensor:
    return torch.zeros_like(output) if grad is None else grad.expand_as(output)


def _or_zeros(grad: Tensor | None, tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if grad is None else grad
