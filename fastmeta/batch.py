"""What a sampler returns, and a learner takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastmeta._trees import first, tree_map

_FIELDS = ("support_x", "support_y", "query_x", "query_y", "support_mask", "query_mask")


class TaskBatch(tuple):
    """`T` tasks: inputs `[T, S, ...]` and `[T, Q, ...]`, targets int64 labels `[T, S]` or values `[T, S, O]`.

    Inputs may be tuples, lists, dicts, named tuples and dataclasses of such tensors, as the model takes them; so may
    targets, for a loss that takes them.

    Tasks of unequal size are padded to one; `support_mask` `[T, S]` and `query_mask` `[T, Q]`, bool, say which rows are
    a task's own: each task then gets what it would get alone. None: all rows are.

    A named tuple of as many fields as there is something in: the four tensors, and behind them the two masks where
    there is one. So `support_x, support_y, query_x, query_y = batch` takes whole tasks, and never drops a mask.
    """

    __slots__ = ()

    def __new__(
        cls,
        support_x: Tensor,
        support_y: Tensor,
        query_x: Tensor,
        query_y: Tensor,
        support_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> TaskBatch:
        masks = () if support_mask is None and query_mask is None else (support_mask, query_mask)
        return super().__new__(cls, (support_x, support_y, query_x, query_y, *masks))

    @classmethod
    def of(cls, batch) -> TaskBatch:
        """`batch` as it is, or a list or tuple of the four tensors, or of these and both masks."""
        if isinstance(batch, cls):
            return batch
        if not isinstance(batch, (list, tuple)):
            raise TypeError(f"batch must be a TaskBatch, or a list or tuple of its fields, got {type(batch).__name__}")
        if len(batch) not in (4, 6):
            fields = ", ".join(_FIELDS[:4])
            raise ValueError(f"batch must have the fields {fields}, and both masks or none; got {len(batch)} fields")
        return cls(*batch)

    @property
    def _fields(self) -> tuple[str, ...]:  # not of the class: what reads a named tuple's there counts on all of them
        return _FIELDS[: len(self)]

    @classmethod
    def _make(cls, fields) -> TaskBatch:
        return cls(*fields)

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(_FIELDS, (*self, None, None), strict=False))

    def _replace(self, **fields) -> TaskBatch:
        return TaskBatch(**(self._asdict() | fields))

    def __getnewargs__(self) -> tuple:
        return tuple(self)

    def __repr__(self) -> str:
        return f"TaskBatch({', '.join(f'{name}={value!r}' for name, value in zip(self._fields, self, strict=False))})"

    @property
    def support_x(self) -> Tensor:
        return self[0]

    @property
    def support_y(self) -> Tensor:
        return self[1]

    @property
    def query_x(self) -> Tensor:
        return self[2]

    @property
    def query_y(self) -> Tensor:
        return self[3]

    @property
    def support_mask(self) -> Tensor | None:
        return self[4] if len(self) > 4 else None

    @property
    def query_mask(self) -> Tensor | None:
        return self[5] if len(self) > 4 else None

    @property
    def num_tasks(self) -> int:
        return len(first(self.support_x))

    def to(self, *args, **kwargs) -> TaskBatch:
        """Every tensor moved and floating ones converted, as by `nn.Module.to`: labels and masks keep their dtype."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        return TaskBatch(*(tree_map(moved, part) for part in self))


pytree.register_pytree_node(
    TaskBatch,
    lambda batch: (list(batch), None),
    lambda parts, _: TaskBatch(*parts),
    serialized_type_name="fastmeta.TaskBatch",
)
