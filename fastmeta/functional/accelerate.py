"""The convolutional ops for `torch.func` code as it stands."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import torch_calls
from .blocks import Block, Follow
from .checks import FLOATS
from .convolutions import task_conv1d, task_conv2d

Target = TypeVar("Target", bound=Callable)


def accelerate(model_or_function: Target) -> Target:
    """A module or function whose convolutions, norms and pools run on the ops of this package wherever `torch.func`
    transforms it.

    `vmap(grad(loss))` over `functional_call(model, weights, x)`, `jacrev`, per-sample gradients, Hessian-vector
    products: torch maps a convolution over tasks as one grouped convolution, and differentiates batch norms with their
    weights only once without an error. The ops map over tasks as what they are, and are exact to any order; weights
    that are not mapped stay one dense convolution.

    Answered are `F.conv1d` and `F.conv2d`; `F.batch_norm` (with statistics of its rows, or running ones in eval mode),
    `F.instance_norm`, `F.group_norm`; and, in one pass with such a norm directly before them, `F.relu`, `leaky_relu`,
    `gelu`, `silu` (not in place), then a 2x2 max or average pool; or a max pool first, then a ReLU. All else goes to
    torch untouched, and so does everything outside of transforms, in forward mode (`jvp`) and under `torch.compile`.

    Only this call is concerned: nothing is patched, other threads and other models notice nothing.

    Args:
        model_or_function: an `nn.Module`, or any function: a model's forward, a loss, or the whole step.

    Returns:
        Of a function, one of the same signature. Of a module, another face of it: the same class, parameters, buffers,
        mode and hooks, shared with it, so that `state_dict`, optimisers and `functional_call` work as with the module.

    Raises:
        TypeError: what cannot be called.

    Example:
        >>> model = fastmeta.accelerate(conv_net)
        >>> per_task = torch.func.vmap(torch.func.grad(lambda w, x, y: loss(functional_call(model, w, x), y)))
    """
    if isinstance(model_or_function, nn.Module):
        return _face(model_or_function)
    if not callable(model_or_function) or isinstance(model_or_function, type):
        raise TypeError(f"model_or_function must be an nn.Module or a function, got {_kind(model_or_function)}")

    @wraps(model_or_function, updated=())
    def accelerated(*args, **kwargs):
        return _run(model_or_function, args, kwargs)

    return accelerated


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _run(function: Callable, args: tuple, kwargs: dict[str, Any]):
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with _Accelerated():
        return function(*args, **kwargs)


def _face(module: nn.Module) -> nn.Module:
    """An object of a class of its own that has the module's attributes for its own."""
    cls = type(module)

    class Face(cls):
        def forward(self, *args, **kwargs):
            return _run(super().forward, args, kwargs)

        def __reduce_ex__(self, protocol):  # copies and pickles are those of the module, accelerated
            return accelerate, (_with_attributes(cls, self.__dict__),)

    Face.__name__, Face.__qualname__, Face.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return _with_attributes(Face, module.__dict__)


def _with_attributes(cls: type, attributes: dict[str, Any]) -> nn.Module:
    found = cls.__new__(cls)
    found.__dict__ = attributes
    return found


class _Accelerated(TorchFunctionMode):
    """Answers torch's calls with the ops.

    A norm is run at once, so that what the caller holds is always a tensor. Should an activation and a pool directly
    follow, they run together with the norm from its input, and their graph is that of the block alone. Directly: no
    other call of torch between, so that nothing can have been written into and gradients are on or off as before.
    """

    def __init__(self):
        super().__init__()
        self.last: _Result | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__" or func in _LOOKS:
            return func(*args, **kwargs)
        last, self.last = self.last, None
        answer = _ANSWERS.get(func)
        if answer is not None and _transformed():
            self.last = answer(func, last, args, kwargs)
            if self.last is not None:
                return self.last.tensor
        return func(*args, **kwargs)


