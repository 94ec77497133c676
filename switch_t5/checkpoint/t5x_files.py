"""T5X's files, without T5X: a msgpack index ``checkpoint``, and a Zarr folder for each array.

Every array of more than one number is a folder ``target.a.b.c`` or ``state.param_states.a.b.c.v`` (Zarr's second
version, gzip or nothing); the others stand in the index. tensorstore reads and writes the arrays, on a disk or ``gs://``.
"""

from __future__ import annotations

import functools
import math
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import numpy as np
import tensorstore as ts
from jax import numpy as jnp

from switch_t5.checkpoint.folder import array_errors, file_names, key_value_store, read_file
from switch_t5.checkpoint.stored_arrays import (
    CheckpointDamaged,
    Index,
    OpenCheckpoint,
    Produce,
    StoredArray,
    writable_chunks,
)
from switch_t5.errors import UserError

INDEX = "checkpoint"
VERSION = 3
FOLDER = "checkpoint_"
"""What a checkpoint's folder is called before its step."""

COMPRESSIONS: dict[str, dict[str, Any] | None] = {"gzip": {"id": "gzip", "level": 1}, "none": None}
"""How chunks are stored, as Zarr calls it: T5X writes the first, and reads both."""

_NDARRAY = 1  # The extension type of Flax's msgpack for an array.
_LARGEST_INDEX = 1 << 30
_LARGEST_CHUNK = 1 << 26
_UNSYNCED = ts.Context({"file_io_sync": False})
_DTYPES = ("float32", "bfloat16", "float16", "float64", "int32", "int64", "uint32", "bool")


def open_t5x(path: str) -> OpenCheckpoint:
    """Opens a checkpoint of T5X; no array is read, but all of its files are looked for.

    Args:
      path: the folder with the index.

    Raises:
      CheckpointDamaged: the index cannot be read, or files of an array are missing.
      UserError: the index names a folder elsewhere, or a dtype or size that no model has.
    """
    index = _read_index(path)
    files = file_names(path)
    arrays: dict[str, StoredArray] = {}
    missing: list[str] = []
    for name, leaf in _leaves(index.get("optimizer"), path):
        if isinstance(leaf, np.ndarray):
            arrays[name] = StoredArray(leaf.shape, leaf.dtype, functools.partial(_part, leaf))
            continue
        folder, array, grid = _described(path, name, leaf)
        arrays[name] = array
        # More chunks than there are files are not all there; what an index says of them is not to be counted up.
        chunks = (".".join(map(str, at)) for at in np.ndindex(*grid))
        if math.prod(grid) > len(files) or not all(f"{folder}/{file}" in files for file in (".zarray", *chunks)):
            missing.append(folder)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointDamaged(
            f"{path} is not whole: it lacks files of {', '.join(missing[:3])}{more}; copy the whole folder again."
        )
    step = _step(arrays.get("state/step"), path)
    called = step_of_folder(posixpath.basename(path))
    if step is not None and called is not None and called != step:
        raise CheckpointDamaged(
            f"{path}/{INDEX} is damaged, or the folder was renamed: it is of step {step}, and not of step {called}."
        )
    return OpenCheckpoint(path, "t5x", arrays, step)


def step_of_folder(name: str) -> int | None:
    """The step that a folder's name says, as T5X would call it; None where it says none."""
    found = re.fullmatch(rf"{FOLDER}(\d{{1,18}})", name)
    return int(found[1]) if found else None


def _step(stored: StoredArray | None, path: str) -> int | None:
    if stored is None:
        return None
    if math.prod(stored.shape) != 1 or stored.dtype.kind not in "iu":
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: its step has shape {stored.shape}, dtype {stored.dtype}.")
    return int(stored.whole().item())


def _read_index(path: str) -> dict[str, Any]:
    try:
        found = read_file(path, INDEX, _LARGEST_INDEX)
    except OSError as error:
        raise CheckpointDamaged(f"{path}/{INDEX} cannot be read ({error.strerror}).") from error
    if found is None:
        raise CheckpointDamaged(f"{path} has no file {INDEX!r}, T5X's index: it is no T5X checkpoint, or not whole.")
    try:
        index = msgpack.unpackb(found, ext_hook=_extension, strict_map_key=False)
    # What damaged bytes raise is of many kinds: all mean that the index cannot be read.
    except Exception as error:
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: it is no msgpack ({error}).") from error
    if not isinstance(index, dict) or not isinstance(index.get("optimizer"), dict):
        raise CheckpointDamaged(f"{path}/{INDEX} is no index of T5X: it has no 'optimizer'.")
    version = index.get("version", 0)
    if version != VERSION:
        raise UserError(f"{path}/{INDEX} is of version {version!r}: version {VERSION} can be read.")
    return index


def _extension(code: int, data: bytes) -> Any:
    if code != _NDARRAY:
        raise ValueError(f"extension type {code}")
    shape, dtype, values = msgpack.unpackb(data, raw=True)
    name = dtype.decode()
    if name not in _DTYPES:
        raise ValueError(f"dtype {name}")
    return np.frombuffer(values, jnp.dtype(name)).reshape(shape)


