"""TensorBoard: curves of the metrics and histograms of the experts' loads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from switch_t5.storage import storage_errors, writable_directory
from switch_t5.training.metrics_file import APPEND


class TensorBoard:
    """Writes one event file, which ``tensorboard --logdir`` reads.

    Events are written by the caller's thread: the writer that tensorboardX itself puts around an event file
    waits forever for its thread once a full disk has ended it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], resume_step: int | Literal["append"] | None, *, active: bool = True
    ) -> None:
        """Opens an event file.

        Args:
          directory: where; made if missing. The files of earlier runs there stay.
          resume_step: the step of the checkpoint that the run goes on from: TensorBoard then hides what an
            interrupted run wrote of later steps. None for a run from the start.
            :data:`~switch_t5.training.metrics_file.APPEND` hides nothing.
          active: False in the processes of a run that do not write.

        Raises:
          UserError: the folder cannot be written.
        """
        self._directory = Path(directory)
        self._writer: Any = None
        if not active:
            return
        from tensorboardX.event_file_writer import EventsWriter

        events, _ = _protos()
        first_step = resume_step + 1 if isinstance(resume_step, int) else 0
        writable_directory(self._directory, "The TensorBoard folder")
        with self._errors():
            # The name holds seconds; the rest keeps two files of one second apart.
            suffix = f".{os.getpid()}.{first_step}"
            self._writer = EventsWriter(os.fspath(self._directory / "events"), suffix)
            if resume_step != APPEND:
                start = events.SessionLog(status=events.SessionLog.START)
                self._writer.write_event(events.Event(step=first_step, wall_time=time.time(), session_log=start))
            self._writer.flush()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """Adds a point to the curve of each value.

        Args:
          step: the number of finished steps.
          values: numbers by name (NumPy's and JAX's scalars too); texts are left out.
          prefix: the curves' group, such as ``"train"``.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if self._writer is None:
            return
        _, summaries = _protos()
        group = f"{prefix}/" if prefix else ""
        self._write(
            step,
            [
                summaries.Summary.Value(tag=group + name, simple_value=float(value))
                for name, value in values.items()
                if not isinstance(value, str)
            ],
        )

    def expert_loads(self, step: int, loads: Mapping[str, Sequence[float] | np.ndarray]) -> None:
        """Adds a histogram for each layer: over the experts' numbers, the share of each.

        Args:
          step: the number of finished steps.
          loads: by the layer's name, the tokens (or the fraction of them) that each expert got: ``[expert]``.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if self._writer is None:
            return
        _, summaries = _protos()
        self._write(
            step,
            [summaries.Summary.Value(tag=f"expert_load/{layer}", histo=_bars(load)) for layer, load in loads.items()],
        )

    def close(self) -> None:
        """Writes out what is held and closes the file.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._errors():
                writer.close()

    def _write(self, step: int, values: list[Any]) -> None:
        events, summaries = _protos()
        with self._errors():
            event = events.Event(step=step, wall_time=time.time(), summary=summaries.Summary(value=values))
            self._writer.write_event(event)
            self._writer.flush()

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors(f"Writing TensorBoard events in {self._directory}")


def _bars(load: Sequence[float] | np.ndarray) -> Any:
    """A histogram with one bucket an expert: bucket ``i`` spans ``[i - 0.5, i + 0.5]`` and holds its load."""
    _, summaries = _protos()
    counts = np.asarray(load, np.float64)
    experts = np.arange(counts.size)
    # TensorBoard stretches the outermost filled buckets to `min` and `max`: those are their own ends.
    filled = np.flatnonzero(counts) if counts.any() else experts
    # TensorBoard takes each bucket's lower end from the limit before it, so an empty one leads.
    return summaries.HistogramProto(
        min=filled[0] - 0.5,
        max=filled[-1] + 0.5,
        num=counts.sum(),
        sum=counts @ experts,
        sum_squares=counts @ experts**2,
        bucket_limit=np.arange(counts.size + 1) - 0.5,
        bucket=np.append(0.0, counts),
    )


def _protos() -> tuple[Any, Any]:
    """The modules of TensorBoard's events and summaries, imported when something is written."""
    from tensorboardX.proto import event_pb2, summary_pb2

    return event_pb2, summary_pb2
