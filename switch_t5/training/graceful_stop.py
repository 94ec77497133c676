"""Stopping a run between two steps, on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_MESSAGE = b"\nFinishing this step, then saving; Ctrl-C again stops at once.\n"


class GracefulStop:
    """While entered, SIGTERM and Ctrl-C only ask for a stop; the loop looks at `requested` after each step.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, where Python sets no handlers, it
    changes nothing.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @property
    def requested(self) -> bool:
        """Whether a signal has asked for a stop."""
        return self._signal is not None

    @property
    def exit_code(self) -> int:
        """What the process should exit with: 143 after SIGTERM, 130 after Ctrl-C, 0 without a signal."""
        return 0 if self._signal is None else 128 + self._signal

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number)
            # A handler may run in the middle of a print, which `print` does not survive.
            os.write(2, _MESSAGE)
