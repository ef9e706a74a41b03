"""The next task batch is drawn while training computes with this one."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref

import torch

from fastmeta import values
from fastmeta.batch import TaskBatch
from fastmeta.tasks.source import TaskSource, check_source, sample_part

_PATIENCE = 10  # seconds for a batch that is being drawn when the thread is to end


class Prefetched:
    """Another source's tasks, drawn ahead by a thread: what comes is what that source would have given, to the bit.

    Worth it where drawing takes long beside training: rows mapped from a disk, or gathered in host memory for a GPU.

    `sample` hands out the batch that waits if it was drawn for as many tasks from exactly the state that the generator
    has now, and then moves the generator to the state that drawing left. Otherwise it draws anew. So a run that is
    resumed from its generator's state goes on as if nothing had been drawn ahead. Without a generator nothing is drawn
    ahead.

    Args:
        tasks: what is drawn from. While this object lives, it should be drawn from by no one else, and by nothing but
            the generator that it is given: a source with randomness of its own would be asked out of turn.

    Errors of `tasks` are raised by the `sample` that would have met them. The thread ends with `close()`, or when this
    object does; copies and pickles begin without one.

    Raises:
        TypeError: `tasks` is no source of tasks.
    """

    def __init__(self, tasks: TaskSource):
        check_source(tasks)
        self.tasks = tasks
        self._thread: threading.Thread | None = None
        self._waiting: _Order | None = None

    @property
    def kind(self) -> str:
        return self.tasks.kind

    @property
    def input_shape(self) -> tuple[int, ...]:
        return self.tasks.input_shape

    @property
    def output_size(self) -> int:
        return self.tasks.output_size

    @property
    def inputs(self):
        """What `~fastmeta.tasks.Inputs.of` asks for."""
        return getattr(self.tasks, "inputs", None)

    def sample(self, num_tasks: int, *, generator: torch.Generator | None = None) -> TaskBatch:
        """`num_tasks` tasks, those that `tasks.sample` would give for this `generator`."""
        return self.sample_part(num_tasks, slice(None), generator=generator)

    def sample_part(self, num_tasks: int, part: slice, *, generator: torch.Generator | None = None) -> TaskBatch:
        """The tasks `part` of those, and the next such part drawn ahead."""
        values.count("num_tasks", num_tasks, 0)
        order = self._finished()
        if not isinstance(generator, torch.Generator):
            return _sample(self.tasks, num_tasks, part, generator)
        if order is not None and order.fits(num_tasks, part, generator):
            generator.set_state(order.generator.get_state())
            batch = order.result()
        else:
            batch = _sample(self.tasks, num_tasks, part, generator)
        self._begin()
        self._waiting = _Order(self.tasks, num_tasks, part, generator)
        self._orders.put(self._waiting)
        return batch

    def close(self) -> None:
        """End the thread. A later `sample` begins another."""
        if self._thread is not None:
            self._end()
        self._thread = self._waiting = None

    def __reduce__(self):
        return Prefetched, (self.tasks,)

    def _begin(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_draw, args=(self._orders,), name="fastmeta-prefetch", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _stop, self._orders, self._thread)

    def _finished(self) -> _Order | None:
        """What was ordered last, once it is there: while it is not, nothing else may be drawn."""
        order, self._waiting = self._waiting, None
        if order is None or not self._thread.is_alive():  # threads do not come along into a forked process
            return None
        order.done.wait()
        return order


class _Order:
    """A batch to be drawn from where `generator` is now, as its caller would draw it."""

    def __init__(self, tasks: TaskSource, num_tasks: int, part: slice, generator: torch.Generator):
        self.tasks, self.num_tasks, self.part, self.state = tasks, num_tasks, part, generator.get_state()
        self.generator = torch.Generator(generator.device)
        self.generator.set_state(self.state)
        self.gradients = torch.is_grad_enabled()
        # on the caller's stream the batch is there before the caller's next kernel asks for it
        self.stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self.batch: TaskBatch | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()

    def fits(self, num_tasks: int, part: slice, generator: torch.Generator) -> bool:
        same = (num_tasks, part) == (self.num_tasks, self.part) and generator.device == self.generator.device
        return same and torch.equal(generator.get_state(), self.state)

    def draw(self) -> None:
        stream = contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
        try:
            with stream, torch.set_grad_enabled(self.gradients):
                self.batch = _sample(self.tasks, self.num_tasks, self.part, self.generator)
        except BaseException as error:  # whatever it is, it is the caller's
            self.error = error
        self.done.set()

    def result(self) -> TaskBatch:
        if self.error is not None:
            raise self.error
        return self.batch


def _sample(tasks: TaskSource, num_tasks: int, part: slice, generator: torch.Generator | None) -> TaskBatch:
    if part == slice(None):
        return tasks.sample(num_tasks, generator=generator)
    return sample_part(tasks, num_tasks, part, generator=generator)


def _draw(orders: queue.SimpleQueue[_Order | None]) -> None:
    """The thread. It knows of orders alone, so that nothing of it keeps a source alive that nobody else has."""
    while (order := orders.get()) is not None:
        order.draw()


def _stop(orders: queue.SimpleQueue[_Order | None], thread: threading.Thread) -> None:
    orders.put(None)
    if thread is not threading.current_thread():  # where garbage may be collected as well
        thread.join(_PATIENCE)
