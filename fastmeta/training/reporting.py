"""What a run shows: a progress bar with lines of results (rich), and TensorBoard where asked for."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from .loop import Progress, Reporter

if TYPE_CHECKING:
    from .evaluate import Evaluation


@contextlib.contextmanager
def terminal_may_be_lost() -> Iterator[None]:
    """Inside, nothing is said to a terminal that was closed or a pipe that nobody reads, and the run goes on."""
    try:
        yield
    except SystemExit:  # how rich leaves for a pipe, after it has made the console quiet
        return
    except OSError as error:
        if error.errno != errno.EIO:
            raise


class ConsoleReporter(Reporter):
    """A bar while a terminal watches, and one line for each validation everywhere. Use it as a context
    manager."""

    def __init__(self, console: Console, *, iterations: int | None, minutes: float | None, regression: bool):
        self.console = console
        self.regression = regression
        self._minutes = minutes if iterations is None else None
        columns = (
            [TextColumn("step"), MofNCompleteColumn()]
            if self._minutes is None
            else [TextColumn("step {task.fields[step]:,}")]
        )
        self._bar = Bar(
            *columns,
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=iterations or 60 * (minutes or 0), numbers="", step=0)
        self._numbers = ""

    def __enter__(self) -> ConsoleReporter:
        self._bar.start()
        self.console.show_cursor(True)  # a second Ctrl-C ends the process as it is
        return self

    def __exit__(self, *_exception) -> None:
        with terminal_may_be_lost():
            self._bar.stop()

    def progress(self, progress: Progress) -> None:
        parts = [f"{progress.tasks_per_second:,.0f} tasks/s"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.4f}")
        if progress.accuracy is not None:
            parts.append(f"accuracy {100 * progress.accuracy:.2f}%")
        if progress.skipped:
            parts.append(f"{progress.skipped:,} skipped")
        self._numbers = "  ".join(parts)
        done = progress.step if self._minutes is None else progress.seconds
        with terminal_may_be_lost():
            self._bar.update(self._task, completed=done, numbers=self._numbers, step=progress.step)

    def chunked(self, step: int, tasks: int | None, why: str) -> None:
        at_once = "all tasks" if tasks is None else f"{tasks:,} {'task' if tasks == 1 else 'tasks'}"
        with terminal_may_be_lost():
            self.console.print(f"step {step:>7,}  {at_once} at a time: {why}", highlight=False, soft_wrap=True)

    def left_out(self, step: int, what: str) -> None:
        with terminal_may_be_lost():
            self.console.print(f"step {step:>7,}  {what}", highlight=False, markup=False, soft_wrap=True)

    def validation(self, step: int, evaluation: Evaluation, best: bool) -> None:
        held_out = describe(evaluation, self.regression)
        with terminal_may_be_lost():
            self.console.print(
                f"step {step:>7,}  {self._numbers}  [bold]validation {held_out}[/bold]{'  (best)' if best else ''}",
                highlight=False,
                soft_wrap=True,
            )


class TensorBoardReporter(Reporter):
    """Scalars for TensorBoard. Raises ImportError that says what to install where it is missing."""

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('tensorboard is not installed: pip install "fastmeta[tensorboard]"') from error
        self._writer = SummaryWriter(str(folder))

    def progress(self, progress: Progress) -> None:
        for name in ("loss", "accuracy", "tasks_per_second", "outer_lr"):
            value = getattr(progress, name)
            if value is not None:
                self._writer.add_scalar(f"train/{name}", value, progress.step)

    def validation(self, step: int, evaluation: Evaluation, best: bool) -> None:
        self._writer.add_scalar("validation/loss", evaluation.loss.mean, step)
        if evaluation.accuracy is not None:
            self._writer.add_scalar("validation/accuracy", evaluation.accuracy.mean, step)
        self._writer.flush()


def describe(evaluation: Evaluation, regression: bool) -> str:
    """One phrase: accuracy with its 95% interval, or the mean squared error with its own."""
    if evaluation.accuracy is not None:
        return f"accuracy {evaluation.accuracy.percent()}"
    return f"{'MSE' if regression else 'loss'} {evaluation.loss.plain()}"
