"""An Orbax item that holds positions in the data: bytes by name, a file each.

Orbax's own JSON and array items are written by one process for all. A position is known to the process that reads that
part of the data; whichever process reads it after a restart finds it by its name, however many there are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
from collections.abc import Collection, Mapping
from typing import Any, BinaryIO

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from switch_t5.checkpoint.folder import file_names, is_url, read_file
from switch_t5.errors import UserError

ITEM = "data"
"""The folder of the positions in a checkpoint's."""


class DataPositionsHandler(ocp.AsyncCheckpointHandler):
    """Writes and reads one file for each position."""

    async def async_save(self, directory: epath.Path, args: DataPositionsSave) -> list[Any]:
        """Starts `save` in the background; Orbax commits when the returned future is done."""
        write = asyncio.to_thread(self.save, directory, args)
        return [future.CommitFutureAwaitingContractedSignals(write)]

    def save(self, directory: epath.Path, args: DataPositionsSave) -> None:
        """Writes this process's files."""
        for name, position in args.item.items():
            with open(directory / f"shard_{name}", "wb") as file:
                file.write(position)
                file.flush()
                # Orbax syncs the arrays before it commits; a commit must mean the same for these bytes.
                os.fsync(file.fileno())

    def restore(self, directory: epath.Path, args: DataPositionsRestore) -> dict[str, bytes]:
        """Reads positions, by name.

        Raises:
          UserError: one that is asked for was not saved.
        """
        files = {_shard(path.name): path for path in directory.iterdir() if _shard(path.name)}
        wanted = files if args.names is None else args.names
        for name in wanted:
            if name not in files:
                have = f"the shards {', '.join(sorted(files))}" if files else "none"
                raise UserError(
                    f"{directory} has no position in the data of the shard {name}, but of {have}: set "
                    "DataConfig.num_shards as it was."
                )
        return {name: files[name].read_bytes() for name in wanted}


def _shard(file: str) -> str:
    """The name of the position that a file holds, such as ``0_of_4``; empty for other files."""
    # Before there were shards the one process's file was called process_0_of_1.
    return file.partition("_")[2] if "_of_" in file else ""


def open_position(checkpoint: str) -> BinaryIO | None:
    """One of the positions of a checkpoint, all of which say what is read; None where it has none.

    Args:
      checkpoint: its folder, on a disk or at a URL.
    """
    folder = f"{checkpoint}/{ITEM}"
    files = sorted(name for name in file_names(folder) if _shard(name))
    if not files:
        return None
    # They hold the text that is being shuffled, and on a disk need not be read whole.
    return io.BytesIO(read_file(folder, files[0]) or b"") if is_url(folder) else open(f"{folder}/{files[0]}", "rb")


@ocp.args.register_with_handler(DataPositionsHandler, for_save=True)
@dataclasses.dataclass
class DataPositionsSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
      item: the positions that this process saves, by name; no two processes save one of a name.
    """

    item: Mapping[str, bytes]


@ocp.args.register_with_handler(DataPositionsHandler, for_restore=True)
@dataclasses.dataclass
class DataPositionsRestore(ocp.args.CheckpointArgs):
    """Asks for positions.

    Attributes:
      names: which; None for all there are.
    """

    names: Collection[str] | None = None
