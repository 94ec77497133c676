"""Arrays of a checkpoint that are read piece by piece, whatever format holds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from switch_t5.errors import UserError

Index = tuple[slice, ...]
"""A slice a dim, start and stop given, step 1."""
Produce = Callable[[Index | None], np.ndarray]
"""Makes an array, or the part of it that an index names."""

_PIECE, _LEAST_PIECE, _LARGEST_PIECE = 1 << 25, 1 << 20, 1 << 30
"""Bytes of the parts that arrays are read, written and stored in."""


class CheckpointDamaged(UserError):  # noqa: N818 (it says what is wrong with the user's files)
    """A checkpoint whose files are missing, cut short or altered."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint, not yet read.

    Attributes:
      shape: its dims.
      dtype: as NumPy (with ml_dtypes) calls it.
      read: reads the part that an :data:`Index` names.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """The whole array."""
        return self.read(tuple(slice(0, dim) for dim in self.shape))


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """An opened checkpoint: what it holds, by the names of its format.

    Attributes:
      path: where it is, for messages.
      format: ``native``, ``t5x`` or ``huggingface``.
      arrays: parameters and optimizer state by the format's names; nothing is read yet.
      step: training steps done, where the format says.
      config: the model's description that lies beside the arrays, where the format has one.
    """

    path: str
    format: str
    arrays: Mapping[str, StoredArray]
    step: int | None = None
    config: Mapping[str, Any] | None = None


def bounded(index: Index, shape: tuple[int, ...]) -> Index:
    """A device's index of an array of this shape, which may leave starts and stops out, with both given."""
    return tuple(slice(*at.indices(dim)[:2]) for at, dim in zip(index, shape, strict=True))


def writable_chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Index]:
    """The parts of an array, a chunk each, in order."""
    for at in np.ndindex(*(-(-size // part) for size, part in zip(shape, chunk, strict=True))):
        yield tuple(
            slice(where * part, min(size, (where + 1) * part))
            for where, part, size in zip(at, chunk, shape, strict=True)
        )


def pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[Index]:
    """The parts of an array of at most 32 MB each, consecutive in memory, in order: as stored if they divide it."""
    return writable_chunks(shape, _divided(shape, itemsize, lambda size, most: most))


def piece_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The dims of a part of at most 32 MB that lies in memory as it does in a file, such as a few experts' kernels.

    They divide the array's, so that a shard is of whole pieces; larger ones, of up to 1 GB, are left whole where only
    pieces of less than 1 MB do. Where one entry of a dim is already too large the next dim is divided.
    """

    def small_or_whole(size: int, most: int) -> int:
        whole = math.prod(shape) * itemsize <= _LARGEST_PIECE
        return size if whole else next(part for part in range(most, 0, -1) if size % part == 0)

    return _divided(shape, itemsize, small_or_whole)


def _divided(shape: tuple[int, ...], itemsize: int, otherwise: Callable[[int, int], int]) -> tuple[int, ...]:
    """The dims of pieces; ``otherwise`` has a dim and the most entries of it that fit, where no part of it will do."""
    piece = [max(1, size) for size in shape]
    for dim, size in enumerate(piece):
        entry = math.prod(piece[dim + 1 :]) * itemsize
        if size * entry <= _PIECE:
            break
        most, least = max(1, _PIECE // entry), -(-_LEAST_PIECE // entry)
        piece[dim] = next((part for part in range(most, least - 1, -1) if size % part == 0), 0) or otherwise(size, most)
    return tuple(piece)
