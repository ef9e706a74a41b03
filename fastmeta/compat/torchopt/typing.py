"""`torchopt.typing`: names for annotations."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.futures import Future

from .base import ChainedGradientTransformation, EmptyState, GradientTransformation, UninitializedState

T = TypeVar("T")
Device = torch.device | str | int
Scalar = float | int | bool
Numeric = Tensor | Scalar
Schedule = Callable[[Numeric], Numeric]
ScalarOrSchedule = float | Schedule
PyTree = TensorTree = OptionalTensorTree = Params = Updates = OptState = Any
OptionalTensor = Tensor | None
ListOfTensors, ListOfOptionalTensors = list[Tensor], list[OptionalTensor]
TupleOfTensors, TupleOfOptionalTensors = tuple[Tensor, ...], tuple[OptionalTensor, ...]
SequenceOfTensors, SequenceOfOptionalTensors = Sequence[Tensor], Sequence[OptionalTensor]
TensorOrTensors = Tensor | SequenceOfTensors
OptionalTensorOrOptionalTensors = OptionalTensor | SequenceOfOptionalTensors
TensorContainer = dict[str, OptionalTensor]
ModuleTensorContainers = tuple[TensorContainer, ...]
LinearSolver = Callable[[Callable[[TensorTree], TensorTree], TensorTree], TensorTree]
Size = torch.Size
SampleFunc = Callable[[Size], Tensor | Sequence[Numeric]]
_SCALAR = Size()


@runtime_checkable
class Samplable(Protocol):
    """What has `sample(sample_shape)`, as torch's distributions have."""

    @abc.abstractmethod
    def sample(self, sample_shape: Size = _SCALAR) -> Tensor | Sequence[Numeric]:
        raise NotImplementedError

__all__ = [
    "ChainedGradientTransformation",
    "Device",
    "Distribution",
    "EmptyState",
    "Future",
    "GradientTransformation",
    "LinearSolver",
    "ListOfOptionalTensors",
    "ListOfTensors",
    "ModuleTensorContainers",
    "Numeric",
    "OptState",
    "OptionalTensor",
    "OptionalTensorOrOptionalTensors",
    "OptionalTensorTree",
    "Params",
    "PyTree",
    "Samplable",
    "SampleFunc",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "SequenceOfOptionalTensors",
    "SequenceOfTensors",
    "Size",
    "Tensor",
    "TensorContainer",
    "TensorOrTensors",
    "TensorTree",
    "TupleOfOptionalTensors",
    "TupleOfTensors",
    "UninitializedState",
    "Updates",
]
