"""Which implementation of an op runs: the one place where that is decided.

Automatic choice takes the first backend that can serve the call and falls back; a backend asked for by
`use_backend` or `FASTMETA_BACKEND` runs or says why it cannot.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.dispatch import native
from fastmeta.dispatch.arguments import tensors_of
from fastmeta.dispatch.spec import REGISTRY, Args, OpSpec

METRICS = ("sqeuclidean", "euclidean", "cosine", "dot", "manhattan")
ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid", "silu", "gelu", "sine")
LOSSES = ("cross_entropy", "mse", "binary_cross_entropy", "huber", "maximum_entropy")
NORMS = ("none", "batch", "group", "given")
POOLS = ("none", "max", "average")
_ENUMS = {"metric": METRICS, "activation": ACTIVATIONS, "loss": LOSSES, "norm": NORMS, "pool": POOLS}

# how often each (op, backend) ran since the start of the process
calls: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Backend:
    """An implementation of the ops: `why_not` is None or the sentence that says why it cannot serve a call."""

    name: str
    devices: tuple[str, ...]
    missing: Callable[[str], str | None]  # device type -> why nothing of it can run there
    why_not: Callable[[OpSpec, Args], str | None]
    run: Callable[[OpSpec, Args], object]


def _first(args: Args) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else tensors_of(args)[0]


def _map_tensors(args: Args, function) -> Args:
    return tuple(
        function(arg)
        if isinstance(arg, Tensor)
        else [function(t) for t in arg]
        if isinstance(arg, (list, tuple))
        else arg
        for arg in args
    )


def _contiguous(args: Args) -> Args:
    return type(args)(_map_tensors(args, Tensor.contiguous))


def _dtype(args: Args) -> torch.dtype:
    found = _first(args).dtype
    return found if found.is_floating_point else next(t.dtype for t in tensors_of(args) if t.is_floating_point())


# reference ------------------------------------------------------------------------------------------------------


_AUTOGRAD_KEYS = [
    key
    for name, key in torch._C.DispatchKey.__members__.items()
    if name in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView")
]


def _run_reference(spec: OpSpec, args: Args):
    device_type = _first(args).device.type
    if torch.is_autocast_enabled(device_type):  # the inputs have been cast
        with torch.autocast(device_type, enabled=False):
            return _run_reference(spec, args)
    differentiates = spec.gradient_of or spec.second_order == "loop"
    outputs = _differentiating(spec.reference, args) if differentiates else spec.reference(*args)
    return outputs.contiguous() if isinstance(outputs, Tensor) else _contiguous(outputs)


def _differentiating(reference: Callable, args: Args):
    """Run a reference that differentiates: that of a backward op, or an inner loop.

    Below the dispatcher autograd is switched off by key, without a word: switch it on again.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # its tensors cannot be differentiated, copies made outside it can
            return _differentiating(reference, _map_tensors(args, torch.clone))
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.no_grad():
        return reference(*args)


# cpp and cuda: the compiled extension ---------------------------------------------------------------------------


def _native_missing(device_type: str) -> str | None:
    if native.why_missing is not None:
        return f"{native.why_missing}; pip install --no-build-isolation . (or make build) builds it"
    if not native.has_kernel("pairwise_distance", device_type):
        return (
            "the native extension was built without CUDA kernels; FASTMETA_BUILD_CUDA=1 pip install "
            "--no-build-isolation . builds them, given nvcc and a CUDA build of torch"
        )
    return None


_NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}


def _native_why_not(spec: OpSpec, args: Args) -> str | None:
    return _native_dtype_why_not(spec, _first(args).device.type, _dtype(args))


def _native_dtype_why_not(spec: OpSpec, device_type: str, dtype: torch.dtype) -> str | None:
    if not native.has_kernel(spec.name, device_type):
        return f"the native extension holds no {spec.name} for {device_type}; make build (or pip install) brings it"
    allowed = _NATIVE_DTYPES["cpu" if spec.second_order == "loop" else device_type]
    if dtype not in allowed:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        return f"dtype {str(dtype).removeprefix('torch.')} is not one of {allowed}"
    return None


@cache
def _native_op(name: str):
    return getattr(torch.ops.fastmeta_native, name).default


def _run_native(spec: OpSpec, args: Args):
    return _native_op(spec.name)(*native_arguments(spec, args))


def native_arguments(spec: OpSpec, args: Args) -> list:
    passed = list(_shared_once(args) if spec.shares else args)
    for position, _, many in spec.tensor_arguments:
        arg = passed[position]
        if many:
            passed[position] = [t if t.is_contiguous() else t.contiguous() for t in arg]
        elif not arg.is_contiguous():
            passed[position] = arg.contiguous()
    for position, name in spec.string_arguments:
        passed[position] = _ENUMS[name].index(passed[position])
    return passed


def _shared_once(args: Args) -> Args:
    """Tensors that were expanded over the tasks as the one that all share, which costs no copy."""
    tensors = tensors_of(args)
    repeats = [t.stride(0) == 0 and t.shape[0] > 1 for t in tensors]
    if True not in repeats or all(r or t.shape[0] == 1 for t, r in zip(tensors, repeats, strict=True)):
        return args  # in the last case nothing else says how many tasks there are
    return _map_tensors(args, lambda t: t[:1] if t.stride(0) == 0 and t.shape[0] > 1 else t)


# triton ---------------------------------------------------------------------------------------------------------


@cache
def _triton_kernels():
    return importlib.import_module("fastmeta.kernels")


