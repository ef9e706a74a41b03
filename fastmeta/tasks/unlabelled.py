"""Tasks made from images without labels: augmentations of one image as a class (UMTRA), or a cluster (CACTUs)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks._arguments import check_images, check_sizes
from fastmeta.tasks.augment import HANDWRITING
from fastmeta.tasks.drawing import subsets
from fastmeta.tasks.rows import as_inputs

_AT_ONCE = 1024  # images through an encoder


class AugmentedTasks:
    """N random images are N classes, and augmentations of an image are the examples of its class (Khodadadeh et al.
    2019, "Unsupervised Meta-Learning for Few-Shot Image Classification" (UMTRA), algorithm 1).

    Two images of a task may show the same thing; the more classes the data has, the rarer (their section 3.1).

    Args:
        images: `[..., C, H, W]` uint8, of which 255 is 1.0, or floating. What stands before the last three dimensions
            is flattened: of `[classes, instances, C, H, W]` the classes are thrown away.
        ways: N, images per task.
        shots: support examples per image; S = N * shots, ordered by class.
        query_shots: query examples per image, all of them augmentations; Q = N * query_shots, ordered by class.
        augmentation: `(images [B, C, H, W], generator) -> [B, C, H, W]`, every image changed by itself; an
            `~fastmeta.tasks.augment.Augmentation`, by default one that suits handwriting.
        augment_support: False (the paper's) leaves the first support example of a class as it is; True augments it
            too, so that support and query are two views of one image, as contrastive learning has them.
        rotations: an image turned by 90, 180 or 270 degrees is an image of its own.
        name: for messages.

    `sample` gives inputs float32 `[T, S, C, H, W]` and `[T, Q, C, H, W]` and labels int64 in [0, N).

    Raises:
        ValueError: images of another shape, a size below 1, more ways than images. TypeError: images that are neither
            uint8 nor floating, an argument of another type.
    """

    kind = "classification"

    def __init__(
        self,
        images: Tensor,
        *,
        ways: int,
        shots: int = 1,
        query_shots: int = 1,
        augmentation: Callable[[Tensor, torch.Generator | None], Tensor] = HANDWRITING,
        augment_support: bool = False,
        rotations: bool = False,
        name: str = "images",
    ):
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        values.function("augmentation", augmentation)
        values.flag("augment_support", augment_support)
        self.images, self.name = _pool(images, rotations), name
        if ways > len(self.images):
            raise ValueError(f"ways must be at most {len(self.images)}, the images of {name}, got {ways}")
        self.ways, self.shots, self.query_shots = ways, shots, query_shots
        self.augmentation, self.augment_support = augmentation, augment_support

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def output_size(self) -> int:
        return self.ways

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the images' device) or the global one."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.images.device)
        device, plain = self.images.device, 0 if self.augment_support else 1
        chosen = subsets(num_tasks, len(self.images), self.ways, device=device, generator=generator)
        images = as_inputs(self.images[chosen.flatten()])
        each = self.shots + self.query_shots
        views = self.augmentation(images.repeat_interleave(each - plain, 0), generator)
        views = views.unflatten(0, (num_tasks, self.ways, each - plain))
        if plain:
            views = torch.cat([images.unflatten(0, (num_tasks, self.ways, 1)), views], 2)
        return _batch(views, self.shots)


class ClusterTasks:
    """Clusters are classes (Hsu, Levine and Finn 2019, "Unsupervised Learning via Meta-Learning", CACTUs, algorithm 1).

    A task takes one of the partitions, N of its clusters, and of each cluster disjoint support and query images.
    Clusters with fewer than `shots + query_shots` images are dropped.

    Args:
        images: as of `AugmentedTasks`: M images, without classes.
        partitions: int64 `[P, M]` or `[M]`, the cluster of each image in each partition, such as from
            `kmeans_partitions`; negative where it has none.
        ways: N, clusters per task.
        shots: support examples per class; S = N * shots, ordered by class.
        query_shots: query examples per class; Q = N * query_shots, ordered by class.
        rotations: a cluster turned by 90, 180 or 270 degrees is a cluster of its own.
        name: for messages.

    `sample` gives inputs float32 `[T, S, C, H, W]` and `[T, Q, C, H, W]` and labels int64 in [0, N).

    Raises:
        ValueError: shapes that do not fit, a size below 1, a partition with fewer than `ways` clusters that are large
            enough. TypeError: partitions that are not int64.
    """

    kind = "classification"

    def __init__(
        self,
        images: Tensor,
        partitions: Tensor,
        *,
        ways: int,
        shots: int = 1,
        query_shots: int = 1,
        rotations: bool = False,
        name: str = "images",
    ):
        check_sizes(ways=ways, shots=shots, query_shots=query_shots)
        self.images, self.name = _pool(images, rotations), name
        turns = 4 if rotations else 1
        count = len(self.images) // turns
        values.tensor("partitions", partitions)
        if partitions.dtype != torch.int64:
            raise TypeError(f"partitions must be int64, got {values.dtype_of(partitions)}")
        values.on_device("partitions", partitions)
        partitions = partitions.to(self.images.device)
        if partitions.dim() == 1:
            partitions = partitions.unsqueeze(0)
        if partitions.dim() != 2 or partitions.shape[1] != count:
            raise ValueError(f"partitions must have shape [P, M] or [M] with M = {count}, got {list(partitions.shape)}")
        self.ways, self.shots, self.query_shots = ways, shots, query_shots
        self._members, self._start, self._size, self._first, self._clusters = self._index(partitions, turns)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    @property
    def output_size(self) -> int:
        return self.ways

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, drawn with `generator` (of the images' device) or the global one."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The tasks `part` of the `num_tasks` of `sample`: all are drawn, and the rows of these gathered."""
        values.count("num_tasks", num_tasks, 0)
        values.generator("generator", generator, self.images.device)
        device, each = self.images.device, self.shots + self.query_shots
        partition = torch.randint(len(self._first), (num_tasks,), device=device, generator=generator)
        drawn = {"device": device, "generator": generator}
        cluster = subsets(num_tasks, self._clusters[partition], self.ways, **drawn)
        cluster = (cluster + self._first[partition].unsqueeze(1)).flatten()
        member = subsets(len(cluster), self._size[cluster], each, **drawn) + self._start[cluster].unsqueeze(1)
        row = self._members[member].view(num_tasks, self.ways, each)[part]
        return _batch(as_inputs(self.images[row.flatten()]).unflatten(0, row.shape), self.shots)

    def _index(self, partitions: Tensor, turns: int) -> tuple[Tensor, ...]:
        """All partitions' clusters one after the other: their members, where each begins and how long it is; and of
        each partition its first cluster and how many it has."""
        members, start, size, number = [], [], [], []
        begin, least, count = 0, self.shots + self.query_shots, partitions.shape[1]
        for row in partitions:
            order = row.argsort(stable=True)
            _, sizes = row[order].unique_consecutive(return_counts=True)
            starts = sizes.cumsum(0) - sizes
            kept = (sizes >= least) & (row[order][starts] >= 0) if count else sizes.bool()
            if int(kept.sum()) * turns < self.ways:
                raise ValueError(
                    f"ways must be at most {int(kept.sum()) * turns}, the clusters of {self.name} with at least "
                    f"shots + query_shots = {least} images, got {self.ways}"
                )
            for turn in range(turns):
                members.append(order + turn * count)
                start.append(starts[kept] + begin)
                size.append(sizes[kept])
                begin += count
            number.append(int(kept.sum()) * turns)
        clusters = torch.tensor(number, device=partitions.device)
        return torch.cat(members), torch.cat(start), torch.cat(size), clusters.cumsum(0) - clusters, clusters


def kmeans_partitions(embeddings: Tensor, clusters: int = 500, partitions: int = 1, *, seed: int = 0) -> Tensor:
    """Partitions by k-means, for `ClusterTasks`: int64 `[partitions, M]` on the CPU, with numbers in [0, clusters).

    The first is of the embeddings as they are; for the others every dimension is multiplied by a random number from
    N(0, 1) first, so that they differ (CACTUs, section 2.2 and its appendix on random scaling).

    Args:
        embeddings: `[M, ...]`, flattened: of an encoder (`embed_images`), or images, as pixels.
        clusters: k; at most M.
        partitions: P, at least 1.
        seed: of scikit-learn's MiniBatchKMeans and of the scaling.

    Raises:
        ValueError: sizes that do not fit, embeddings that are not finite. ImportError: scikit-learn is absent.
    """
    check_sizes(clusters=clusters, partitions=partitions)
    values.seed("seed", seed)
    values.tensor("embeddings", embeddings)
    if embeddings.is_complex():
        raise TypeError(f"embeddings must be real, got {values.dtype_of(embeddings)}")
    values.on_device("embeddings", embeddings)
    if embeddings.dim() < 2 or len(embeddings) < clusters or not embeddings[0].numel():
        raise ValueError(
            f"embeddings must have shape [M, D] with M >= clusters = {clusters} and D at least 1, got "
            f"{list(embeddings.shape)}"
        )
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError("clusters need scikit-learn: pip install scikit-learn") from error
    points = embeddings.detach().flatten(1).float().cpu()
    if not points.isfinite().all():
        raise ValueError("embeddings must be finite")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(partitions):
        scaled = points if index == 0 else points * torch.randn(points.shape[1], generator=generator)
        means = MiniBatchKMeans(clusters, batch_size=4096, n_init=3, max_iter=50, random_state=(seed + index) % 2**32)
        found.append(torch.from_numpy(means.fit_predict(scaled.numpy())).long())
    return torch.stack(found)


@torch.no_grad()
def embed_images(encoder: nn.Module, images: Tensor) -> Tensor:
    """Embeddings `[M, D]` of images `[..., C, H, W]`, flattened to M, by `encoder` in eval mode."""
    was_training = values.module("encoder", encoder).training
    encoder.eval()
    embeddings = [encoder(as_inputs(part)) for part in _pool(images, False).split(_AT_ONCE)]
    encoder.train(was_training)
    return torch.cat(embeddings)


def _pool(images: Tensor, rotations: bool) -> Tensor:
    check_images(images, "[M, C, H, W] or [..., C, H, W]", 4)
    images = images.flatten(0, -4)
    if values.flag("rotations", rotations):
        images = torch.cat([torch.rot90(images, turns, (-2, -1)) for turns in range(4)])
    return images.contiguous()


def _batch(examples: Tensor, shots: int) -> TaskBatch:
    """From examples `[T, N, shots + query_shots, C, H, W]`."""
    tasks, ways, each = examples.shape[:3]
    labels = torch.arange(ways, device=examples.device)
    return TaskBatch(
        examples[:, :, :shots].flatten(1, 2), labels.repeat_interleave(shots).repeat(tasks, 1),
        examples[:, :, shots:].flatten(1, 2), labels.repeat_interleave(each - shots).repeat(tasks, 1),
    )  # fmt: skip
