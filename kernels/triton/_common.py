"""What all kernels share: the way to launch one, tile sizes, TF32, and activations with their derivatives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1  # of grid.x; the other axes end at 65535, so no kernel uses them
MAX_PIXELS = 2**30  # which kernels count in 32 bits, up to the end of a block
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INNER_LOOP_DTYPES = (torch.float32, torch.float64)  # half precision has no digits left after some steps
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
METRICS = ("sqeuclidean", "euclidean", "cosine", "dot", "manhattan")
ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid", "silu", "gelu", "sine")


# launching ------------------------------------------------------------------------------------------------------

# multiply and add in one rounding; the default differs between versions of Triton
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded in place of being run."""

    kernel: object
    arguments: tuple
    constants: dict
    options: dict


_recorded: list[Launch] | None = None


@contextmanager
def record_launches():
    """Collect launches without running them: what the ahead-of-time compilation goes by. Meta tensors will do."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _tensors(values: Iterable):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def launch(kernel, programs: int, *arguments, num_warps: int = 4, maxnreg: int | None = None, **constants) -> None:
    """Run `programs` programs of `kernel` on the device of its tensors; none is none, not an error.

    maxnreg: registers that a thread may have, where the assembler should not decide.
    """
    if programs == 0:
        return
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{kernel.__name__}: {programs} programs > {MAX_PROGRAMS} of a grid")
    options = {"num_warps": num_warps, **OPTIONS, **({} if maxnreg is None else {"maxnreg": maxnreg})}
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, constants, options))
        return
    device = next(_tensors(arguments)).device
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        kernel[(programs,)](*arguments, **options, **constants)


# sizes and types ------------------------------------------------------------------------------------------------


def tile(size: int, most: int, least: int = 1) -> int:
    """Side of a tile over `size` elements: a power of two from `least` to `most`."""
    return max(least, min(most, triton.next_power_of_2(max(size, 1))))


def step(most: int) -> int:
    """Longest step along a dimension that a kernel sums, `most` on a GPU.

    The interpreter's time goes by the number of steps, not by their size: longer ones there, though the loop remains.
    """
    return 64 if INTERPRETED else most


def blocks(size: int, side: int) -> int:
    """How many tiles cover `size` elements."""
    return -(-size // side)


def warps(elements: int) -> int:
    """Warps for a tile of so many elements: small tiles would leave most threads of a full block idle."""
    return 1 if elements <= 128 else 2 if elements <= 512 else 4


def leading_size(tensors: Iterable[Tensor]) -> int:
    """Number of tasks of tensors whose leading size is that number, or 1 where the tasks share them."""
    return next((t.shape[0] for t in tensors if t.shape[0] != 1), 1)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in, and scratch between two kernels is kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def tf32(dtype: torch.dtype) -> bool:
    """Whether `tl.dot` multiplies in TF32: where the user allows it, and half precision, which TF32 holds exactly."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return allowed or dtype in (torch.float16, torch.bfloat16)


# inside kernels -------------------------------------------------------------------------------------------------


@triton.jit
def multiply_add(a, b, total, TF32: tl.constexpr):
    """`total + a @ b`, for `a [M, K]`, `b [K, N]`."""
    if total.dtype == tl.float64:
        # tl.dot takes float64 on some versions and chips only
        return total + tl.sum(tl.trans(a)[:, :, None] * b[:, None, :], 0)
    else:
        return tl.dot(a, b, total, input_precision="tf32" if TF32 else "ieee")


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # near 0 the exponential form cancels: there Cephes' rational approximation, good to two units in the last place
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    size = tl.abs(x)
    large = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.625, x + x * z * (p / q), tl.where(x < 0, -large, large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Numbers as in `ACTIVATIONS`."""
    if ACTIVATION == 0:
        return x
    elif ACTIVATION == 1:
        return tl.where(x <= 0, 0.0, x)  # so that NaN stays NaN
    elif ACTIVATION == 2:
        return _tanh(x)
    elif ACTIVATION == 3:
        return _sigmoid(x)
    elif ACTIVATION == 4:
        return x * _sigmoid(x)
    elif ACTIVATION == 5:
        return 0.5 * x * (1 + tl.erf(x * 0.70710678118654752440))
    else:
        return tl.sin(x)


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    """Derivative of `activate` at `x`."""
    if ACTIVATION == 0:
        return tl.full(x.shape, 1, x.dtype)
    elif ACTIVATION == 1:
        return tl.where(x <= 0, tl.full(x.shape, 0, x.dtype), 1.0)
    elif ACTIVATION == 2:
        e = tl.exp(-2 * tl.abs(x))  # 1 - tanh^2 would cancel where tanh is near 1
        return 4 * e / ((1 + e) * (1 + e))
    elif ACTIVATION == 3:
        return _sigmoid(x) * _sigmoid(-x)
    elif ACTIVATION == 4:
        return _sigmoid(x) * (1 + x * _sigmoid(-x))
    elif ACTIVATION == 5:
        density = 0.39894228040143267794 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.70710678118654752440)) + x * density
    else:
        return tl.cos(x)


@triton.jit
def activation_bend(x, ACTIVATION: tl.constexpr):
    """Second derivative of `activate` at `x`, for those that have one."""
    if ACTIVATION == 2:
        return -2 * activate(x, 2) * activation_slope(x, 2)
    elif ACTIVATION == 3:
        return activation_slope(x, 3) * (1 - 2 * activate(x, 3))
    elif ACTIVATION == 4:
        s = activate(x, 3)
        return activation_slope(x, 3) * (2 + x * (1 - 2 * s))
    elif ACTIVATION == 5:
        return 0.39894228040143267794 * tl.exp(-0.5 * x * x) * (2 - x * x)
    else:
        return -tl.sin(x)
