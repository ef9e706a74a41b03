"""Signals that end a run, as a request to leave after the step at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence


class StopSignals:
    """`with StopSignals() as stop:` and look at `stop.received` (None, or the first signal's number) where leaving
    is safe.

    After the first signal SIGINT acts as it did outside, so that a second Ctrl-C acts at once. The others remain
    requests: schedulers send some of them one after the other, and what is asked for is being done. SIGHUP, the loss
    of the terminal, is left alone where it is ignored, as under nohup. Outside the main thread, where Python allows no
    handlers, nothing is installed. With `repeats` SIGINT remains a request too: torchrun sends to its processes what a
    terminal has sent to them already.

    Where several processes train, `votes` are what this one has received, and `agreed` what they decided of all votes.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, repeats: bool = False) -> None:
        self.received: int | None = None
        self.agreed: int | None = None
        self._repeats = repeats
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_exception) -> None:
        for number in list(self._before):
            self._restore(number)

    def _receive(self, number: int, _frame) -> None:
        if self.received is None:
            self.received = number
            if not self._repeats:
                self._restore(signal.SIGINT)

    def votes(self) -> list[float]:
        """1 for the signal that was received, 0 for the others."""
        return [float(self.received == number) for number in self.SIGNALS]

    def agree(self, votes: Sequence[float]) -> None:
        """Act on the sums of all processes' votes."""
        if self.agreed is None:
            self.agreed = next((int(n) for n, count in zip(self.SIGNALS, votes, strict=True) if count), None)

    def _restore(self, number: int) -> None:
        if number in self._before:
            handler = self._before.pop(number)
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
