"""An Orbax item that holds positions in the data: bytes by name, a file each.

Orbax's own JSON and array items are written by one process for all. A position is known to the process that reads that
part of the data; whichever process reads it after a restart finds it by its name, however many there are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Collection, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from switch_t5.errors import UserError


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
        # Before there were shards the one process's file was called process_0_of_1.
        files = {path.name.partition("_")[2]: path for path in directory.iterdir() if "_of_" in path.name}
        wanted = files if args.names is None else args.names
        for name in wanted:
            if name not in files:
                have = f"the shards {', '.join(sorted(files))}" if files else "none"
                raise UserError(
                    f"{directory} has no position in the data of the shard {name}, but of {have}: set "
                    "DataConfig.num_shards as it was."
                )
        return {name: files[name].read_bytes() for name in wanted}


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
