"""A checksum of an array that no mesh changes: computed where its shards lie, by one pass and two sums.

Entry i of the array, as the unsigned integer of its bits, counts with an odd weight that depends on i, modulo 2^32. So
one flipped bit always changes the sum, whatever order devices add in. The second sum mixes the bits first, so that
two changes do not cancel in both. CRC-32 and cryptographic digests run through bytes in order, and would need the
array on one host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.checkpoint.stored_arrays import Index, bounded
from switch_t5.types import Array

_WEIGHT, _MIX = 0x9E3779B1, 0x85EBCA6B  # Odd constants of well spread bits.
_CHUNK = 1 << 16
"""Entries that the host sums at a time: they and what is made of them stay in a core's cache."""
_LARGE = 1 << 24
"""Bytes from which a program for an array's shape is worth compiling: it is four times as fast as NumPy."""
_ROW = 1 << 13
"""Entries that such a program sums at a time."""

Parts = list[Any]
"""The sums of a process's shards, each on its device, perhaps still being computed."""


def begin(array: Any) -> Parts:
    """Starts the fingerprint of this process's shards, each where it lies; nothing is copied between devices.

    Small ones in the host's memory are summed when this returns, others may still be being summed. No sums over
    devices are asked for: on virtual CPU devices they could wait for one another with a step's.

    Args:
      array: of jax.Array or NumPy; its buffers may be given away as soon as this returns.
    """
    running, parts = Running(), []
    if not isinstance(array, jax.Array):
        if jax.process_index() == 0:
            running.add_whole(np.asarray(array))
        return [running.sums]
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            index = bounded(shard.index, array.shape)
            if shard.device.platform == "cpu" and shard.data.nbytes < _LARGE:
                running.add_part(np.asarray(shard.data), index, array.shape)
            else:
                parts.append(_on_device(shard.data, np.uint32(_offset(index, array.shape) % (1 << 32)), array.shape))
    return [running.sums, *parts]


def _offset(index: Index, shape: tuple[int, ...]) -> int:
    """The position of a part's first entry among all of the array."""
    return sum(at.start * stride for at, stride in zip(index, _strides(shape), strict=True))


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def finish(parts: dict[str, Parts]) -> dict[str, np.ndarray]:
    """Waits for fingerprints, and adds up those of all processes; all call it together.

    Returns:
      Of each array two uint32.
    """
    sums: dict[str, np.ndarray] = {
        name: np.asarray(np.sum([np.zeros(2, np.uint32), *map(np.asarray, own)], 0, np.uint32))
        for name, own in parts.items()
    }
    if jax.process_count() == 1 or not sums:
        return sums
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.stack(list(sums.values())))
    return dict(zip(sums, np.asarray(np.sum(gathered, 0, np.uint32)), strict=True))


@functools.partial(jax.jit, static_argnums=2)
def _on_device(shard: Array, offset: Array, shape: tuple[int, ...]) -> Array:
    """The sums of a shard whose first entry is at ``offset`` of an array of this shape."""
    words = _words(shard.dtype)
    strides = _strides(shape if words == 1 else (*shape, words))
    sums = jax.lax.platform_dependent(
        shard,
        offset * np.uint32(words),
        cpu=functools.partial(_by_rows, strides=strides),
        default=functools.partial(_at_once, strides=strides),
    )
    return sums * np.array([1, _WEIGHT], np.uint32)


def _at_once(array: Array, first: Array, strides: list[int]) -> Array:
    """Both sums of the array's bits, the second without its factor, by one pass over all."""
    bits = _bits(array)
    odd = 2 * (first + _positions(bits.shape, strides)) + 1
    return jnp.stack([jnp.sum(bits * odd, dtype=jnp.uint32), jnp.sum(_mixed(bits) * odd, dtype=jnp.uint32)])