_LOOKS = frozenset((Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.numel))  # which write nothing
_PLAIN = (Tensor, nn.Parameter)
_NOTHING = Follow()


class _Result:
    """A tensor, and the block that made it, for what may follow: a norm, and how it goes on."""

    def __init__(self, tensor: Tensor, block: Block | None = None, follow: Follow = _NOTHING):
        self.tensor, self.block, self.follow = tensor, block, follow

    @classmethod
    def of(cls, block: Block, follow: Follow | None) -> _Result | None:
        return None if follow is None else cls(block(follow).squeeze(0), block, follow)

    def goes_on(self, args: tuple) -> bool:
        """Whether a call is given what a norm has made."""
        return bool(args) and args[0] is self.tensor and self.block is not None


def _transformed() -> bool:
    stack = get_interpreter_stack()
    if not stack or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    return all(level.key() in (TransformType.Vmap, TransformType.Grad) for level in stack)


def _alike(*tensors: Tensor | None) -> bool:
    """Plain tensors that an op can read together."""
    given = [t for t in tensors if t is not None]
    if any(type(t) not in _PLAIN for t in given):
        return False
    first = given[0]
    if first.dtype not in FLOATS or first.device.type not in ("cpu", "cuda"):
        return False
    return all(t.layout is torch.strided and t.dtype is first.dtype and t.device == first.device for t in given)


def _convolution(func, last, args, kwargs) -> _Result | None:
    return _convolve(func, *args, **kwargs)


def _convolve(func, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> _Result | None:
    dims, run = (4, task_conv2d) if func is torch.conv2d else (3, task_conv1d)
    if not _alike(input, weight, bias) or input.dim() != dims or weight.dim() != dims:
        return None
    if min(input.shape[1], *input.shape[2:], *weight.shape) < 1 or input.shape[1] != weight.shape[1] * groups:
        return None
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    y = run(input.unsqueeze(0), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0), **options)
    return _Result(y.squeeze(0))


def _norm(func, last, args, kwargs) -> _Result | None:
    asked = torch_calls.NORMS[func](*args, **kwargs)
    x = args[0] if args else kwargs["input"]
    if asked is None or not isinstance(x, Tensor) or x.dim() not in (3, 4) or not x.numel():
        return None
    norm, groups, running = asked["norm"], asked.get("groups", 1), asked.get("running")
    affine = [asked["weight"], asked["bias"]]
    given = [t for t in (*affine, *(running or ())) if t is not None]
    if not _alike(x, *given) or any(t.shape != x.shape[1:2] for t in given) or x.shape[1] % groups:
        return None
    if running is None and norm != "group" and x.numel() == x.shape[1] * (len(x) if norm == "instance" else 1):
        return None  # one number has no variance: torch says so
    weight, bias = ([] if t is None else [t.unsqueeze(0)] for t in affine)
    running = running and [t.unsqueeze(0) for t in running]
    block = Block.of(x.unsqueeze(0), weight, bias, norm, groups, running, asked["eps"])
    return _Result.of(block, _NOTHING)


def _activation(func, last, args, kwargs) -> _Result | None:
    if last is None or not last.goes_on(args):
        return None
    asked = torch_calls.ACTIVATIONS[func](*args, **kwargs)
    return None if asked is None else _Result.of(last.block, last.follow.activated(**asked))


def _pool(func, last, args, kwargs) -> _Result | None:
    if last is None or not last.goes_on(args):
        return None
    asked = torch_calls.POOLS[func](*args, **kwargs)
    if asked is None or last.tensor.dim() != 4 or min(last.tensor.shape[2:]) < 2:
        return None
    return _Result.of(last.block, last.follow.pooled(**asked))


_ANSWERS = {
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    **dict.fromkeys(torch_calls.NORMS, _norm),
    **dict.fromkeys(torch_calls.ACTIVATIONS, _activation),
    **dict.fromkeys(torch_calls.POOLS, _pool),
}