def _triton_missing(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton brings it"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors run in Triton's interpreter only; set TRITON_INTERPRET=1 before Python starts"
    return None


def _triton_why_not(spec: OpSpec, args: Args) -> str | None:
    return _triton_kernels().why_not(spec.name, *args)


def _run_triton(spec: OpSpec, args: Args):
    kernels = importlib.import_module(f"fastmeta.kernels.{spec.file}")
    return getattr(kernels, spec.name)(*_contiguous(_shared_once(args) if spec.shares else args))


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cuda", ("cuda",), _native_missing, _native_why_not, _run_native),
        Backend("cpp", ("cpu",), _native_missing, _native_why_not, _run_native),
        Backend("triton", ("cuda", "cpu"), _triton_missing, _triton_why_not, _run_triton),
        Backend("reference", ("cpu", "cuda"), lambda device_type: None, lambda spec, args: None, _run_reference),
    )
}
# in order of preference; the interpreter is for tests, so Triton is no automatic choice on the CPU
AUTOMATIC = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


def _known(name: str, where: str) -> str:
    return values.choice(where, name, tuple(BACKENDS))


_from_environment = os.environ.get("FASTMETA_BACKEND") or None
_forced: list[str] = []  # of the process, not of a thread: autograd runs CUDA backwards in threads of its own


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on backend `name`: "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: no backend of that name; inside the block, a call that the backend cannot serve.
    """
    _forced.append(_known(name, "use_backend(name)"))
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The backend asked for by `use_backend` or `FASTMETA_BACKEND`, if any."""
    if _forced:
        return _forced[-1]
    return None if _from_environment is None else _known(_from_environment, "FASTMETA_BACKEND")


@cache
def why_missing(name: str, device_type: str) -> str | None:
    """Why backend `name` can run nothing on tensors of `device_type`; None if it can."""
    backend = BACKENDS[name]
    if device_type not in backend.devices:
        return f"it serves {' and '.join(backend.devices)} tensors, not {device_type}"
    return backend.missing(device_type)


def why_not(name: str, spec: OpSpec, args: Args) -> str | None:
    """Why backend `name` cannot serve this call, as a sentence; None if it can."""
    if name not in spec.backends:
        return f"{name} has no kernel for {spec.name}; {', '.join(spec.backends)} have"
    return why_missing(name, _first(args).device.type) or BACKENDS[name].why_not(spec, args)


@cache
def _cpu_choice(name: str, dtype: torch.dtype) -> Backend:
    """On the CPU nothing but the op and its dtype decides."""
    spec = REGISTRY[name]
    for backend in AUTOMATIC["cpu"]:
        if backend in spec.backends and why_missing(backend, "cpu") is None:
            if backend == "reference" or _native_dtype_why_not(spec, "cpu", dtype) is None:
                return BACKENDS[backend]
    raise AssertionError("the reference serves every call")


def choose(spec: OpSpec, args: Args) -> Backend:
    """The backend that runs this call."""
    forced = forced_backend()
    if forced is not None:
        reason = why_not(forced, spec, args)
        if reason is not None:
            raise ValueError(f"backend {forced} was asked for, but cannot run {spec.name}: {reason}")
        return BACKENDS[forced]
    first = _first(args)
    if first.is_cpu:
        return _cpu_choice(spec.name, _dtype(args))
    for name in AUTOMATIC[first.device.type]:
        if why_not(name, spec, args) is None:
            return BACKENDS[name]
    raise AssertionError("the reference serves every call")


def run(spec: OpSpec, args: Args):
    """Check what only the data tells, choose a backend and run the op on it."""
    if spec.check is not None:
        spec.check(*args)
    backend = choose(spec, args)
    calls[spec.name, backend.name] += 1
    return backend.run(spec, args)


def run_with_gradient(spec: OpSpec, args: Args, needs: int, wants_mean: bool, scale: Tensor):
    """The outputs, and the gradients of the sum of `scale` `[T]` or `[1]` times the first, in one pass; None where no
    kernel has that.

    On a GPU only where it is sure that they are wanted: whether another gradient is asked for cannot be seen there
    without waiting.
    """
    device_type = _first(args).device.type
    if not (wants_mean or device_type == "cpu") or not gives_gradient(spec, args):
        return None
    return run_native_gradient(spec, args, native_arguments(spec, args), needs, scale)


def gives_gradient(spec: OpSpec, args: Args) -> bool:
    """Whether the backend that runs this call has a kernel that finds outputs and gradient at once."""
    device_type = _first(args).device.type
    return native.has_kernel(f"{spec.name}_with_gradient", device_type) and choose(spec, args).run is _run_native


def run_native_gradient(spec: OpSpec, args: Args, native: list, needs: int, scale: Tensor):
    """`run_with_gradient` where `gives_gradient`; `native` are the `native_arguments` of `args`."""
    if spec.check is not None:
        spec.check(*args)
    first = _first(args)
    calls[spec.name, "cpp" if first.is_cpu else "cuda"] += 1
    found = _native_op(f"{spec.name}_with_gradient")(*native, scale, needs)
    outputs = len(found) - len(spec.differentiable)
    return found[0] if outputs == 1 else tuple(found[:outputs]), found[outputs:]


def has_shaped_update(spec: OpSpec, args: Args) -> bool:
    """Whether `run_shaped_update` may run this `fast_weight_update`, where no backend is asked for."""
    device_type = _first(args).device.type
    return (
        native.has_kernel("fast_weight_update_shaped", device_type)
        and forced_backend() is None
        and choose(spec, args).run is _run_native
    )


def run_shaped_update(params, grads, lrs, lr: float, tasks: int, columns: list[int]) -> list[Tensor]:
    """`fast_weight_update` of contiguous tensors of any shape, as `[tasks, columns]` or what repeats to that."""
    calls["fast_weight_update", "cpp"] += 1
    return _native_op("fast_weight_update_shaped")(list(params), list(grads), list(lrs), lr, tasks, columns)
