"""Linear layers with low-rank fast weights, and how a module's `forward` is made to use them.

`forward` runs under `torch.func.vmap`, and each call of a linear layer in it is answered, over all tasks at once, with
`x W^T + b - lr sum_j (x A_j^T + 1) D_j`: one dense product with the slow weight, and per task a few rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastmeta.functional import functional_mlp

from ._trace import PathChanged, Use, can_probe, is_harmless, linear_arguments, mentioned


class LowRank:
    """A linear layer's fast weights: slow weight and bias, and the rows that have changed them.

    The rows are kept in blocks, merged like the digits of a binary counter: `K` steps leave at most `log2 K + 1` blocks
    to multiply with, and copying, and what autograd keeps of it, stays at `K log K` rows where one growing block has
    `K^2`. A layer that is given the examples themselves sees the same rows in every step: then there is one block, and
    the products that do not change are computed once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, constant: bool = False):
        self.weight, self.bias = weight, bias
        self.blocks: list[tuple[Tensor, Tensor]] = []  # inputs [T, r, I] and -lr times gradients [T, r, O]
        self.is_constant = constant
        self.products: list[Tensor] = []  # of a constant layer: dense product [T, r, O] and gram matrix [T, r, r]

    def append(self, inputs: Tensor, deltas: Tensor) -> None:
        if self.is_constant and self.blocks:
            known, sum_of_deltas = self.blocks[0]
            # an input that is the same part of the support set is the same rows, with no need to compare them
            if (inputs.data_ptr(), inputs.shape, inputs.stride()) != (known.data_ptr(), known.shape, known.stride()):
                raise PathChanged
            self.blocks = [(known, sum_of_deltas + deltas)]
            return
        if self.is_constant:
            self.products = [F.linear(inputs, self.weight, self.bias), gram(inputs, inputs, self.bias is not None)]
        self.blocks.append((inputs, deltas))
        while len(self.blocks) > 1 and self.blocks[-1][0].shape[1] >= self.blocks[-2][0].shape[1]:
            self._merge(2)

    def finish(self) -> None:
        """All rows in one block: a query set has more rows to read them than they are themselves."""
        if len(self.blocks) > 1:
            self._merge(len(self.blocks))

    def _merge(self, count: int) -> None:
        last = self.blocks[-count:]
        self.blocks[-count:] = [tuple(torch.cat(tensors, 1) for tensors in zip(*last, strict=True))]

    def dense(self, num_tasks: int) -> tuple[Tensor, Tensor | None]:
        """The fast weight `[T, O, I]` and bias `[T, O]`, formed."""
        weight = self.weight.expand(num_tasks, *self.weight.shape)
        bias = None if self.bias is None else self.bias.expand(num_tasks, *self.bias.shape)
        for inputs, deltas in self.blocks:
            weight = torch.baddbmm(weight, deltas.mT, inputs)
            bias = None if bias is None else bias + deltas.sum(1)
        return weight, bias


def gram(rows: Tensor, inputs: Tensor, bias: bool) -> Tensor:
    """`rows inputs^T`, plus 1 for a bias, whose input is always 1: `[..., B, I]`, `[..., r, I]` -> `[..., B, r]`."""
    product = rows @ inputs.mT
    return product + 1 if bias else product


class Mapped(NamedTuple):
    """What vmap maps of the linear layers."""

    blocks: dict[str, list[tuple[Tensor, Tensor]]]  # by weight
    products: dict[str, list[Tensor]]  # by weight
    probes: list[Tensor]  # [rows, O] by use


