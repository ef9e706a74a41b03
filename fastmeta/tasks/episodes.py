"""Few-shot episodes from a tensor of images: a task batch is one gather, on the device where the images lie."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_images, check_sizes


def subsets(rows: int, population: int, size: int, *, device, generator: torch.Generator | None = None) -> Tensor:
    """`rows` uniform random subsets of `size` of `range(population)`, in random order, int64 `[rows, size]`.

    Floyd's algorithm (Bentley and Floyd 1987) on all rows at once: `size` steps, whatever the population, and no wait
    for the device.
    """
    chosen = torch.empty(rows, size, dtype=torch.int64, device=device)
    for i in range(size):
        last = population - size + i
        draw = torch.randint(last + 1, (rows,), device=device, generator=generator)
        taken = (chosen[:, :i] == draw.unsqueeze(1)).any(1)
        chosen[:, i] = torch.where(taken, last, draw)
    order = torch.rand(rows, size, device=device, generator=generator).argsort(1)
    return chosen.gather(1, order)


class EpisodeSampler:
    """N-way episodes: classes without replacement, and of each class disjoint support and query instances.

    Args:
        images: `[classes, instances, C, H, W]` uint8, of which 255 is 1.0, or floating.
        ways: N, classes per task.
        shots: support examples per class; S = N * shots, ordered by class.
        query_shots: query examples per class; Q = N * query_shots, ordered by class.
        rotations: every rotation by 90 degrees of a class is a class of its own, as usual with Omniglot.
        name: for messages.

    `sample` gives inputs float32 `[T, S, C, H, W]` and `[T, Q, C, H, W]` with values in [0, 1], and labels int64 in
    [0, N). Needs `4 *` the memory of the images with rotations.

    Raises:
        ValueError: images of another shape, a size below 1, more ways than classes, or more examples than a class has.
        TypeError: images that are neither uint8 nor floating, a size that is no int.
    """

    kind = "classification"

    def __init__(
        self,
        images: Tensor,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        rotations: bool = False,
        name: str = "images",
    ):
        check_images(images, "[classes, instances, C, H, W]", 5, 5)
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        if values.flag("rotations", rotations):
            images = torch.cat([torch.rot90(images, turns, (-2, -1)) for turns in range(4)])
        classes, instances = images.shape[:2]
        if ways > classes:
            raise ValueError(f"ways must be at most {classes}, the classes of {name}, got {ways}")
        if shots + query_shots > instances:
            raise ValueError(
                f"shots + query_shots must be at most {instances}, the examples of a class of {name}, "
                f"got {shots} + {query_shots}"
            )
        self.images, self.name = images.contiguous(), name
        self.ways, self.shots, self.query_shots = ways, shots, query_shots

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[2:])

    @property
    def output_size(self) -> int:
        return self.ways

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` episodes, drawn with `generator` (of the images' device) or the global one."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.images.device)
        device, each = self.images.device, self.shots + self.query_shots
        classes, instances = self.images.shape[:2]
        drawn = {"device": device, "generator": generator}
        cls = subsets(num_tasks, classes, self.ways, **drawn).view(num_tasks, self.ways, 1)
        instance = subsets(num_tasks * self.ways, instances, each, **drawn).view(num_tasks, self.ways, each)
        index = cls * instances + instance
        flat = self.images.flatten(0, 1)
        labels = torch.arange(self.ways, device=device)

        def part(index: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
            x = flat[index.reshape(-1)].unflatten(0, (num_tasks, self.ways * per_class))
            x = x.float().div_(255) if x.dtype == torch.uint8 else x
            return x, labels.repeat_interleave(per_class).repeat(num_tasks, 1)

        support_x, support_y = part(index[:, :, : self.shots], self.shots)
        query_x, query_y = part(index[:, :, self.shots :], self.query_shots)
        return TaskBatch(support_x, support_y, query_x, query_y)
