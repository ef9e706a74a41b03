"""The kernels of fastmeta as the kernels hub hands them out: its ops without their gradients.

`csrc/fastmeta.cpp` lists them, arguments and results included; `x_bwd` is the gradient of `x`. They compute on the
device that a build is for. What is differentiable, takes any strides and dtypes and checks what it is given is the
Python package fastmeta, which calls the same kernels.
"""

import torch

from ._ops import ops


def _needs_gradient(argument) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_needs_gradient, argument))
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def __getattr__(name: str):
    kernel = getattr(ops, name)

    def call(*args):
        if torch.is_grad_enabled() and _needs_gradient(args):
            raise RuntimeError(
                f"{name}: a tensor requires a gradient, and this kernel records none. Call it under torch.no_grad(), "
                "or use the package fastmeta, whose functions are differentiable"
            )
        return kernel(*args)

    call.__name__ = name
    return call