class Answer(TorchFunctionMode):
    """Answers the calls of linear layers; to be entered inside `torch.func.vmap`.

    With `uses`, those of the trace, every call gets its probe, and `inputs` collects what it was given, `[rows, I]`.
    """

    def __init__(self, layers: Mapping[str, LowRank], uses: Sequence[Use] | None, mapped: Mapped):
        super().__init__()
        self.layers = {id(layer.weight): (name, layer) for name, layer in layers.items()}
        self.names = {id(t): n for n, layer in layers.items() for t in (layer.weight, layer.bias) if t is not None}
        self.uses, self.mapped = uses, mapped
        self.level = torch._C._functorch.maybe_current_level()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = linear_arguments(*args, **kwargs)
            if id(weight) in self.layers:
                name, layer = self.layers[id(weight)]
                if (layer.bias is not None and layer.bias is not bias) or mentioned(self.names, x):
                    raise PathChanged
                z = self._linear(name, layer, x)
                # left over: a bias that is frozen, or has a copy per task
                return z if bias is None or bias is layer.bias else z + bias
        if not is_harmless(func) and mentioned(self.names, (args, kwargs)):
            raise PathChanged
        return func(*args, **kwargs)

    def _linear(self, name: str, layer: LowRank, x: Tensor) -> Tensor:
        blocks = self.mapped.blocks[name]
        rows = x.reshape(-1, x.shape[-1])
        if self.uses is None:
            if torch._C._functorch.maybe_current_level() != self.level:
                raise PathChanged
            (block,) = blocks  # as `LowRank.finish` left them
            return QueryLinear.apply(rows, layer.weight, layer.bias, *block).view(*x.shape[:-1], layer.weight.shape[0])
        use, count = Use(name, (*x.shape[:-1], layer.weight.shape[0])), len(self.inputs)
        if not can_probe(self.level) or count == len(self.uses) or self.uses[count] != use:
            raise PathChanged
        self.inputs.append(rows)
        if layer.products:
            dense, inner = self.mapped.products[name]
            z = dense + inner @ blocks[0][1]
        else:
            z = F.linear(rows, layer.weight, layer.bias)  # under vmap: one product, for the weight is not mapped
            for inputs, deltas in blocks:
                z = torch.addmm(z, gram(rows, inputs, layer.bias is not None), deltas)
        return (z + self.mapped.probes[count]).view(use.shape)


class QueryLinear(torch.autograd.Function):
    """`x W^T + b + (x A^T + 1) D` under `torch.func.vmap`: `[B, I]`, `[O, I]`, `[O]` or None, `[r, I]`, `[r, O]` to
    `[B, O]`, where weight and bias are not mapped.

    In torch's own operations `addmm` makes five passes over its result there, and the gradient of `x` is a sum of two
    products: many query rows feel that. Each is one product that adds in place here.
    """

    @staticmethod
    def forward(x, weight, bias, inputs, deltas):
        return F.linear(x, weight, bias) + gram(x, inputs, bias is not None) @ deltas

    @staticmethod
    def setup_context(ctx, arguments, output):
        raise AssertionError("to be called under vmap")

    @staticmethod
    def vmap(info, in_dims, x, weight, bias, inputs, deltas):
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transformed or in_dims != (0, None, None, 0, 0):
            return torch.func.vmap(QueryLinear.forward, in_dims)(x, weight, bias, inputs, deltas), 0
        return _QueryLinear.apply(x, weight, bias, inputs, deltas), 0


class _QueryLinear(torch.autograd.Function):
    """The same of all tasks, `[T, B, I]`, outside of vmap."""

    @staticmethod
    def forward(ctx, x, weight, bias, inputs, deltas):
        inner = gram(x, inputs, bias is not None)
        ctx.save_for_backward(x, weight, inputs, deltas, inner)
        ctx.has_bias = bias is not None
        if x.is_cpu:  # faster here than the vendor library
            return functional_mlp(x, [weight], None if bias is None else [bias]).baddbmm_(inner, deltas)
        return torch.baddbmm(F.linear(x, weight, bias), inner, deltas)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inputs, deltas, inner = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, and so with respect to what this is made of
            inner = gram(x, inputs, ctx.has_bias)
        needs, rows = ctx.needs_input_grad, grad.flatten(0, 1)
        through = grad @ deltas.mT if needs[0] or needs[3] else None  # not of the examples themselves
        return (
            (grad @ weight).baddbmm_(through, inputs) if needs[0] else None,
            rows.mT @ x.flatten(0, 1) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
            through.mT @ x if needs[3] else None,
            inner.mT @ grad if needs[4] else None,
        )
