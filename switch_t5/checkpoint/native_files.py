"""Arrays of our own checkpoints, read one by one: Orbax's files without Orbax's way of reading a whole tree."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from switch_t5.checkpoint.fingerprint import Running
from switch_t5.checkpoint.manifest import check_arrays, check_files, read_manifest
from switch_t5.checkpoint.naming import SEPARATOR
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, Index, OpenCheckpoint, StoredArray, writable_chunks

_NAME_SEPARATOR = "."
_PIECE = 1 << 26


def open_native(directory: Path, step: int, leaves: dict[str, Any]) -> OpenCheckpoint:
    """Opens one checkpoint of a run.

    Args:
      directory: ``MODEL_DIR/checkpoints``.
      step: which.
      leaves: shape and dtype of each array by name, as the checkpoint's metadata say.
    """
    folder = directory / str(step)
    arrays = {
        name: StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype), functools.partial(_read, folder, name))
        for name, leaf in leaves.items()
    }
    return OpenCheckpoint(str(folder), "native", arrays, step)


def _read(folder: Path, name: str, index: Index) -> np.ndarray:
    # Opened at each reading: a thousand open arrays would hold their caches.
    base = f"file://{folder / 'state'}/"
    store = {"driver": "ocdbt", "base": base, "path": name.replace(SEPARATOR, _NAME_SEPARATOR) + "/"}
    try:
        return ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()[index].read().result()
    except ValueError as error:
        raise CheckpointDamaged(f"{folder}: {name} is damaged ({str(error).splitlines()[0][:200]}).") from error


def verify(checkpoint: OpenCheckpoint) -> int:
    """Reads every array piece by piece and checks it against its fingerprint.

    Returns:
      How many arrays were checked; 0 for a checkpoint without a manifest.

    Raises:
      CheckpointDamaged: names the first array or file that is damaged.
    """
    folder = Path(checkpoint.path)
    manifest = read_manifest(folder)
    if manifest is None:
        return 0
    check_files(folder, manifest)
    for name in manifest.arrays:
        if name not in checkpoint.arrays:
            raise CheckpointDamaged(f"{folder} lacks {name}.")
        array = checkpoint.arrays[name]
        running = Running()
        rows = max(1, _PIECE // max(1, array.nbytes // max(1, array.shape[0]))) if array.shape else 1
        for index in writable_chunks(array.shape, (min(rows, array.shape[0]), *array.shape[1:]) if array.shape else ()):
            running.add_part(array.read(index), index, array.shape)
        check_arrays(folder, manifest, {name: running.sums})
    return len(manifest.arrays)
