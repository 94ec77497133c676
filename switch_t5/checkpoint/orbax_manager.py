"""Orbax's checkpoint manager as a run of ours has it: what its items are and how they are written."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.data_positions import ITEM, DataPositionsHandler, DataPositionsRestore, DataPositionsSave
from switch_t5.checkpoint.manifest import ManifestHandler, ManifestSave
from switch_t5.checkpoint.piecewise import Piecewise, PiecewiseHandler, of_shards, registry
from switch_t5.checkpoint.retention import CheckpointConfig, manager_options
from switch_t5.checkpoint.snapshot import on_cpu

_CHUNK_BYTES = 1 << 26
"""Of the pieces that arrays are stored in: who reads a part of one, as conversions do, need not read the whole."""
_LEAST_CHUNK_BYTES = 1 << 20
_FILE_BYTES = 1 << 26
"""Of the files that pieces are gathered into: files are synced while others are gathered, and of large ones few are."""


def to_save(arrays: Mapping[str, Any]) -> ocp.args.PyTreeSave:
    """The state to save, of arrays by their names; those on CPUs may still be being computed, and are waited for later.

    Several processes share the writing of what all of them hold, which Orbax sees to.
    """
    alone = jax.process_count() == 1
    leaves = {name: of_shards(array) if alone and on_cpu(array) else array for name, array in arrays.items()}
    args = {name: _save_args(leaf) for name, leaf in leaves.items()}
    return ocp.args.PyTreeSave(
        naming.nest(leaves), save_args=naming.nest(args), ocdbt_target_data_file_size=_FILE_BYTES
    )


def _save_args(array: Any) -> ocp.SaveArgs:
    if isinstance(array, Piecewise):
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=_split_axes(array.shape, array.dtype))


def _split_axes(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The axes along which a piece has one entry, as of a stack of experts each expert is a piece.

    Such a piece lies in memory as it does in a file. Orbax would split the largest axis, wherever it is.
    """
    for axes in range(len(shape)):
        size = math.prod(shape[axes:]) * dtype.itemsize
        if size <= _CHUNK_BYTES:
            return tuple(range(axes if size >= _LEAST_CHUNK_BYTES else axes - 1))
    return ()


class ArraysHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's, which can be waited for."""

    _begun: Sequence[Any] = ()

    async def async_save(self, *args: Any, **kwargs: Any) -> Any:
        """Begins to write arrays in the background."""
        self._begun = await super().async_save(*args, **kwargs) or ()
        return self._begun

    def wait(self) -> None:
        """Waits until nothing of the last save is being written any more, whether or not it is whole."""
        for begun in self._begun:
            with contextlib.suppress(Exception):
                begun.result()


class _Manager(ocp.CheckpointManager):
    """Orbax's, but that a failure is told when this process writes no array of :func:`of_shards` any more.

    Orbax tells it as soon as one item has failed, and arrays may go on being written: into a folder that is removed, or
    from memory that the next save's copies need.
    """

    def __init__(self, arrays: ArraysHandler, *args: Any, **kwargs: Any) -> None:
        self._arrays = arrays
        super().__init__(*args, **kwargs)

    def save(self, *args: Any, **kwargs: Any) -> bool:
        with self._failing_last():
            return super().save(*args, **kwargs)

    def wait_until_finished(self) -> None:
        with self._failing_last():
            super().wait_until_finished()

    @contextlib.contextmanager
    def _failing_last(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._arrays.wait()
            raise


def make_manager(
    directory: Path,
    config: CheckpointConfig,
    *,
    read_only: bool,
    in_flight_gb: int = 1,
) -> ocp.CheckpointManager:
    """Makes the manager of a folder of checkpoints.

    Args:
      directory: ``MODEL_DIR/checkpoints``.
      config: which checkpoints are kept.
      read_only: whether nothing is written or cleaned up.
      in_flight_gb: of arrays on their way to the disk; more than the largest shard of one that is not
        :class:`Piecewise`. Without a limit all that is saved would be in memory once more, and at times twice.
    """
    _silence_orbax()
    # Compression is slower than a disk and, on trained parameters, saves next to nothing.
    arrays = ArraysHandler(
        use_ocdbt=True,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=max(1, in_flight_gb),
        type_handler_registry=registry(PiecewiseHandler(in_flight_gb * 10**9)),
    )
    data = DataPositionsHandler()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeSave, arrays)
    handlers.add("state", ocp.args.PyTreeRestore, arrays)
    handlers.add(ITEM, DataPositionsSave, data)
    handlers.add(ITEM, DataPositionsRestore, data)
    manifest = ManifestHandler()
    handlers.add("manifest", ManifestSave, manifest)
    before_commit = None if read_only else manifest.check_written
    options = manager_options(config, read_only=read_only, before_commit=before_commit)
    return _Manager(arrays, directory, handler_registry=handlers, options=options)


@functools.cache
def _silence_orbax() -> None:
    """Drops Orbax's log records.

    It logs each thread's traceback of one failure; what a user needs of it is in the exception that the
    failure becomes.
    """
    from absl import logging as absl_logging

    def not_from_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    absl_logging.get_absl_logger().addFilter(not_from_orbax)
