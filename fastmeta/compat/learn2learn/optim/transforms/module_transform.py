"""Any module as a transform of gradients that are one long row."""

from __future__ import annotations

from torch import Tensor, nn


class ReshapedTransform(nn.Module):
    """`transform` on gradients of shape `shape`, which come back in their own."""

    def __init__(self, transform: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.transform = transform
        self.in_shape = shape

    def forward(self, grad: Tensor) -> Tensor:
        return self.transform(grad.reshape(self.in_shape)).reshape(grad.shape)


class ModuleTransform:
    """Called with a parameter of `n` elements, returns a transform of its gradient by `module_cls(n, n)`, which sees
    rows `[1, n]`."""

    def __init__(self, module_cls):
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        numel = parameter.numel()
        return ReshapedTransform(self.module_cls(numel, numel), (1, numel))
