"""Training by several processes, which `torch.distributed` starts, joins and starts anew: `torchrun -m fastmeta train`.

All of them draw one stream of task batches from generators with one seed, and of every batch rank r of W takes the
tasks r, r + W, r + 2W and so on. The gradients of the parts, weighted by their numbers of tasks, are summed in one
all-reduce, so that the step is that of one process with the whole batch, to rounding, and the weights of all ranks stay
the same. What ranks may see differently (a signal, the clock) is told with it, and all act on what was told.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..algorithms import MetaOutput
from ..algorithms._norms_of_all import NormsOfAll, spanning
from ..batch import TaskBatch
from ..tasks.source import TaskSource, sample_part

# A process that ends is noticed at once, as its connections close; this is for one that hangs, or a cut network.
_PATIENCE = datetime.timedelta(minutes=5)


class PeerError(RuntimeError):
    """Another process of this run has ended or does not answer; what it said tells why."""


class Ranks:
    """This process, number `rank` of `world`, and how it talks to the others. Where it is alone nothing is said.

    All ranks must call the methods that talk, in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.alone, self.first = world == 1, rank == 0
        # what the processes tell each other beside tensors of the device, for which none should wait for its device
        self._hosts = None if self.alone or dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    def own(self, count: int, start: int = 0) -> slice:
        """Which of `count` things are this rank's, the first of which is number `start` of all."""
        return slice((self.rank - start) % self.world, count, self.world)

    def sample(
        self, tasks: TaskSource, count: int, generator: torch.Generator | None = None, start: int = 0
    ) -> TaskBatch:
        """This rank's part of the `count` tasks that `tasks` would give, the first of which is number `start`."""
        if self.alone:
            return tasks.sample(count, generator=generator)
        return sample_part(tasks, count, self.own(count, start), generator=generator)

    def seed(self, seed: int, step: int) -> None:
        """Of what a model draws in a step, such as dropout: another one on each rank, and the same after a resume."""
        if not self.alone:
            torch.manual_seed((seed * 1_000_003 + step * self.world + self.rank) % 2**63)

    def begin(self, algorithm: nn.Module, step: int) -> None:
        """Every rank begins with rank 0's weights. Raises ValueError where the steps that they begin at differ."""
        if self.alone:
            return
        steps = [None] * self.world
        with _peers():
            dist.all_gather_object(steps, step, group=self._hosts)
            if len(set(steps)) > 1:
                raise ValueError(f"all ranks must begin at one step, and theirs are {steps}: they read other files")
            for tensor in (*algorithm.parameters(), *_floating(algorithm.buffers())):
                dist.broadcast(tensor.detach(), 0, group=self._group(tensor))

    def loss(self, module: nn.Module, output: MetaOutput, count: int) -> Tensor:
        """What the gradient is taken of. DistributedDataParallel makes the mean over ranks; it becomes that over all
        `count` tasks."""
        if self.alone or not isinstance(module, DistributedDataParallel):
            return output.loss
        return output.loss * (len(output.task_loss) * self.world / count)

    def norms(self, module: nn.Module, count: int) -> contextlib.AbstractContextManager[None]:
        """Inside, batch norms that see the rows of all tasks see those of all ranks. `module` is called there, once and
        as it is, with this rank's part of `count` tasks, and its gradients are found."""
        share = len(range(count)[self.own(count)]) / count
        weight = 1.0 if isinstance(module, DistributedDataParallel) else share  # then `loss` has it
        return spanning(NormsOfAll(self.rank, self.world, self._sum, weight))

    def mean(
        self,
        module: nn.Module,
        algorithm: nn.Module,
        before: Sequence[Tensor],
        output: MetaOutput,
        count: int,
        votes: Sequence[float],
    ) -> tuple[MetaOutput, list[float]]:
        """The result of all `count` tasks, from this rank's `output`, with losses and accuracies of all in their order;
        and the sums of the ranks' `votes`.

        Gradients of the parameters, and changes of buffers since `before`, such as those of batch norms' running
        statistics, become the mean over all tasks. One all-reduce of one flat tensor does it: `[gradients, changes,
        loss, has a gradient, task_loss, accuracy, votes]`; gradients, changes and loss in proportion to each rank's
        tasks. `module` is what computed the gradients: DistributedDataParallel has reduced them already.
        """
        share = len(output.task_loss) / count
        parameters = [p for p in algorithm.parameters() if p.requires_grad]
        if isinstance(module, DistributedDataParallel):
            parameters = []
        buffers, before = _floating(algorithm.buffers()), _floating(before)
        # 0 of one that stays as it is, which may hold infinities: masks do
        changes = [torch.where(b == a, 0, b - a) for b, a in zip(buffers, before, strict=True)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        shared = [*gradients, *changes, output.loss.detach()]
        dtype = torch.float32
        for tensor in shared:
            dtype = torch.promote_types(dtype, tensor.dtype)
        there = output.loss.new_tensor([p.grad is not None for p in parameters], dtype=dtype)
        judged = [field for field in (output.task_loss, output.accuracy) if field is not None]
        by_task = output.loss.new_zeros(len(judged), count, dtype=dtype)
        by_task[:, self.own(count)] = torch.stack([field.detach().to(dtype) for field in judged])
        on_host = output.loss.device.type == "cpu"
        told = torch.tensor(votes, dtype=dtype if on_host else torch.float32)
        flat = torch.cat([t.detach().flatten().to(dtype) for t in shared])
        flat.mul_(share)
        flat = torch.cat([flat, there, by_task.flatten(), *([told] if on_host else [])])
        self._sum(flat)
        sizes = [t.numel() for t in shared] + [len(there), by_task.numel()]
        *shared, there, by_task, rest = flat.split([*sizes, flat.numel() - sum(sizes)])
        if not on_host:
            self._sum(told)
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                # none where no rank has one: an optimizer leaves such a parameter as it is
                if parameter.grad is not None or there[i]:
                    parameter.grad = shared[i].view(parameter.shape).to(parameter.dtype)
            for buffer, old, change in zip(buffers, before, shared[len(parameters) : -1], strict=True):
                buffer.copy_(old + change.view(old.shape))
        by_task = by_task.view(len(judged), count).to(output.task_loss.dtype)
        accuracy = None if output.accuracy is None else by_task[1].to(output.accuracy.dtype)
        loss = shared[-1].view(()).to(output.loss.dtype)
        return MetaOutput(loss, by_task[0], accuracy), (rest if on_host else told).tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return flag if self.alone else self.total([float(flag)])[0] > 0

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of the ranks' numbers."""
        return list(numbers) if self.alone else self._sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors."""
        return tensor if self.alone else self._sum(tensor.detach().clone())

    def gathered(self, own: Tensor, count: int) -> Tensor:
        """`[count, ...]` of all ranks in order, from the rows that are this one's."""
        if self.alone:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.own(count)] = own.detach()
        return self._sum(rows)

    def told(self, value: Any) -> Any:
        """Rank 0's `value`."""
        if self.alone:
            return value
        values = [value]
        with _peers():
            dist.broadcast_object_list(values, 0, group=self._hosts)
        return values[0]

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._hosts if tensor.device.type == "cpu" else None

    def _sum(self, tensor: Tensor) -> Tensor:
        with _peers():
            dist.all_reduce(tensor, group=self._group(tensor))
        return tensor


