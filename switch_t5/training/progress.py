"""What a user watches while a run trains: its step, loss, speed and the time left."""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


class Speedometer:
    """Measures tokens per second and the time left."""

    def __init__(self, tokens_per_step: int, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a speedometer that has not started.

        Args:
          tokens_per_step: the positions, of encoder and decoder, in a batch.
          total_steps: the step at which the run ends.
          clock: seconds.
        """
        self._tokens_per_step = tokens_per_step
        self._total_steps = total_steps
        self._clock = clock
        self._start: tuple[int, float] | None = None
        self._lap = (0, 0.0)
        self._paused = 0.0

    def start(self, step: int) -> None:
        """Starts the clock; called once the first step, which compiles, is done."""
        self._lap = (step, self._clock())
        self._start = self._lap
        self._paused = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves what happens inside, such as an evaluation, out of the tokens per second."""
        begin = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - begin

    def tokens_per_second(self, step: int) -> float:
        """The speed since the last call, or since the start; 0 where no time or no step has passed."""
        last_step, last_time = self._lap
        now = self._clock()
        seconds = now - last_time - self._paused
        if self._start is None or step <= last_step or seconds <= 0:
            return 0.0
        self._lap, self._paused = (step, now), 0.0
        return (step - last_step) * self._tokens_per_step / seconds

    def seconds_left(self, step: int) -> float:
        """The time to the end at the pace since the start, pauses included; NaN while there is none."""
        if self._start is None or step <= self._start[0]:
            return math.nan
        first_step, begin = self._start
        return (self._total_steps - step) * (self._clock() - begin) / (step - first_step)


class Progress:
    """One line about the run: redrawn in place on a terminal, else printed anew at each log."""

    def __init__(
        self, total_steps: int, first_step: int = 0, *, stream: TextIO | None = None, active: bool = True
    ) -> None:
        """Prepares the line; it appears when the context is entered.

        Args:
          total_steps: the step at which the run ends.
          first_step: the step at which it starts or goes on.
          stream: where; None for standard error.
          active: False in the processes of a run that do not show it.
        """
        self._total_steps = total_steps
        self._first_step = first_step
        self._stream = stream or sys.stderr
        self._active = active
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self._active and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False),
                console=Console(file=self._stream, highlight=False),
                refresh_per_second=2,
            )
            self._bar.add_task("", total=self._total_steps, completed=self._first_step)
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, step: int) -> None:
        """Moves the bar to a step, without a new line where there is no bar."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def log(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows the numbers of a logged step.

        Args:
          step: the number of finished steps.
          loss: as logged.
          tokens_per_second: 0 where not yet known.
          seconds_left: NaN where not yet known.
        """
        text = f"loss {loss:.4f}  {_speed(tokens_per_second)}  {_duration(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        else:
            self.message(f"step {step}/{self._total_steps}  {text}")

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
        elif self._active:
            print(text, file=self._stream, flush=True)


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tokens/s" if tokens_per_second > 0 else "- tokens/s"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"
