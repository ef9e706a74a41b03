"""The training loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import values
from ..algorithms._chunks import check_chunk
from ..batch import TaskBatch
from ..tasks.source import check_source, part_of
from .checkpoint import Checkpoint, CheckpointFolder, pack_optimizer
from .distributed import launched, ranks
from .finite import FiniteGuard, NonFiniteError, some
from .gradient import AUTOCAST, MetaGradient
from .metrics import RunningMean, finite_or_none
from .optimizer import Adam
from .restore import expect, history, load_model, load_optimizer, random_states
from .schedule import SCHEDULES, learning_rate
from .signals import StopSignals

if TYPE_CHECKING:
    from pathlib import Path

    from ..algorithms import MetaOutput
    from ..tasks import TaskSource
    from .evaluate import Evaluation


_REFRESH = 0.5  # seconds between reports; each waits for the device once
_MOST_SKIPPED = 100  # steps in a row; then it is no accident
_MOST_NAMED = 6  # tasks that a gradient which is not finite is traced to


class Progress(NamedTuple):
    """Where a run stands. `loss` and `accuracy` are means since the last report, None if there was no
    step; `skipped` is the number of steps that were left out so far."""

    step: int
    seconds: float
    tasks_per_second: float
    loss: float | None
    accuracy: float | None
    outer_lr: float
    skipped: int = 0


class Reporter:
    """Hears what happens in a run; this one ignores it."""

    def progress(self, progress: Progress) -> None: ...

    def validation(self, step: int, evaluation: Evaluation, best: bool) -> None: ...

    def skipped(self, step: int, cause: str) -> None: ...

    def chunked(self, step: int, tasks: int | None, why: str) -> None:
        """From this step on so many tasks run at a time; None: all at once."""

    def left_out(self, step: int, what: str) -> None:
        """Something that was asked for cannot be used; `what` is a sentence."""

    def saved(self, path: Path) -> None: ...


class Trainer:
    """Adam on the meta-loss of freshly sampled tasks, with checkpoints, validation and a clean way out.

    Args: algorithm: a module with `forward(TaskBatch) -> MetaOutput`, already on its device. tasks: where
        training tasks come from, on the same device. task_batch: tasks per step, the `T` of every `[T, ...]`.
        outer_lr, lr_schedule, lr_halve_every: Adam's rate, see `fastmeta.training.schedule.learning_rate`.
        iterations, minutes: what ends the run, whichever comes first; at least one. Time counts across
        resumes. validate: called every `eval_every` steps (0: never) and at the end; its `score` (larger is
        better) picks the best checkpoint.
            It is given a function to poll, and returns None if that told it to stop.
        checkpoints: where to save, every `save_every` steps (0: never), at each new best, at the end and on
            SIGINT, SIGTERM, SIGHUP or SIGUSR1. None saves nothing. `record` is stored in each.
        skip_non_finite: leave out a step whose loss or meta-gradient is not finite, in place of stopping; looking at
            each step waits for the device.
        task_chunk: tasks that run at a time, or "auto", as in `~fastmeta.algorithms.MAML`: what the algorithm's own
            attribute of this name is set to. None leaves that as it is.
        autocast: "bf16" computes the meta-gradient under `torch.autocast` in bfloat16; weights, gradients and Adam stay
            as they are. compile: call the algorithm through `torch.compile`. capture: replay its forward and backward
            as one CUDA graph. What cannot be used is left out, and reporters hear why, once.
        seed: of the task sampler. Model initialisation is the caller's.
        wrap: turns the algorithm into what is called for the loss, for instance
            `torch.nn.parallel.DistributedDataParallel` or `torch.compile`; checkpoints hold the algorithm
            itself.
        reporters: who hears of progress.

    In processes that have joined a group of `torch.distributed` each makes the same trainer, whose `task_batch` is that
    of all together: every step each takes its part of one batch, see `fastmeta.training.distributed`. Rank 0 reports
    and saves, and `validate` is called on all. DistributedDataParallel for `wrap` reduces gradients while others are
    being found, which pays for large encoders.

    Modules of the algorithm whose parameters are all frozen (`requires_grad=False`) stay in eval mode, so that batch
    norms do not change them.

    A step queues work on the device and does not wait for it; losses are read when the progress is shown.
    """

    def __init__(
        self,
        algorithm: nn.Module,
        tasks: TaskSource,
        *,
        task_batch: int,
        outer_lr: float = 1e-3,
        lr_schedule: str = "constant",
        lr_halve_every: int = 0,
        iterations: int | None = None,
        minutes: float | None = None,
        validate: Callable[[Callable[[], bool]], Evaluation | None] | None = None,
        eval_every: int = 500,
        checkpoints: CheckpointFolder | None = None,
        save_every: int = 500,
        record: dict[str, Any] | None = None,
        seed: int = 0,
        skip_non_finite: bool = False,
        task_chunk: int | str | None = None,
        autocast: str | None = None,
        compile: bool = False,
        capture: bool = False,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        reporters: tuple[Reporter, ...] = (),
    ):
        values.module("algorithm", algorithm)
        check_source(tasks)
        values.count("task_batch", task_batch)
        values.number("outer_lr", outer_lr, 0)
        values.choice("lr_schedule", lr_schedule, SCHEDULES)
        for name, value in (("lr_halve_every", lr_halve_every), ("eval_every", eval_every), ("save_every", save_every)):
            values.count(name, value, 0)
        if iterations is not None:
            values.count("iterations", iterations, 0)
        if minutes is not None:
            values.number("minutes", minutes, 0)
        if lr_schedule == "halve":
            values.count("lr_halve_every", lr_halve_every)
        if lr_schedule == "cosine" and not iterations:
            raise ValueError(f"iterations must be given for lr_schedule 'cosine', got {iterations}")
        values.function("validate", validate, or_none=True)
        values.function("wrap", wrap, or_none=True)
        values.seed("seed", seed)
        for name, value in (("skip_non_finite", skip_non_finite), ("compile", compile), ("capture", capture)):
            values.flag(name, value)
        if autocast is not None:
            values.choice("autocast", autocast, tuple(AUTOCAST))
        for name, value, kind in (("checkpoints", checkpoints, CheckpointFolder), ("record", record, dict)):
            if not (value is None or isinstance(value, kind)):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {type(value).__name__}")
        if not isinstance(reporters, (tuple, list)) or not all(hasattr(one, "progress") for one in reporters):
            raise TypeError(f"reporters must be a tuple or list of Reporter, got {values.shown(reporters)}")
        if iterations is None and minutes is None:
            raise ValueError("iterations or minutes must be given: one of them ends the run")
        named = [(name, p) for name, p in algorithm.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        if task_chunk is not None:
            if not hasattr(algorithm, "task_chunk"):
                raise ValueError(f"task_chunk: {type(algorithm).__name__} takes no tasks in chunks, leave it out")
            algorithm.task_chunk = check_chunk(task_chunk)
        if hasattr(algorithm, "auto_chunk"):
            algorithm.auto_chunk.heard = self._chunked
        if not parameters:
            raise ValueError("algorithm has no parameters that require gradients, there is nothing to train")
        self.ranks = ranks()
        if task_batch < (world := self.ranks.world):
            raise ValueError(f"task_batch must be at least {world}, a task for each process, got {task_batch}")
        self.algorithm = algorithm
        self.module = wrap(algorithm) if wrap is not None else algorithm
        self.tasks = tasks
        self.task_batch = task_batch
        self.iterations = iterations
        self.minutes = minutes
        self.validate = validate
        self.eval_every = eval_every
        self.checkpoints = checkpoints
        self.save_every = save_every
        self.record = record or {}
        self.reporters = reporters if self.ranks.first else ()
        self.device = parameters[0].device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = Adam(parameters, outer_lr)
        self.step = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best_score: float | None = None
        self._rate = dict(base=outer_lr, schedule=lr_schedule, halve_every=lr_halve_every, total=iterations)
        self._guard = FiniteGuard(algorithm)
        self._meta_gradient = MetaGradient(
            algorithm, self.module, lambda output: self.ranks.loss(self.module, output, self.task_batch),
            autocast=autocast, compile=compile, capture=capture,
        )  # fmt: skip
        self._loss, self._accuracy = RunningMean(), RunningMean()
        self._stop = StopSignals()
        self._seed, self._agreed_seconds = seed, 0.0
        self.skip_non_finite = skip_non_finite
        self._calls_vary = compile or capture  # runs that try it, and others where it fails
        self.skipped = self._skipped_in_a_row = 0
        self._validated, self._unsaved = -1, True
        # On a CPU there is no queue to keep full, and checking at once keeps a bad gradient out of the
        # weights.
        self._check_every_step = self.device.type == "cpu" or skip_non_finite

    def run(self) -> int | None:
        """Train until done. Returns None, or the number of the signal that ended it early; both leave a
        checkpoint behind.

        Raises `~fastmeta.training.finite.NonFiniteError` on a loss or meta-gradient that is not finite; the
        checkpoints of before are left as they are. Raises BlockingIOError if another process trains into the
        folder. Before other errors between two steps, such as of a validation, it saves.
        """
        self._train_mode()
        self._between_steps = True
        writes = self.checkpoints is not None and self.ranks.first
        self._stop = StopSignals(repeats=launched())
        with self.checkpoints.lock.held() if writes else contextlib.nullcontext(), self._stop:
            try:
                self._run()
            except NonFiniteError:
                raise
            except Exception:
                if self._between_steps:  # where the state is whole, and may be the work of hours
                    with contextlib.suppress(Exception):
                        self.save()
                raise
            return self._stop_signal()

    def _run(self) -> None:
        def stopped() -> bool:
            return self._stop_signal() is not None

        self.ranks.begin(self.algorithm, self.step)
        if self.step and self._due(self.eval_every):  # the run was stopped in this validation
            self._validate()
        shown_at, shown_step, shown_seconds = 0.0, self.step, self.seconds
        while not self.finished() and not stopped():
            began = time.perf_counter()
            self.train_step()
            show = began - shown_at >= _REFRESH or self._due(self.eval_every) or self._due(self.save_every)
            if show:
                self._guard.check()  # waits for the device, and that wait is the steps' own time
            now = time.perf_counter()
            self.seconds += now - began  # validation and saving are not counted
            if show or self.finished():
                tasks = (self.step - shown_step) * self.task_batch
                self._report(tasks / max(self.seconds - shown_seconds, 1e-9))
                shown_at, shown_step, shown_seconds = now, self.step, self.seconds
            if self._due(self.eval_every):
                self._validate()
            if self._due(self.save_every):
                self.save()
        if not stopped():
            self._validate()
        self.save()

    def train_step(self) -> None:
        """One step of the outer loop: sample, adapt, differentiate, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step=self.step, **self._rate)
        self._between_steps = False
        keep = self.skip_non_finite or not self.ranks.alone
        before = [buffer.clone() for buffer in self.algorithm.buffers()] if keep else []
        batch = self.ranks.sample(self.tasks, self.task_batch, self.generator)
        self.ranks.seed(self._seed, self.step)
        if self.ranks.alone:
            output = self._differentiate(batch)
        else:
            with self._norms():
                output = self._differentiate(batch)
            output = self._of_all_ranks(output, before)
        if not self._check_every_step:
            self._guard.watch(self.step + 1, output)
            loss = output.loss
        else:
            try:
                loss = self._guard.check_now(self.step + 1, output)
            except NonFiniteError as error:
                if not self.skip_non_finite:
                    raise self._traced(error, batch) from None
                self._skip(error, before)
                return
        self.optimizer.update()
        self.step += 1
        self._unsaved = self._between_steps = True
        self._skipped_in_a_row = 0
        self._loss.add(loss)
        if output.accuracy is not None:
            self._accuracy.add(output.accuracy.mean())

    def _norms(self) -> contextlib.AbstractContextManager[None]:
        """Batch norms over the rows of all ranks, where each runs the module once for all its tasks."""
        if self._calls_vary or getattr(self.algorithm, "task_chunk", None) is not None:
            return contextlib.nullcontext()
        return self.ranks.norms(self.module, self.task_batch)

    def _of_all_ranks(self, output: MetaOutput, before: list[torch.Tensor]) -> MetaOutput:
        votes = [self.seconds if self.ranks.first else 0.0, *self._stop.votes()]
        output, votes = self.ranks.mean(self.module, self.algorithm, before, output, self.task_batch, votes)
        self._agreed_seconds = votes[0]
        self._stop.agree(votes[1:])
        return output

    def _stop_signal(self) -> int | None:
        """The signal that ends the run, as all ranks know it."""
        return self._stop.received if self.ranks.alone else self._stop.agreed

    def _chunked(self, tasks: int | None, why: str) -> None:
        for reporter in self.reporters:
            reporter.chunked(self.step + 1, tasks, why)

    def _skip(self, error: NonFiniteError, buffers: list[torch.Tensor]) -> None:
        """Leave this step out: weights and optimizer as they were, and what the forward pass did to batch norms."""
        with torch.no_grad():
            for buffer, value in zip(self.algorithm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        self.step += 1
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._unsaved = self._between_steps = True
        for reporter in self.reporters:
            reporter.skipped(self.step, error.cause)
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            raise NonFiniteError(self.step, f"{_MOST_SKIPPED} steps in a row were left out; of the last, {error.cause}")

    def _traced(self, error: NonFiniteError, batch: TaskBatch) -> NonFiniteError:
        """`error`, of a gradient with the tasks whose own is not finite, if it is one that single tasks have."""
        if error.tasks or self.module is not self.algorithm:  # what wraps it may wait for other processes
            return error
        with contextlib.suppress(Exception):  # some learners take no single tasks; then the error is as it was
            numbers = range(self.task_batch)[self.ranks.own(self.task_batch)]  # of this rank's tasks
            tasks = [numbers[i] for i in self._bad_tasks(batch, 0, len(numbers), [])]
            if tasks:
                return NonFiniteError(error.step, f"{error.cause}; it comes from {some(tasks, 'task')}", tasks)
        return error

    def _bad_tasks(self, batch: TaskBatch, start: int, end: int, found: list[int]) -> list[int]:
        """The first tasks whose gradient is not finite, by halves."""
        if len(found) < _MOST_NAMED:
            self._differentiate(part_of(batch, slice(start, end)))
            if not self._guard.finite_gradients():
                if end - start == 1:
                    found.append(start)
                else:
                    half = (start + end) // 2
                    self._bad_tasks(batch, start, half, found)
                    self._bad_tasks(batch, half, end, found)
        return found

    def _train_mode(self) -> None:
        """Train mode, but for modules that are frozen whole: their norms keep the statistics that they have."""
        self.algorithm.train()
        for module in self.algorithm.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()

    def _differentiate(self, batch: TaskBatch) -> MetaOutput:
        output = self._meta_gradient(batch)
        for what in self._meta_gradient.told_now():
            for reporter in self.reporters:
                reporter.left_out(self.step + 1, what)
        return output

    def finished(self) -> bool:
        """True once the steps or the minutes are used up."""
        out_of_steps = self.iterations is not None and self.step >= self.iterations
        seconds = self.seconds if self.ranks.alone else self._agreed_seconds
        return out_of_steps or (self.minutes is not None and seconds >= 60 * self.minutes)

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one that knows as much. Refuses, with
        NonFiniteError, to save a broken state."""
        if self.checkpoints is None or not self._unsaved:
            return
        self._guard.check()
        self._guard.check_weights(self.step)
        if not self.ranks.first:
            self._unsaved = False
            return
        optimizer, optimizer_rest = pack_optimizer(self.optimizer)
        tensors = {f"model/{name}": t for name, t in self.algorithm.state_dict().items()}
        tensors |= {f"optimizer/{name}": t for name, t in optimizer.items()}
        tensors |= {f"rng/{name}": t for name, t in self._rng_states().items()}
        score = self.history[-1]["score"] if self._validated == self.step else None
        record = {
            **self.record,
            "score": score,
            "seconds": self.seconds,
            "best_score": self.best_score,
            "history": self.history,
            "skipped": self.skipped,
            "world_size": self.ranks.world,
            "optimizer": optimizer_rest,
        }
        if getattr(self.algorithm, "task_chunk", None) == "auto":
            record["task_chunks"] = self.algorithm.auto_chunk.as_json()
        path = self.checkpoints.save(self.step, tensors, record)
        self._unsaved = False
        for reporter in self.reporters:
            reporter.saved(path)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue where `checkpoint` was written: on the same device, with the same bits as without the
        interruption. Raises CheckpointError, which names file and key, for what does not fit this run."""
        load_model(self.algorithm, checkpoint)
        load_optimizer(self.optimizer, checkpoint)
        states = random_states(checkpoint, self.device)
        seconds, best_score = expect(checkpoint, "seconds", float, int), None
        if checkpoint.record.get("best_score") is not None:
            best_score = expect(checkpoint, "best_score", float, int)
        self.history = history(checkpoint)
        self.skipped = expect(checkpoint, "skipped", int) if "skipped" in checkpoint.record else 0
        self.step, self.seconds, self.best_score = checkpoint.step, seconds, best_score
        self._agreed_seconds = seconds
        if getattr(self.algorithm, "task_chunk", None) == "auto" and "task_chunks" in checkpoint.record:
            self.algorithm.auto_chunk.restore(expect(checkpoint, "task_chunks", dict), self.device)
        self._set_rng_states(states)
        self._unsaved = False
        self._validated = self.step if self.history and self.history[-1]["step"] == self.step else -1

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _report(self, tasks_per_second: float) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        loss, accuracy = self._loss.read(), self._accuracy.read()
        progress = Progress(self.step, self.seconds, tasks_per_second, loss, accuracy, rate, self.skipped)
        for reporter in self.reporters:
            reporter.progress(progress)

    def _validate(self) -> None:
        if self.validate is None or self._validated == self.step:
            return
        self._guard.check()
        evaluation = self.validate(lambda: self._stop.received is not None)
        self._train_mode()
        if self.ranks.any(evaluation is None):
            self._stop.agree(self.ranks.total(self._stop.votes()))
            return
        score = finite_or_none(evaluation.score)
        best = score is not None and (self.best_score is None or score > self.best_score)
        if best:
            self.best_score = score
        self._validated, self._unsaved = self.step, True
        self.history.append({"step": self.step, "seconds": self.seconds, "score": score, **evaluation.as_json()})
        for reporter in self.reporters:
            reporter.validation(self.step, evaluation, best)
        if best:
            self.save()

    def _rng_states(self) -> dict[str, torch.Tensor]:
        states = {"sampler": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def _set_rng_states(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)
        if "sampler" in states:  # another kind of device's generator has another state: a new stream begins there
            self.generator.set_state(states["sampler"])
