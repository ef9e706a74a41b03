"""`task_chunk="auto"`: as many tasks at a time as memory has room for.

The first chunks are the probe: one task, then four times as many while the memory that they took, scaled up, fits into
half of what is free. So no work is for the probe alone. Where memory runs out all the same, the chunk is run again as
two halves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..engines import _memory as memory

AUTO = "auto"
GROWTH = 4
SHARE = 0.5  # of free memory: there are other processes, and an allocator's pieces do not all fit


@dataclass
class Chunk:
    """What is known of one kind of tasks: how many may run at a time, whether more are not to be tried, and the bytes
    that they are expected to take."""

    tasks: int = 1
    final: bool = False
    bytes: int = 0


class AutoChunk:
    """The sizes of a learner's chunks, by kind of tasks. `heard(tasks, why)`, if it is a function, is called when a
    size is chosen while gradients are on; `tasks` is None for all at once."""

    def __init__(self) -> None:
        self.known: dict[str, Chunk] = {}
        self.heard: Callable[[int | None, str], None] | None = None
        self._whole: set[str] = set()  # kinds of which all tasks of a batch ran at once

    def __getstate__(self) -> dict[str, Any]:  # a copy is another learner's, which nobody has asked about
        return self.__dict__ | {"heard": None}

    def over(
        self, kind: str, num_tasks: int, work: Callable[[int, int], None], module: nn.Module, device: torch.device
    ) -> None:
        """`work(start, end)` for all tasks in order, some at a time. It must leave nothing behind where it fails; the
        random numbers it drew and the module's buffers are put back here."""
        chunk, start = self.known.setdefault(kind, Chunk()), 0
        while start < num_tasks:
            tasks = min(chunk.tasks, num_tasks - start)
            if self._run(chunk, tasks, lambda start=start, tasks=tasks: work(start, start + tasks), module, device):
                start += tasks
        if tasks == num_tasks and kind not in self._whole:
            self._whole.add(kind)
            self._tell(None, "there is room")

    def _run(
        self, chunk: Chunk, tasks: int, work: Callable[[], None], module: nn.Module, device: torch.device
    ) -> bool:
        """Whether it was done; if not, memory ran out and the next chunk has half as many tasks."""
        probe = None if chunk.final or tasks < chunk.tasks else memory.Probe(device)
        before = State(module, device)
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if tasks == 1 or not memory.ran_out(error):
                raise
        else:
            if probe is not None:
                self._learn(chunk, probe)
            return True
        # not in the handler: there the error still holds what was computed
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        before.restore()
        chunk.tasks, chunk.final, chunk.bytes = tasks // 2, True, chunk.bytes // 2
        self._tell(chunk.tasks, f"memory ran out with {tasks:,}")
        return False

    def _learn(self, chunk: Chunk, probe: memory.Probe) -> None:
        used = probe.used()
        room = None if probe.free is None else int(SHARE * probe.free)
        if used is None or room is None:  # nothing can be measured here: more are tried until memory runs out
            chunk.tasks *= GROWTH
            return
        fit = chunk.tasks * room // max(1, used)
        if fit >= GROWTH * chunk.tasks:
            chunk.tasks, chunk.bytes = GROWTH * chunk.tasks, GROWTH * used
            return
        each = used / chunk.tasks
        chunk.tasks, chunk.final = max(1, fit), True
        chunk.bytes = int(each * chunk.tasks)
        self._tell(chunk.tasks, f"about {each / 1e6:.2g} MB a task, and {room / 1e6:,.0f} MB of memory to use")

    def _tell(self, tasks: int | None, why: str) -> None:
        if self.heard is not None and torch.is_grad_enabled():
            self.heard(tasks, why)

    def as_json(self) -> dict[str, Any]:
        return {kind: asdict(chunk) for kind, chunk in self.known.items()}

    def restore(self, known: dict[str, Any], device: torch.device) -> None:
        """Go on with the sizes of `as_json`, so that sums are rounded alike, where there is the memory for them."""
        free = memory.free(device)
        chunks = {kind: Chunk(**chunk) for kind, chunk in known.items()}
        self.known = {kind: one for kind, one in chunks.items() if free is None or one.bytes <= SHARE * free}
        self._whole = set(self.known)


class State:
    """What a chunk that fails may have changed: random states and buffers, such as those of batch norms."""

    def __init__(self, module: nn.Module, device: torch.device):
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        self.device, self.cpu = device, torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for buffer, value in self.buffers:
            if not torch.equal(buffer, value):  # the others may be in a graph, of an encoder that ran before
                buffer.copy_(value)
