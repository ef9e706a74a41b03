"""The parameters that an inner loop has adapted, task by task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._rows import Group, in_order


class FastWeights:
    """What `adapt` returns where weights adapt, as in `MAML`: the adapted parameters of `T` tasks.

    `state[t]` is task `t`'s own `{name: tensor}`, ready for `torch.func.functional_call(model, state[t],
    (x,))`; `state.stacked()` holds all tasks, `[T, *shape]` per name; `len(state)` is `T`. Parameters that no
    step has changed (`inner_steps=0`, or frozen by `requires_grad=False`) are stored once and expanded on
    reading.
    """

    def __init__(self, weights: dict[str, Tensor], shared: frozenset[str], num_tasks: int):
        self.weights = weights
        self.shared = shared
        self.num_tasks = num_tasks

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, task: int) -> dict[str, Tensor]:
        if not -self.num_tasks <= task < self.num_tasks:
            raise IndexError(f"task {task} of {self.num_tasks}")
        return {name: w if name in self.shared else w[task] for name, w in self.weights.items()}

    def stacked(self) -> dict[str, Tensor]:
        """All tasks' parameters, `[T, *shape]` by name."""
        return {
            name: w.expand(self.num_tasks, *w.shape) if name in self.shared else w for name, w in self.weights.items()
        }

    def of_tasks(self, tasks: Tensor) -> FastWeights:
        """Those of some tasks, int64 `[t]`, in that order."""
        return FastWeights(
            {name: w if name in self.shared else w[tasks] for name, w in self.weights.items()}, self.shared, len(tasks)
        )

    @classmethod
    def joined(cls, parts: Sequence[FastWeights], groups: Sequence[Group]) -> FastWeights:
        """Those of all tasks, from those of groups of them."""
        shared = frozenset.intersection(*(part.shared for part in parts))
        stacked = [part.stacked() for part in parts]
        weights = {
            name: w if name in shared else in_order([of_group[name] for of_group in stacked], groups)
            for name, w in parts[0].weights.items()
        }
        return cls(weights, shared, sum(map(len, parts)))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(w.shape)}" for name, w in self.stacked().items())
        return f"FastWeights({self.num_tasks} tasks: {shapes})"
