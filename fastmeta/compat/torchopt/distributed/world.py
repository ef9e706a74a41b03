"""`torchopt.distributed.world`: the workers, as torchrun numbers them."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch.distributed import rpc
from torch.distributed.elastic.multiprocessing.errors import record

__all__ = [
    "auto_init_rpc",
    "barrier",
    "get_local_rank",
    "get_local_world_size",
    "get_rank",
    "get_worker_id",
    "get_world_info",
    "get_world_rank",
    "get_world_size",
    "not_on_rank",
    "on_rank",
    "rank_non_zero_only",
    "rank_zero_only",
]


def default_worker_name_format(world_rank: int, world_size: int, local_rank: int, local_world_size: int) -> str:
    """`worker3`, with as many digits as the world's size has."""
    return f"worker{world_rank:0{len(str(world_size))}d}"


_name_format = default_worker_name_format


class WorldInfo(NamedTuple):
    """Which worker this is, of how many, everywhere and on this machine."""

    world_rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def rank(self) -> int:
        return self.world_rank

    @property
    def worker_name(self) -> str:
        return _name_format(**self._asdict())


@functools.cache
def get_world_info() -> WorldInfo:
    """What the environment said when it was first asked; one worker where it says nothing."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    return WorldInfo(*(int(os.getenv(name, default)) for name, default in names))


def get_world_rank() -> int:
    return get_world_info().world_rank


get_rank = get_world_rank


def get_world_size() -> int:
    return get_world_info().world_size


def get_local_rank() -> int:
    return get_world_info().local_rank


def get_local_world_size() -> int:
    return get_world_info().local_world_size


def get_worker_id(id: str | int | None = None) -> int:
    """The number of the worker of that name or number; of this one by default."""
    return id if isinstance(id, int) else rpc.get_worker_info(worker_name=id).id


def barrier(worker_names: Iterable[str] | None = None) -> None:
    """Waits until all these workers are here; all there are by default."""
    rpc.api._barrier(set(worker_names or ()))


def auto_init_rpc(
    worker_init_fn: Callable[[], None] | None = None,
    worker_name_format: Callable[..., str] = default_worker_name_format,
    *,
    backend: Any = None,
    rpc_backend_options: Any = None,
) -> Callable[[Callable], Callable]:
    """A decorator of the program's main function that starts RPC before it and stops it at the end."""
    global _name_format
    _name_format = worker_name_format

    def decorate(func: Callable) -> Callable:
        @record
        @functools.wraps(func)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            info = get_world_info()
            rpc.init_rpc(
                name=info.worker_name,
                rank=info.rank,
                world_size=info.world_size,
                backend=backend,
                rpc_backend_options=rpc_backend_options,
            )
            atexit.register(rpc.shutdown, graceful=True)
            if worker_init_fn is not None:
                barrier()
                worker_init_fn()
            barrier()
            return func(*args, **kwargs)

        return wrapped

    return decorate


def _where(runs_here: Callable[[int], bool]) -> Callable[[Callable], Callable]:
    def decorate(func: Callable) -> Callable:
        @functools.wraps(func)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs) if runs_here(get_world_rank()) else None

        return wrapped

    return decorate


def on_rank(*ranks: int) -> Callable[[Callable], Callable]:
    """A decorator: runs on these workers, and gives None on the others."""
    return _where(lambda rank: rank in ranks)


def not_on_rank(*ranks: int) -> Callable[[Callable], Callable]:
    """A decorator: gives None on these workers, and runs on the others."""
    return _where(lambda rank: rank not in ranks)


def rank_all(func: Callable) -> Callable:
    """Runs on all workers, as it would without."""
    return func


def rank_zero_only(func: Callable) -> Callable:
    return on_rank(0)(func)


def rank_non_zero_only(func: Callable) -> Callable:
    return not_on_rank(0)(func)
