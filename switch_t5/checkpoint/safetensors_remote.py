"""Safetensors at a URL such as ``gs://``, read by ranges of bytes.

Our own, since the safetensors library opens files of a disk alone.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from typing import Any

import numpy as np
from jax import numpy as jnp

from switch_t5.checkpoint.folder import read_range
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, Index, StoredArray
from switch_t5.errors import UserError

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""Safetensors' names of dtypes, by NumPy's."""

_LARGEST_HEADER = 100_000_000  # The library's own limit.
_PIECE = 1 << 26


def dtype_of(name: str, what: str) -> np.dtype:
    """The dtype that safetensors calls so.

    Args:
      name: such as ``"BF16"``.
      what: begins the sentence about one that cannot be read.

    Raises:
      UserError: it is none that models are stored in.
    """
    if name not in _DTYPES:
        raise UserError(f"{what} of dtype {name}: {', '.join(_DTYPES)} can be read.")
    return jnp.dtype(_DTYPES[name])


def open_remote_shard(url: str, name: str) -> dict[str, StoredArray]:
    """Opens a file; its header is read and checked, and that its last byte is there.

    Args:
      url: the folder.
      name: the file in it.

    Raises:
      CheckpointDamaged: it is no safetensors file, or cut short.
      UserError: it holds arrays of a dtype that models are not stored in.
    """
    file = f"{url}/{name}"
    length = read_range(url, name, 0, 8)
    size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
    if not 2 <= size <= _LARGEST_HEADER:
        raise CheckpointDamaged(f"{file} is damaged: it is no safetensors file (a header of {size:,} bytes).")
    try:
        header = json.loads(read_range(url, name, 8, 8 + size))
        places = {key: _place(entry) for key, entry in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamaged(f"{file} is damaged: its header is none ({str(error)[:100]}).") from error
    arrays, last = {}, 0
    for key, (name_of_dtype, shape, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        dtype = dtype_of(name_of_dtype, f"{file} holds {key}")
        if begin != last or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointDamaged(f"{file} is damaged: its header gives {key} bytes that are not its own.")
        read = functools.partial(_read, url, name, shape, dtype, 8 + size + begin)
        arrays[key], last = StoredArray(shape, dtype, read), end
    if last and not read_range(url, name, 8 + size + last - 1, 8 + size + last):
        raise CheckpointDamaged(f"{file} is damaged: it is cut short.")
    return arrays


def _place(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """The dtype's name, shape, first byte and the one after the last of an array, as a header has them."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    small = all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, begin, end))
    if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > 8 or not small:
        raise ValueError(f"{str(entry)[:50]} is no array")
    return dtype, tuple(shape), begin, end


def _read(url: str, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, index: Index) -> np.ndarray:
    """A part of an array that begins at ``offset``: the rows that it lies in are read, some 64 MB at a time."""
    if not shape:
        return _values(url, name, offset, (), dtype)
    result = np.empty([at.stop - at.start for at in index], dtype)
    row = math.prod(shape[1:]) * dtype.itemsize
    at_once = max(1, _PIECE // max(1, row))
    for first in range(0, len(result), at_once):
        count = min(at_once, len(result) - first)
        rows = _values(url, name, offset + (index[0].start + first) * row, (count, *shape[1:]), dtype)
        result[first : first + count] = rows[:, *index[1:]]
    return result


def _values(url: str, name: str, begin: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The numbers of this shape that lie one after another from ``begin``."""
    size = math.prod(shape) * dtype.itemsize
    values = read_range(url, name, begin, begin + size)
    if len(values) != size:
        raise CheckpointDamaged(f"{url}/{name} is damaged: it is cut short.")
    return np.frombuffer(values, dtype).reshape(shape)
