"""Arrays of our own checkpoints, read one by one: Orbax's files without Orbax's way of reading a whole tree."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from switch_t5.checkpoint.fingerprint import Running
from switch_t5.checkpoint.folder import array_errors, is_url, key_value_store
from switch_t5.checkpoint.manifest import Manifest, check_arrays, check_files, read_manifest
from switch_t5.checkpoint.naming import SEPARATOR
from switch_t5.checkpoint.stored_arrays import Index, OpenCheckpoint, StoredArray, pieces

_NAME_SEPARATOR = "."
_LARGEST_CHUNK = 1 << 32
"""Bytes; pieces of ours are of 64 MB or less, but for arrays that nothing divides."""
_REMOTE = ts.Context({"cache_pool": {"total_bytes_limit": 1 << 26}})  # Where each look at an index is a request.


def open_native(folder: str, step: int, leaves: Mapping[str, Any]) -> OpenCheckpoint:
    """Opens one checkpoint of a run.

    Args:
      folder: ``MODEL_DIR/checkpoints/<step>``.
      step: which.
      leaves: shape and dtype of each array by name, as its manifest says, or Orbax's metadata where there is none.
    """
    arrays = {
        name: StoredArray(tuple(leaf.shape), np.dtype(leaf.dtype), functools.partial(_read, folder, name, leaf))
        for name, leaf in leaves.items()
    }
    return OpenCheckpoint(folder, "native", arrays, step)


def open_array(folder: str, name: str) -> ts.Future[ts.TensorStore]:
    """Opens an array in the folder of a checkpoint; its values are not read."""
    base = key_value_store(f"{folder}/state").spec().to_json()
    store = {"driver": "ocdbt", "base": base, "path": name.replace(SEPARATOR, _NAME_SEPARATOR) + "/"}
    context = _REMOTE if is_url(folder) else None
    return ts.open({"driver": "zarr3", "kvstore": store}, open=True, read=True, context=context)


def _read(folder: str, name: str, leaf: Any, index: Index) -> np.ndarray:
    with array_errors(f"{folder}: {name}"):
        opened = open_array(folder, name).result()  # Anew each time: a thousand open arrays would hold their caches.
        check_opened(opened, leaf)
        return opened[index].read().result()


def check_opened(opened: ts.TensorStore, leaf: Any) -> None:
    """Checks, before it is read, that an array is what the checkpoint says.

    Args:
      opened: the array.
      leaf: its shape and dtype.

    Raises:
      ValueError: they are others, or its chunks are larger than it, or than any of ours: tensorstore would take the
        room of a whole one, and abort.
    """
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if tuple(opened.shape) != shape or opened.dtype.numpy_dtype != dtype:
        raise ValueError(f"it is {opened.dtype.name}{list(opened.shape)} and not {dtype}{list(shape)}")
    chunk = [part or 1 for part in opened.chunk_layout.read_chunk.shape or ()]
    is_larger = any(part > max(1, size) for size, part in zip(shape, chunk, strict=True))
    if is_larger or math.prod(chunk) * dtype.itemsize > _LARGEST_CHUNK:
        raise ValueError(f"its chunks are {chunk}")


def checked(checkpoint: OpenCheckpoint) -> OpenCheckpoint:
    """The checkpoint, each of whose arrays is checked against its fingerprint before a part of it is first read.

    Raises:
      CheckpointDamaged: the manifest is damaged; later, when an array that is damaged is read.
    """
    folder = checkpoint.path
    manifest = read_manifest(folder)
    if manifest is None:
        return checkpoint
    arrays = {
        name: dataclasses.replace(array, read=_read_checked(folder, manifest, name, array))
        for name, array in checkpoint.arrays.items()
    }
    return dataclasses.replace(checkpoint, arrays=arrays)


def _read_checked(folder: str, manifest: Manifest, name: str, array: StoredArray) -> Callable[[Index], np.ndarray]:
    check = functools.cache(lambda: _check(folder, manifest, name, array))

    def read(index: Index) -> np.ndarray:
        check()
        return array.read(index)

    return read


def verify(checkpoint: OpenCheckpoint) -> int:
    """Reads every array and checks it against its fingerprint.

    Returns:
      How many arrays were checked; 0 for a checkpoint without a manifest.

    Raises:
      CheckpointDamaged: names the first array or file that is damaged.
    """
    folder = checkpoint.path
    manifest = read_manifest(folder)
    if manifest is None:
        return 0
    check_files(folder, manifest)
    for name, array in checkpoint.arrays.items():
        _check(folder, manifest, name, array)
    return len(checkpoint.arrays)


def _check(folder: str, manifest: Manifest, name: str, array: StoredArray) -> None:
    check_arrays(folder, manifest, {name: fingerprint_of(array)})


def fingerprint_of(array: StoredArray) -> np.ndarray:
    """The fingerprint of an array that is read for it, piece by piece: two uint32."""
    running = Running()
    for index in pieces(array.shape, array.dtype.itemsize):
        running.add_part(array.read(index), index, array.shape)
    return running.sums
