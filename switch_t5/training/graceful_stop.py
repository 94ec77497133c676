"""Stopping a run between two steps, on Ctrl-C or SIGTERM.

Of several processes a signal to any stops all, after the same step. JAX sees to that: it takes over SIGTERM, tells the
other processes, and agrees with them on a step that none has begun yet.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_MESSAGE = b"\nFinishing this step, then saving; Ctrl-C again stops at once.\n"


class GracefulStop:
    """While entered, SIGTERM and Ctrl-C only ask for a stop; the loop asks `reached` after each step.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, where Python sets no handlers, it
    changes nothing.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            # Of several processes JAX has taken over SIGTERM, and is told of Ctrl-C by it.
            ours = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else (signal.SIGINT,)
            for number in ours:
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

    def reached(self, step: int) -> bool:
        """Whether to stop now.

        Args:
          step: the number of finished steps; asked once for each, by all processes.
        """
        if jax.process_count() == 1:
            return self.requested
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached and self._signal is None:
            self._signal = signal.SIGTERM
        return reached

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
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)
