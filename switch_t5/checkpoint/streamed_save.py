"""Writes a checkpoint of ours whose arrays are made piece by piece, so that the whole is never in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from switch_t5.checkpoint.data_positions import DataPositionsSave
from switch_t5.checkpoint.fingerprint import Running
from switch_t5.checkpoint.manifest import PROMISE, ManifestSave
from switch_t5.checkpoint.orbax_manager import in_pieces, make_manager
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.checkpoint.run_folder import DIRECTORY
from switch_t5.checkpoint.stored_arrays import Produce, StoredArray, writable_chunks


@dataclasses.dataclass
class _Streamed:
    """An array that Orbax takes for a leaf of the tree, and the handler below for something to ask for pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    produce: Produce
    running: Running = dataclasses.field(default_factory=Running)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _StreamedHandler(type_handlers.NumpyHandler):
    """Writes one piece of one array at a time; what it writes is as NumPy's arrays are written."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        # Nothing is awaited: Orbax starts the writing of all arrays together, and so they come one after another.
        store = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
        chunk = tuple(int(size or 1) for size in store.chunk_layout.write_chunk.shape or ())
        for index in writable_chunks(value.shape, chunk):
            part = value.produce(index)
            value.running.add_part(part, index, value.shape)
            store[index].write(part).result()

    def memory_size(self, values: Sequence[Any]) -> Sequence[tuple[int, int]]:
        return [(value.nbytes, value.nbytes) for value in values]


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
    leaves = {name: _Streamed(array.shape, array.dtype, produce) for name, (array, produce) in arrays.items()}
    for name, value in scalars.items():
        leaves[name] = _Streamed(value.shape, value.dtype, lambda index, value=value: value)
    registry = type_handlers.create_type_handler_registry((_Streamed, _StreamedHandler()))
    items = ocp.args.Composite(
        state=in_pieces(leaves),
        data=DataPositionsSave({}),
        manifest=ManifestSave(lambda: {name: leaf.running.sums for name, leaf in leaves.items()}, leaves),
    )
    directory = model_dir / DIRECTORY
    directory.mkdir()
    manager = make_manager(directory, CheckpointConfig(), read_only=False, registry=registry)
    try:
        manager.save(step, args=items, custom_metadata=PROMISE, force=True)
        manager.wait_until_finished()
    finally:
        manager.close()
