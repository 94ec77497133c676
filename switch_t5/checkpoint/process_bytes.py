"""An Orbax item that holds some bytes of each process: the positions of their data iterators.

Orbax's own JSON and array items are written by one process for all. Each process reads its own part of the
data, so each must find its own position again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from switch_t5.errors import UserError


class ProcessBytesHandler(ocp.AsyncCheckpointHandler):
    """Writes and reads one file per process, named by its index and the number of processes."""

    async def async_save(self, directory: epath.Path, args: ProcessBytesSave) -> list[Any]:
        """Starts `save` in the background; Orbax commits when the returned future is done."""
        write = asyncio.to_thread(self.save, directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write)]

    def save(self, directory: epath.Path, args: ProcessBytesSave) -> None:
        """Writes this process's file."""
        with open(directory / _file_name(), "wb") as file:
            file.write(args.item)
            file.flush()
            # Orbax syncs the arrays before it commits; a commit must mean the same for these bytes.
            os.fsync(file.fileno())

    def restore(self, directory: epath.Path, args: ProcessBytesRestore) -> bytes:
        """Reads the bytes that the process of the same index wrote.

        Raises:
          UserError: the checkpoint was written by another number of processes.
        """
        path = directory / _file_name()
        if not path.exists():
            files = sorted(entry.name for entry in directory.iterdir() if entry.name.startswith("process_"))
            raise UserError(
                f"{directory} was written by {files[0].rsplit('_', 1)[1] if files else 0} processes, whose "
                f"positions in the data cannot be divided among {jax.process_count()}: "
                "start as many processes as wrote it."
            )
        return path.read_bytes()


@ocp.args.register_with_handler(ProcessBytesHandler, for_save=True)
@dataclasses.dataclass
class ProcessBytesSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
      item: this process's bytes.
    """

    item: bytes


@ocp.args.register_with_handler(ProcessBytesHandler, for_restore=True)
@dataclasses.dataclass
class ProcessBytesRestore(ocp.args.CheckpointArgs):
    """Asks for this process's bytes."""


def _file_name() -> str:
    return f"process_{jax.process_index()}_of_{jax.process_count()}"
