"""A tensor that every task has its own of, which to a module looks like that of one task.

A module runs once, for all tasks: what it computes with such tensors is computed with `[T, *shape]` behind them, in
torch operations that plain autograd follows. Nothing of the module is looked at or patched. Functions with a rule run
for all tasks in one call of their own; any other is mapped over the tasks by `torch.vmap`, by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._exact import MAPPABLE

Rule = Callable[..., Any]
RULES: dict[Callable, Rule] = {}


def rule(*functions: Callable) -> Callable[[Rule], Rule]:
    """Registers what answers these functions of torch."""

    def register(answer: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, answer))
        return answer

    return register


class TaskTensor(Tensor):
    """`values` `[T, *shape]`, seen as `[*shape]`."""

    _values: Tensor
    kept: bool  # what is written into it is written into `values`, as into a buffer; else it holds another tensor then

    @staticmethod
    def __new__(cls, values: Tensor, kept: bool = False) -> TaskTensor:
        made = _seen_as(cls, values.shape[1:], values)
        made._values, made.kept = values, kept
        return made

    @property
    def values(self) -> Tensor:
        refuse_own_gradients(self)
        return self._values

    def become(self, values: Tensor) -> TaskTensor:
        """What an operation in place leaves in it."""
        self._values = values
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        answer = RULES.get(func)
        if answer is not None:
            return answer(*args, **kwargs)
        if func in _OF_THE_LOOK:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return mapped(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} on tensors of many tasks, behind torch functions")


def _seen_as(cls: type, shape: torch.Size, like: Tensor) -> Any:
    # that it requires gradients is for `refuse_own_gradients` to see: none is asked for it
    options = {"dtype": like.dtype, "device": like.device, "requires_grad": like.requires_grad}
    return Tensor._make_wrapper_subclass(cls, shape, **options)


def refuse_own_gradients(tensor: TaskTensor) -> None:
    """Raise for what an `autograd.Function` gave: torch hands it such tensors, but its backward would never run."""
    with torch._C.DisableTorchFunctionSubclass():
        own = tensor.grad_fn
    if own is not None:
        raise NotImplementedError(f"{own.name().removesuffix('Backward')}: an autograd.Function of the module's own")


def values_of(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, TaskTensor) else tensor


def mapped(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func` mapped over the tasks by `torch.vmap`."""
    func = MAPPABLE.get(func, func)
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, TaskTensor)]

    def of_one_task(*tensors: Tensor) -> Any:
        own = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            own[place] = tensor
        args, kwargs = pytree.tree_unflatten(own, structure)
        return func(*args, **kwargs)

    outputs: list[Any] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        found, made = pytree.tree_flatten(of_one_task(*tensors))
        outputs[:] = [found, made]
        return [leaf for leaf in found if isinstance(leaf, Tensor)]

    in_place = _in_place(func) and isinstance(args[0], TaskTensor)
    inside = [leaves[place].values for place in places]
    if in_place and not args[0].kept:
        inside[0] = inside[0].clone()
    found = iter(torch.vmap(run, randomness="different")(*inside))
    flat, made = outputs
    if in_place:
        return args[0].become(next(found))
    return pytree.tree_unflatten([TaskTensor(next(found)) if isinstance(leaf, Tensor) else leaf for leaf in flat], made)


def _in_place(func: Callable) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


# functions of each number by itself ------------------------------------------------------------------------------


def aligned(args: tuple) -> list:
    """The tensors behind `args`, so that those of one task broadcast against each other as they would alone."""
    most = max(a.dim() for a in args if isinstance(a, Tensor))
    return [_with_rank(a.values, most) if isinstance(a, TaskTensor) else a for a in args]


def _with_rank(values: Tensor, rank: int) -> Tensor:
    missing = rank + 1 - values.dim()
    return values if missing == 0 else values.reshape(values.shape[0], *(1,) * missing, *values.shape[1:])


def elementwise(func: Callable) -> Rule:
    def answer(*args, out=None, **kwargs):
        if out is not None or any(isinstance(value, Tensor) for value in kwargs.values()):
            return mapped(func, args, kwargs if out is None else {**kwargs, "out": out})
        return TaskTensor(func(*aligned(args), **kwargs))

    return answer


def elementwise_in_place(func: Callable, plain: Callable) -> Rule:
    """`plain` is the function that makes a new tensor: what a graph or a block holds is not written over."""

    def answer(*args, **kwargs):
        if not isinstance(args[0], TaskTensor):
            raise NotImplementedError(f"{func.__name__} of what the tasks share, by what each has of its own")
        whole = aligned(args)
        if not args[0].kept:
            return args[0].become(plain(*whole, **kwargs).expand_as(whole[0]))
        func(*whole, **kwargs)
        return args[0]

    return answer


_ELEMENTWISE = (
    "abs add addcdiv addcmul atan ceil clamp clamp_max clamp_min clip cos cosh div divide eq erf exp expm1 floor ge gt "
    "isfinite isinf isnan le log log10 log1p log2 logical_and logical_not logical_or lt maximum minimum mul multiply "
    "ne neg negative pow reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square sub subtract tan tanh "
    "true_divide where"
).split()
_OPERATORS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __neg__ __abs__ "
    "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__ contiguous clone detach float double half "
    "bfloat16"
).split()
_IN_PLACE = "add sub mul div clamp clamp_min clamp_max exp sigmoid tanh neg sqrt"
_LOOK = "dim ndimension size stride numel nelement element_size is_floating_point is_complex get_device is_contiguous"
_ATTRIBUTES = "shape dtype device ndim is_cuda is_cpu layout is_sparse is_quantized is_meta is_mkldnn is_nested"

_OF_THE_LOOK: set[Callable] = {getattr(Tensor, name) for name in _LOOK.split()}
_OF_THE_LOOK |= {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()}
_OF_THE_LOOK |= {torch.is_floating_point, torch.is_complex, torch.numel, Tensor.__len__, Tensor.__repr__}

for _name in _ELEMENTWISE:
    for _where in (torch, Tensor):
        if hasattr(_where, _name):
            RULES[getattr(_where, _name)] = elementwise(getattr(_where, _name))
for _name in _OPERATORS:
    RULES[getattr(Tensor, _name)] = elementwise(getattr(Tensor, _name))
for _name in _IN_PLACE.split():
    RULES[getattr(Tensor, f"{_name}_")] = elementwise_in_place(getattr(Tensor, f"{_name}_"), getattr(torch, _name))
for _name, _plain in (("__iadd__", "add"), ("__isub__", "sub"), ("__imul__", "mul"), ("__itruediv__", "div")):
    if hasattr(Tensor, _name):
        RULES[getattr(Tensor, _name)] = elementwise_in_place(getattr(Tensor, f"{_plain}_"), getattr(torch, _plain))


@rule(Tensor.requires_grad.__get__)
def _requires_grad(tensor: TaskTensor) -> bool:
    return tensor.values.requires_grad


@rule(Tensor.is_leaf.__get__)
def _is_leaf(tensor: TaskTensor) -> bool:
    return tensor.values.is_leaf
