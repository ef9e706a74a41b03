"""SIGINT and SIGTERM as a request to leave after the step at hand."""

from __future__ import annotations

import signal
import threading


class StopSignals:
    """`with StopSignals() as stop:` and look at `stop.received` (None, or the signal's number) where leaving
    is safe.

    After the first signal the handlers of before are back, so that a second one acts at once. Outside the
    main thread, where Python allows no handlers, nothing is installed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _receive(self, number: int, _frame) -> None:
        self.received = number
        self.__exit__()
