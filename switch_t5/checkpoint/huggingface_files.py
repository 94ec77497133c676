"""Hugging Face's files, without its libraries: ``config.json`` and safetensors shards. Pickles are never read."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from switch_t5.checkpoint.folder import entries, is_url, read_file
from switch_t5.checkpoint.safetensors_remote import NAMES, dtype_of, open_remote_shard
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, Index, OpenCheckpoint, Produce, StoredArray, pieces
from switch_t5.errors import UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_LARGEST_JSON = 1 << 28
_SHARD_BYTES = 1 << 31
"""What a shard stays below, unless one array is larger."""


def open_huggingface(path: str) -> OpenCheckpoint:
    """Opens a folder of Hugging Face's; headers are read and checked, arrays are not.

    Raises:
      CheckpointDamaged: a file is missing, cut short or no safetensors, or an array of the index is not there.
      UserError: the weights are pickled, or the index names a file elsewhere.
    """
    config = _read_json(path, CONFIG)
    arrays: dict[str, StoredArray] = {}
    open_shard = open_remote_shard if is_url(path) else _open_shard
    for file, names in _shards(path).items():
        found = open_shard(path, file)
        lacking = [name for name in names if name not in found]
        if lacking:
            raise CheckpointDamaged(f"{path}/{file} lacks {', '.join(lacking[:3])}, which the index promises.")
        arrays |= found
    return OpenCheckpoint(path, "huggingface", arrays, None, config)


def _read_json(folder: str, name: str) -> dict[str, Any]:
    file = f"{folder}/{name}"
    try:
        found = read_file(folder, name, _LARGEST_JSON)
        if found is None:
            raise CheckpointDamaged(f"{file} is missing: {folder} is no whole Hugging Face model.")
        value = json.loads(found)
    except OSError as error:
        raise CheckpointDamaged(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{file} is damaged: it is no JSON ({str(error)[:100]}).") from error
    if not isinstance(value, dict):
        raise CheckpointDamaged(f"{file} is damaged: it is no JSON object.")
    return value


def _shards(folder: str) -> dict[str, list[str]]:
    """The files of the weights, each with the arrays that the index promises in it."""
    there = entries(folder)
    if WEIGHTS_INDEX in there:
        index = f"{folder}/{WEIGHTS_INDEX}"
        where = _read_json(folder, WEIGHTS_INDEX).get("weight_map")
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointDamaged(f"{index} is damaged: it has no weight_map.")
        files: dict[str, list[str]] = {}
        for name, file in where.items():
            if Path(file).name != file or file in ("", ".", ".."):
                raise UserError(f"{index} names the file {file!r}, outside of the folder: refused.")
            files.setdefault(file, []).append(name)
        missing = [file for file in files if file not in there]
        if missing:
            lost = [name for file in missing for name in files[file]]
            more = f" and {len(lost) - 1} more arrays" if len(lost) > 1 else ""
            raise CheckpointDamaged(
                f"{folder} is not whole: it lacks {', '.join(missing[:3])} with {lost[0]}{more}; copy it again."
            )
        return files
    if WEIGHTS in there:
        return {WEIGHTS: []}
    if there & set(PICKLES):
        raise UserError(
            f"{folder} holds pickled weights, which can run code and are never read; write them anew with "
            "transformers: model.save_pretrained(FOLDER, safe_serialization=True)."
        )
    raise CheckpointDamaged(f"{folder} has no {WEIGHTS} and no {WEIGHTS_INDEX}: it is no whole Hugging Face model.")


def _open_shard(folder: str, name: str) -> dict[str, StoredArray]:
    file = f"{folder}/{name}"
    arrays = {}
    with _opened(file) as shard:
        for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
            piece = shard.get_slice(name)
            shape = tuple(piece.get_shape())
            dtype = dtype_of(piece.get_dtype(), f"{file} holds {name}")
            arrays[name] = StoredArray(shape, dtype, functools.partial(_read, file, name, shape))
    return arrays


def _read(file: str, name: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
    # Opened anew each time: what a mapped file has read stays in the process's memory until it is closed.
    with _opened(file) as shard:
        return shard.get_slice(name)[index] if shape else shard.get_tensor(name)


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A file by the library, which checks its header: sizes, overlaps, and that each byte is there."""
    try:
        with safetensors.safe_open(file, framework="numpy") as shard:
            yield shard
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointDamaged(f"{file} is damaged: it is no safetensors file ({str(error)[:150]}).") from error


def write_huggingface(
    folder: Path, config: Mapping[str, Any], arrays: Mapping[str, tuple[StoredArray, Produce]]
) -> None:
    """Writes a model: ``config.json`` and shards of safetensors; nothing of it is synced.

    Args:
      folder: an empty folder that nobody reads yet.
      config: the model's description.
      arrays: by their names; of each its shape and dtype, and what makes it or a part of it.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, (array, _) in arrays.items():
        if shards[-1] and size + array.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    where = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, {name: arrays[name] for name in names})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(array.nbytes for array, _ in arrays.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")


def _write_shard(file: Path, arrays: Mapping[str, tuple[StoredArray, Produce]]) -> None:
    """Writes one file, array by array; safetensors' own writer wants all of a file's arrays in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (array, _) in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for array, produce in arrays.values():
            for index in pieces(array.shape, array.dtype.itemsize):
                stream.write(np.ascontiguousarray(produce(index)).tobytes())
