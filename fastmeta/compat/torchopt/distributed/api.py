"""`torchopt.distributed.api`: one call, its arguments divided among the workers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import rpc

from .. import pytree
from .world import get_worker_id, get_world_rank, get_world_size

__all__ = [
    "TensorDimensionPartitioner",
    "batch_partitioner",
    "dim_partitioner",
    "mean_reducer",
    "parallelize",
    "parallelize_async",
    "parallelize_sync",
    "remote_async_call",
    "remote_sync_call",
    "sum_reducer",
]

UNSET_RPC_TIMEOUT = rpc.api.UNSET_RPC_TIMEOUT if rpc.is_available() else -1.0
Part = tuple[int, tuple, dict]  # a worker, and what it is called with
Partitioner = int | str | Callable[..., Sequence[Part]]


class TensorDimensionPartitioner:
    """Divides the tensors among the arguments along one dimension; what is no tensor goes to all.

    Args:
        dim: the dimension.
        exclusive: a part for each index of it (True), or as many parts as there are workers, of which the last takes
            what is left over (False, the default).
        keepdim: whether parts keep the dimension; they may lose it where they are `exclusive`.
        workers: names or numbers of the workers, which take the parts in turn. Default: all.

    Raises:
        ValueError: parts that are not `exclusive` and are to lose the dimension; when called, tensors of different
            sizes along it.
    """

    def __init__(
        self, dim: int, *, exclusive: bool = False, keepdim: bool = False, workers: Sequence[int | str] | None = None
    ):
        if not keepdim and not exclusive:
            raise ValueError("keepdim=False should be used with exclusive=True.")
        self.dim, self.exclusive, self.keepdim, self.workers = dim, exclusive, keepdim, workers

    def __call__(self, *args: Any, **kwargs: Any) -> list[Part]:
        workers = range(get_world_size()) if self.workers is None else [get_worker_id(w) for w in self.workers]
        leaves, structure = pytree.tree_flatten((args, kwargs))
        sizes = [leaf.shape[self.dim] for leaf in leaves if isinstance(leaf, Tensor)]
        if not sizes:
            return [(get_world_rank(), args, kwargs)]
        if len(set(sizes)) > 1:
            raise ValueError(f"Batch size mismatch on dim={self.dim}: {sizes}.")
        count = sizes[0] if self.exclusive else min(sizes[0], len(workers))
        length = sizes[0] // count if count else 0
        parts = []
        for i in range(count):
            start, stop = i * length, sizes[0] if i == count - 1 else (i + 1) * length
            own = [self._part(leaf, start, stop) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            parts.append((workers[i % len(workers)], *pytree.tree_unflatten(structure, own)))
        return parts

    def _part(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        return tensor.narrow(self.dim, start, stop - start) if self.keepdim else tensor.select(self.dim, start)


def dim_partitioner(
    dim: int = 0, *, exclusive: bool = False, keepdim: bool = True, workers: Sequence[int | str] | None = None
) -> TensorDimensionPartitioner:
    """`TensorDimensionPartitioner`, that keeps the dimension by default."""
    return TensorDimensionPartitioner(dim, exclusive=exclusive, keepdim=keepdim, workers=workers)


batch_partitioner = dim_partitioner()
exclusive_batch_partitioner = dim_partitioner(exclusive=True)


def mean_reducer(results: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(results)).mean(dim=0)


def sum_reducer(results: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(results)).sum(dim=0)


def remote_async_call(
    func: Callable,
    *,
    args: tuple | None = None,
    kwargs: dict | None = None,
    partitioner: Partitioner | None = None,
    reducer: Callable[[Iterable], Any] | None = None,
    timeout: float | None = UNSET_RPC_TIMEOUT,
) -> torch.futures.Future:
    """Calls `func` on workers, and gives a future of the list of results, or of what `reducer` makes of it.

    Args:
        func: what can be pickled by its name.
        args, kwargs: its arguments, before they are divided.
        partitioner: one worker's name or number, or what divides the arguments. Default: `batch_partitioner`.
        reducer: such as `mean_reducer`.
        timeout: in seconds.

    Raises:
        TypeError: a partitioner of another kind.
    """
    args, kwargs = args or (), kwargs or {}
    partitioner = batch_partitioner if partitioner is None else partitioner
    if isinstance(partitioner, (int, str)):
        parts = [(get_worker_id(partitioner), args, kwargs)]
    elif callable(partitioner):
        parts = partitioner(*args, **kwargs)
    else:
        raise TypeError(f"Invalid partitioner: {partitioner!r}.")
    futures = [rpc.rpc_async(worker, func, args=a, kwargs=k, timeout=timeout) for worker, a, k in parts]
    results = torch.futures.collect_all(futures).then(lambda done: [future.wait() for future in done.wait()])
    return results if reducer is None else results.then(lambda done: reducer(done.wait()))


def remote_sync_call(func: Callable, **options: Any) -> Any:
    """`remote_async_call`, and waits for it."""
    return remote_async_call(func, **options).wait()


def _parallelized(call: Callable, suffix: str) -> Callable[..., Callable[[Callable], Callable]]:
    def parallelize(
        partitioner: Partitioner | None = None,
        reducer: Callable[[Iterable], Any] | None = None,
        timeout: float | None = UNSET_RPC_TIMEOUT,
    ) -> Callable[[Callable], Callable]:
        """A decorator that divides calls of a function among the workers. Options as those of `remote_async_call`, but
        that without a partitioner results are averaged where there is no reducer either."""
        if partitioner is None:
            reducer = reducer or mean_reducer

        def decorate(func: Callable) -> Callable:
            @functools.wraps(func)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                return call(
                    func, args=args, kwargs=kwargs, partitioner=partitioner, reducer=reducer, timeout=timeout
                )

            # workers find what they are to call by its name, and the name is the decorated function's from now on
            func.__name__ += suffix
            func.__qualname__ += suffix
            setattr(sys.modules[func.__module__], func.__qualname__, func)
            return wrapped

        return decorate

    return parallelize


parallelize = parallelize_sync = _parallelized(remote_sync_call, "__parallelize_unwrapped__")
parallelize_async = _parallelized(remote_async_call, "__parallelize_async_unwrapped__")