def _by_rows(array: Array, first: Array, strides: list[int], row: int = _ROW) -> Array:
    """As :func:`_at_once`, by a loop over rows: XLA:CPU vectorises sums into an array, not sums of an array."""
    words = _words(array.dtype)
    dims = array.shape if words == 1 else (*array.shape, words)
    if not dims:
        return _at_once(array, first, strides)
    at, split = _row_of(dims, row)
    rows, inner = (*dims[:at], dims[at] // split), (split, *dims[at + 1 :])
    starts = (first + _positions(rows, [*strides[:at], strides[at] * split])).reshape(-1)
    positions = _positions(inner, strides[at:]).reshape(-1)
    # As numbers still: the bits of a whole array before the loop would be a copy of it.
    table = array.reshape(starts.size, positions.size // words)

    def add(row: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        bits = _bits(table[row]).reshape(-1)
        odd = 2 * (starts[row] + positions) + 1
        return sums[0] + bits * odd, sums[1] + _mixed(bits) * odd

    zeros = jnp.zeros(positions.size, jnp.uint32)
    sums = jax.lax.fori_loop(0, starts.size, add, (zeros, zeros))
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in sums])


def _row_of(dims: tuple[int, ...], row: int) -> tuple[int, int]:
    """The dim that rows of at most ``row`` entries divide, and how many of its entries are in one."""
    at, inner = len(dims) - 1, 1
    while at and inner * dims[at] <= row:
        inner *= dims[at]
        at -= 1
    return at, math.gcd(dims[at], 1 << (row // inner).bit_length() - 1)


def _positions(dims: tuple[int, ...], strides: list[int]) -> Array:
    """The position of each entry of a block among all, modulo 2^32, from that of its first."""
    positions = jnp.zeros(dims, jnp.uint32)
    for dim, stride in enumerate(strides):
        positions += jax.lax.broadcasted_iota(jnp.uint32, dims, dim) * np.uint32(stride % (1 << 32))
    return positions


def _mixed(bits: Any) -> Any:
    mixed = bits >> np.uint32(15)
    mixed ^= bits
    mixed *= np.uint32(_MIX)
    mixed ^= mixed >> np.uint32(13)
    return mixed


def _words(dtype: Any) -> int:
    """Sums count an entry as so many uint32."""
    return max(1, np.dtype(dtype).itemsize // 4)


def _bits(array: Array) -> Array:
    """The array's bits as uint32; eight-byte entries become two along a new last dim."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    word = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


class Running:
    """The fingerprint of an array that comes in pieces, on the host: NumPy has no program to compile a shape.

    Attributes:
      sums: two uint32.
    """

    def __init__(self) -> None:
        self.sums = np.zeros(2, np.uint32)

    def add_whole(self, values: np.ndarray) -> None:
        """Takes in all of an array."""
        self._add(values, [(values.size, 1)], 0)

    def add_part(self, values: np.ndarray, index: Index, shape: tuple[int, ...]) -> None:
        """Takes in a part of an array.

        Args:
          values: the part.
          index: where it lies: start and stop a dim.
          shape: the whole array's.
        """
        self._add(values, list(zip(values.shape, _strides(shape), strict=True)), _offset(index, shape))

    def _add(self, values: np.ndarray, dims: list[tuple[int, int]], offset: int) -> None:
        """Takes in entries whose positions start at ``offset``, and are a stride apart along each dim."""
        if not values.size:
            return
        words = _words(values.dtype)
        bits = (
            np.ascontiguousarray(values).reshape(-1).view({1: np.uint8, 2: np.uint16}.get(values.itemsize, np.uint32))
        )
        dims = _merged([*((dim, stride * words) for dim, stride in dims), (words, 1)])
        at, inner = len(dims) - 1, 1  # Chunks are of so many entries of one dim, with all that is in them.
        while at and inner * dims[at][0] <= _CHUNK:
            inner *= dims[at][0]
            at -= 1
        size, stride = dims[at]
        step = max(1, _CHUNK // inner)
        odd = 2 * _spread([(min(step, size), stride), *dims[at + 1 :]]) + np.uint32(1)
        for row, start in zip(bits.reshape(-1, size, inner), _spread(dims[:at]), strict=True):
            for begin in range(0, size, step):
                chunk = row[begin : begin + step].reshape(-1).astype(np.uint32, copy=False)
                first = np.uint32(2 * (offset * words + int(start) + begin * stride) % (1 << 32))
                weights = odd[: chunk.size] + first
                sums = np.array([np.dot(chunk, weights), np.dot(_mixed(chunk), weights)])
                self.sums += sums * np.array([1, _WEIGHT], np.uint32)


def _merged(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes and strides of as few dims as give the same positions in the same order."""
    merged = [dims[-1]]
    for size, stride in reversed(dims[:-1]):
        inner_size, inner_stride = merged[0]
        if size == 1 or stride == inner_size * inner_stride:
            merged[0] = (size * inner_size, inner_stride)
        elif inner_size == 1:
            merged[0] = (size, stride)
        else:
            merged.insert(0, (size, stride))
    return merged


def _spread(dims: list[tuple[int, int]]) -> np.ndarray:
    """The position of each entry relative to the first, modulo 2^32, in order."""
    positions = np.zeros(1, np.uint32)
    for size, stride in dims:
        along = np.arange(size, dtype=np.uint32) * np.uint32(stride % (1 << 32))
        positions = (positions[:, None] + along).reshape(-1)
    return positions


def as_text(sums: Iterable[int]) -> str:
    """A fingerprint as 16 hexadecimal digits."""
    return "".join(f"{int(value):08x}" for value in sums)


def of_numpy(array: np.ndarray) -> str:
    """The fingerprint of a whole array on the host."""
    running = Running()
    running.add_whole(array)
    return as_text(running.sums)
