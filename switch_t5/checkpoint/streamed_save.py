"""Writes a checkpoint of ours whose arrays are made piece by piece, so that the whole is never in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from switch_t5.checkpoint.data_positions import DataPositionsSave
from switch_t5.checkpoint.fingerprint import Running
from switch_t5.checkpoint.manifest import PROMISE, ManifestSave
from switch_t5.checkpoint.orbax_manager import make_manager, to_save
from switch_t5.checkpoint.piecewise import Piecewise
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.checkpoint.run_folder import DIRECTORY
from switch_t5.checkpoint.stored_arrays import Index, Produce, StoredArray, writable_chunks


def save_streamed(
    model_dir: Path,
    step: int,
    arrays: Mapping[str, tuple[StoredArray, Produce]],
    scalars: Mapping[str, np.ndarray],
) -> None:
    """Writes one checkpoint into a new MODEL_DIR.

    Args:
      model_dir: an empty folder that nobody reads yet.
      step: of the checkpoint.
      arrays: by their names; of each its shape and dtype, and what makes a part of it.
      scalars: small arrays.
    """
    sums = {name: Running() for name in (*arrays, *scalars)}
    leaves = {
        name: _produced(array.shape, array.dtype, produce, sums[name]) for name, (array, produce) in arrays.items()
    }
    for name, value in scalars.items():
        leaves[name] = _produced(value.shape, value.dtype, lambda index, value=value: value, sums[name])
    items = ocp.args.Composite(
        state=to_save(leaves),
        data=DataPositionsSave({}),
        manifest=ManifestSave(lambda: {name: running.sums for name, running in sums.items()}, leaves),
    )
    directory = model_dir / DIRECTORY
    directory.mkdir()
    manager = make_manager(directory, CheckpointConfig(), read_only=False, in_flight_gb=0)
    try:
        manager.save(step, args=items, custom_metadata=PROMISE, force=True)
        manager.wait_until_finished()
    finally:
        manager.close()


def _produced(shape: tuple[int, ...], dtype: np.dtype, produce: Produce, running: Running) -> Piecewise:
    """An array that is made when it is written, and summed meanwhile."""

    def parts(piece: tuple[int, ...]) -> Iterator[tuple[Index, np.ndarray]]:
        for index in writable_chunks(shape, piece):
            part = produce(index)
            running.add_part(part, index, shape)
            yield index, part

    return Piecewise(shape, dtype, shape, parts)
