"""What an op is: one `OpSpec` per op, and inputs to try it with.

Tests, benchmarks, the table of ops in the docs and `fastmeta info` iterate over `REGISTRY`, which `library.register`
fills.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# an argument of an op is a Tensor, a list of Tensors, or a plain int, float or str
Args = tuple[Any, ...]


@dataclass(frozen=True)
class Sample:
    """Arguments to try an op with: `args` at op level, `label` for the test's name."""

    label: str
    args: Args


@dataclass(frozen=True)
class Workload:
    """Arguments to time an op with, and the work that they ask for at least."""

    label: str
    args: Args
    flops: int
    bytes: int


@dataclass(frozen=True)
class OpSpec:
    """One op of namespace `fastmeta`.

    At op level every tensor has a leading task dimension, of size `T` or, where the tasks share it, 1.
    """

    name: str
    arguments: str  # as in a torch schema: "Tensor query, Tensor prototypes, str metric"
    returns: str
    summary: str
    reference: Callable  # plain torch, any dtype and device; in float64 it is the definition of correct
    fake: Callable  # the same arguments -> empty outputs
    differentiable: tuple[str, ...]  # arguments that have a gradient, in the order of the bits of `needs`
    backward: Callable  # (args, grads, needs) -> one gradient per differentiable argument
    samples: Callable[[Make], Iterable[Sample]]
    second_order: str = "closed"  # "closed", "explicit" or "loop"
    differentiable_outputs: int | None = None  # the first so many; None: all
    gradient_of: tuple[str, ...] = ()  # of a backward op: output i is the gradient of this argument
    # the arguments with those made anew that are functions of others: for finite differences
    consistent: Callable | None = None
    check: Callable | None = None  # refuses values that only the data tells, such as labels
    workloads: Callable[[Make], Iterable[Workload]] | None = None
    # a native `<name>_with_gradient` gives outputs, and gradients of the mean of the first, plain or weighted, in one
    # pass; the first output is `[T]`, the first argument `[T, ...]`
    with_gradient: bool = False
    lacks_gradients: bool = False  # its backward takes None in place of zeros for an output that nothing came back to
    per_task: bool = False  # tasks share nothing that has a gradient: each task's is a multiple of its loss's
    autocast: str = "float32"  # under autocast: "lower" as matmul, "float32" as a loss, "widest" as an addition
    source: str = ""
    backends: tuple[str, ...] = ("cuda", "cpp", "triton", "reference")  # those that have it
    shares: bool = False  # kernels take any tensor with a leading size of 1, and no result's shape depends on it
    exact_at_ties: bool = True
    may_share: tuple[str, ...] = ()  # arguments that mapped tasks may share, kept with a leading 1
    ranks: tuple[tuple[str, int], ...] = ()  # dimensions of lists that may come without the task dimension

    family: str = ""  # the file that it stands in, where that is not its name

    @cached_property
    def file(self) -> str:
        """The basename of the files with the op, on every backend: its own name, or whose gradient or part it is."""
        return self.family or self.name.split("_bwd")[0]

    @cached_property
    def schema(self) -> str:
        return f"{self.name}({self.arguments}) -> {self.returns}"

    @cached_property
    def argument_names(self) -> tuple[str, ...]:
        return tuple(re.split(r"[ =]", part.strip())[1] for part in self.arguments.split(","))

    @cached_property
    def argument_types(self) -> tuple[str, ...]:
        return tuple(part.strip().split(" ")[0] for part in self.arguments.split(","))

    @cached_property
    def differentiable_positions(self) -> tuple[int, ...]:
        return tuple(self.argument_names.index(name) for name in self.differentiable)

    @cached_property
    def bits(self) -> tuple[int | None, ...]:
        """By argument the bit of `needs`, None where there is no gradient."""
        bit_of = {position: bit for bit, position in enumerate(self.differentiable_positions)}
        return tuple(bit_of.get(position) for position in range(len(self.argument_names)))

    @cached_property
    def tensor_arguments(self) -> tuple[tuple[int, int | None, bool], ...]:
        """Of each argument that is a tensor or a list of them its position, its bit and whether it is a list."""
        kinds = enumerate(zip(self.argument_types, self.bits, strict=True))
        return tuple((i, bit, "[]" in kind) for i, (kind, bit) in kinds if kind.startswith("Tensor"))

    @cached_property
    def string_arguments(self) -> tuple[tuple[int, str], ...]:
        """Positions and names."""
        kinds = zip(self.argument_names, self.argument_types, strict=True)
        return tuple((position, name) for position, (name, kind) in enumerate(kinds) if kind == "str")

    @cached_property
    def rank_by_position(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.argument_names.index(name), rank) for name, rank in self.ranks)


REGISTRY: dict[str, OpSpec] = {}


class Make:
    """Fresh random inputs for samples and workloads: one dtype, one device, one seed."""

    def __init__(self, dtype=torch.float64, device="cpu", seed: int = 0):
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        # drawn in float64 and rounded, so that every dtype sees the same numbers
        return (torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale).to(self.device, self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * draw).to(self.device, self.dtype)

    def labels(self, num_classes: int, *shape: int) -> Tensor:
        if num_classes == 0:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)
        return torch.randint(num_classes, shape, generator=self.generator).to(self.device)

    def balanced_labels(self, num_tasks: int, num_classes: int, per_class: int) -> Tensor:
        return torch.arange(num_classes, device=self.device).repeat_interleave(per_class).repeat(num_tasks, 1)


def leading_size(tensors: Iterable[Tensor]) -> int:
    """Number of tasks of tensors whose leading size is that number, or 1 where the tasks share them."""
    return next((t.shape[0] for t in tensors if t.shape[0] != 1), 1)
