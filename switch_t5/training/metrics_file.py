"""``metrics.jsonl``: what a run measured, one JSON object a logged step."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Literal

from switch_t5.errors import UserError
from switch_t5.storage import storage_errors

APPEND: Final = "append"
"""In place of the step that a run resumes from: nothing that is there is taken back, whatever its step."""


class MetricsFile:
    """Appends the metrics of each logged step to a file.

    Two runs that compute the same values write the same bytes: floats are written by ``repr``, from which
    they are read back exactly, keys in the order given, and nothing depends on the time or the machine.
    JSON has no NaN and no infinities: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
    ``float`` takes.

    A line reaches the operating system before `write` returns, so it outlives the process however that ends.
    """

    def __init__(
        self, path: str | os.PathLike[str], resume_step: int | Literal["append"] | None, *, active: bool = True
    ) -> None:
        """Opens the file, taking back what a resumed run will write again.

        Args:
          path: the file; its folder exists.
          resume_step: the step of the checkpoint that the run goes on from: entries of later steps are
            removed, and a last line that a kill cut short. None for a run from the start: all are. :data:`APPEND`
            removes that last line alone.
          active: False in the processes of a run that do not write.

        Raises:
          UserError: the file cannot be written, or holds something else than metrics.
        """
        self.path = Path(path)
        self._file = None
        if active:
            with self._errors():
                self._take_back(sys.maxsize if resume_step == APPEND else resume_step)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one entry: ``step`` first, then the values in their order.

        Args:
          step: the number of finished steps.
          values: numbers (NumPy's and JAX's scalars too) and texts, such as the ``task`` of an evaluation.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if self._file is None:
            return
        entry = {"step": step} | {key: _plain(value) for key, value in values.items()}
        line = memoryview(json.dumps(entry, allow_nan=False).encode() + b"\n")
        with self._errors():
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Waits until the disk has all entries, so that no checkpoint outlives the metrics before it.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if self._file is not None:
            with self._errors():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"Writing {self.path}")

    def _take_back(self, resume_step: int | None) -> None:
        if not self.path.is_file():
            return
        old = self.path.read_bytes()
        kept = b"" if resume_step is None else b"".join(self._up_to(resume_step, old))
        if kept == old:
            return
        # Replaced at one stroke: a kill leaves either the old entries or the new ones.
        new = self.path.with_name(self.path.name + ".new")
        with open(new, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def _up_to(self, resume_step: int, content: bytes) -> list[bytes]:
        """The lines of the entries up to a step, without a torn last line."""
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                step = json.loads(line)["step"]
                if step <= resume_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number} is not an entry of a run's metrics: mend that line, or move "
                    "the file away."
                ) from error
        return kept


def _plain(value: Any) -> float | int | str:
    """The value as JSON can hold it."""
    if isinstance(value, str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return repr(number)
    return number