def _leaves(node: Any, path: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays and descriptions of arrays, by their names joined by slashes."""
    if isinstance(node, np.ndarray) or (isinstance(node, Mapping) and "driver" in node):
        yield prefix, node
        return
    if not isinstance(node, Mapping):
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: {prefix or 'its root'} is {type(node).__name__}.")
    if prefix.count("/") > 50:
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: its names nest beyond 50 levels.")
    for name, inner in node.items():
        yield from _leaves(inner, path, f"{prefix}/{name}" if prefix else str(name))


def _described(path: str, name: str, leaf: Mapping[str, Any]) -> tuple[str, StoredArray, tuple[int, ...]]:
    """An array's folder, the array, and how many chunks it has along each dim."""
    metadata = leaf.get("metadata")
    store = leaf.get("kvstore")
    folder = (store.get("path") if isinstance(store, Mapping) else None) or leaf.get("path")
    if leaf.get("driver") != "zarr" or not isinstance(metadata, Mapping) or not isinstance(folder, str):
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: it describes no array at {name}.")
    folder = posixpath.normpath(folder)
    if "/" in folder or folder in (".", ".."):
        raise UserError(f"{path}/{INDEX} names {folder!r} for {name}, which is outside of the checkpoint: refused.")
    shape, chunk = _sizes(metadata.get("shape")), _sizes(metadata.get("chunks"))
    dtype = leaf.get("dtype")
    if shape is None or chunk is None or len(shape) != len(chunk) or 0 in chunk or dtype not in _DTYPES:
        raise CheckpointDamaged(f"{path}/{INDEX} is damaged: it gives {name} shape {metadata.get('shape')!r}.")
    large = any(part > max(1, size) for size, part in zip(shape, chunk, strict=True)) or math.prod(chunk) > 1 << 32
    if large or math.prod(shape) > 1 << 42:
        raise UserError(
            f"{path}/{INDEX} gives {name} the shape {shape} in chunks of {chunk}, larger than any model's: refused."
        )
    read = functools.partial(_read, path, folder, shape, chunk)
    return folder, StoredArray(shape, jnp.dtype(dtype), read), tuple(map(_ceil, shape, chunk))


def _ceil(size: int, part: int) -> int:
    return -(-size // part)


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list | tuple) or len(value) > 8:
        return None
    return tuple(value) if all(type(size) is int and 0 <= size < 1 << 40 for size in value) else None


def _part(array: np.ndarray, index: Index) -> np.ndarray:
    return array[index]


def _read(path: str, folder: str, shape: tuple[int, ...], chunk: tuple[int, ...], index: Index) -> np.ndarray:
    with array_errors(f"{path}/{folder}"):
        store = ts.open(
            {"driver": "zarr", "kvstore": key_value_store(f"{path}/{folder}").spec().to_json()}, open=True, read=True
        ).result()
        if tuple(store.shape) != shape:
            raise ValueError(f"its shape is {tuple(store.shape)} and not {shape}")
        chunks = tuple(store.chunk_layout.read_chunk.shape or ())
        if chunks != chunk:  # tensorstore would take the room of a whole chunk, whatever its size, and abort.
            raise ValueError(f"its chunks are {chunks} and not {chunk}")
        return store[index].read().result()


def write_t5x(
    folder: str,
    arrays: Mapping[str, tuple[StoredArray, Produce]],
    scalars: Mapping[str, np.ndarray],
    compression: str = "gzip",
) -> None:
    """Writes a checkpoint: arrays piece by piece, the index at last; nothing of it is synced.

    Args:
      folder: an empty folder that nobody reads yet.
      arrays: by their names; of each its shape and dtype, and what makes it.
      scalars: arrays of one number, for the index.
      compression: one of ``COMPRESSIONS``.
    """
    tree: dict[str, Any] = {}
    for name, (array, produce) in arrays.items():
        if math.prod(array.shape) == 1:
            _insert(tree, name, _inline(produce(None)))
            continue
        spec = _specification(name, array, COMPRESSIONS[compression])
        place = {**spec, "kvstore": {"driver": "file", "path": f"{folder}/{spec['kvstore']['path']}"}}
        store = ts.open(place, create=True, delete_existing=True, context=_UNSYNCED).result()
        for index in writable_chunks(array.shape, tuple(spec["metadata"]["chunks"])):
            store[index].write(produce(index)).result()
        _insert(tree, name, spec)
    for name, value in scalars.items():
        _insert(tree, name, _inline(value))
    packed = msgpack.packb({"version": VERSION, "optimizer": tree}, use_bin_type=True)
    key_value_store(folder).write(INDEX, packed).result()


def _inline(value: np.ndarray) -> msgpack.ExtType:
    content = msgpack.packb((list(value.shape), value.dtype.name, value.tobytes()), use_bin_type=True)
    return msgpack.ExtType(_NDARRAY, content)


def _insert(tree: dict[str, Any], name: str, leaf: Any) -> None:
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = leaf


def _specification(name: str, array: StoredArray, compressor: dict[str, Any] | None) -> dict[str, Any]:
    """An array as T5X's index describes it."""
    chunks = list(array.shape)
    while math.prod(chunks) * array.dtype.itemsize > _LARGEST_CHUNK:
        # Halved along the first dim that can be: experts and rows stay whole.
        at = next(dim for dim, size in enumerate(chunks) if size > 1)
        chunks[at] = -(-chunks[at] // 2)
    return {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"{name.replace('/', '.')}/"},
        "metadata": {
            "shape": list(array.shape),
            "chunks": chunks,
            "compressor": compressor,
        },
    }