_ranks: tuple[Any, Ranks] | None = None


def ranks() -> Ranks:
    """The processes that this one has joined (`torch.distributed.init_process_group`), or itself alone."""
    global _ranks
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    group = dist.group.WORLD
    if _ranks is None or _ranks[0] is not group:  # one group for the hosts, however often this is asked
        _ranks = group, Ranks(dist.get_rank(), dist.get_world_size())
    return _ranks[1]


def launched() -> bool:
    """Whether torchrun, or torch's elastic agent by another way, has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def restarts() -> tuple[int, int]:
    """How often the elastic agent has started the processes anew, and how often it will at most."""
    return tuple(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """Inside, the processes that torchrun has started are one group, over NCCL where each has a GPU of its own and
    `device` is no other one, and over gloo elsewhere. Without torchrun nothing happens."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ranks()
        return
    gpus = torch.cuda.device_count() if device in (None, "auto", "cuda") else 0
    own_gpus = gpus >= int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus:
        torch.cuda.set_device(own_gpu())
    with _peers():
        store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The agent's store outlives the processes, and still has the addresses of those that it started before.
            store = dist.PrefixStore(f"attempt {restarts()[0]}", store)
        backend = "nccl" if own_gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    yield ranks()
    leave()  # not after an error: others may not come to it, and a process that ends has left


def leave() -> None:
    """Leave the group: what comes is done alone."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def own_gpu() -> str:
    """The GPU of this process: of those that torchrun starts, each has the next."""
    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}" if launched() and count else "cuda"


def _floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = " ".join(str(error).split()).partition(". This is ")[0]  # advice follows
        raise PeerError(f"another process of this run has ended, or does not answer ({said})") from error
