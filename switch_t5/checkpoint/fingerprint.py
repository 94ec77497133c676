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

from switch_t5.types import Array

_WEIGHT, _MIX = 0x9E3779B1, 0x85EBCA6B  # Odd constants of well spread bits.
_CHUNK = 1 << 20
_ROW = 1 << 13  # Entries that stay in a core's cache.


Parts = list[Any]
"""The sums of a process's shards, each on its device, perhaps still being computed."""


def begin(array: Any) -> Parts:
    """Starts the fingerprint of this process's shards, each where it lies; nothing is copied between devices.

    No sums over devices are asked for: on virtual CPU devices they could wait for one another with a step's.

    Args:
      array: of jax.Array or NumPy; its buffers may be given away as soon as this returns.
    """
    if not isinstance(array, jax.Array):
        running = Running()
        running.add(np.asarray(array), 0)
        return [running.sums] if jax.process_index() == 0 else []
    parts = []
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            offset, stride = 0, 1
            for at, dim in zip(reversed(shard.index), reversed(array.shape), strict=True):
                offset += (at.start or 0) * stride
                stride *= dim
            parts.append(_part(shard.data, np.uint32(offset % (1 << 32)), array.shape))
    return parts


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
def _part(shard: Array, offset: Array, shape: tuple[int, ...]) -> Array:
    """The sums of a shard whose first entry is at ``offset`` of an array of this shape."""
    strides = np.cumprod([1, *reversed(_in_words(shape, shard.dtype))])[-2::-1].tolist()
    sums = jax.lax.platform_dependent(
        shard,
        offset * np.uint32(_words(shard.dtype)),
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
    dims = _in_words(array.shape, array.dtype)
    if not dims:
        return _at_once(array, first, strides)
    at, split = _row_of(dims, row)
    rows, inner = (*dims[:at], dims[at] // split), (split, *dims[at + 1 :])
    starts = (first + _positions(rows, [*strides[:at], strides[at] * split])).reshape(-1)
    positions = _positions(inner, strides[at:]).reshape(-1)
    # As numbers still: the bits of a whole array before the loop would be a copy of it.
    table = array.reshape(starts.size, positions.size // _words(array.dtype))

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


def _mixed(bits: Array) -> Array:
    mixed = (bits ^ (bits >> 15)) * np.uint32(_MIX)
    return mixed ^ (mixed >> 13)


def _words(dtype: np.dtype) -> int:
    """Sums count an entry as so many uint32."""
    return max(1, np.dtype(dtype).itemsize // 4)


def _in_words(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape of an array's bits: see :func:`_bits`."""
    return shape if _words(dtype) == 1 else (*shape, _words(dtype))


def _bits(array: Array) -> Array:
    """The array's bits as uint32; eight-byte entries become two along a new last dim."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    word = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)


class Running:
    """The fingerprint of an array that comes in pieces, on the host.

    Attributes:
      sums: two uint32.
    """

    def __init__(self) -> None:
        self.sums = np.zeros(2, np.uint32)

    def add(self, values: np.ndarray, offset: int) -> None:
        """Takes in consecutive entries.

        Args:
          values: in the array's own order.
          offset: the position of the first among all entries.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        words = _words(flat.dtype)
        dtype = {1: np.uint8, 2: np.uint16}.get(flat.dtype.itemsize, np.uint32)
        bits = flat.view(dtype)
        for begin in range(0, bits.size, _CHUNK):
            self._add(bits[begin : begin + _CHUNK].astype(np.uint32), offset * words + begin)

    def add_part(self, values: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...], offset: int = 0) -> None:
        """Takes in a part of an array.

        Args:
          values: the part.
          index: where it lies: start and stop a dim.
          shape: the whole array's.
          offset: the position of the array's first entry.
        """
        inner = int(np.prod(shape[1:], dtype=np.int64))
        whole = ((at.start, at.stop) == (0, dim) for at, dim in zip(index[1:], shape[1:], strict=True))
        if all(whole):
            self.add(values, offset + (index[0].start * inner if index else 0))
            return
        for row, part in enumerate(values):
            self.add_part(part, index[1:], shape[1:], offset + (index[0].start + row) * inner)

    def _add(self, bits: np.ndarray, offset: int) -> None:
        odd = 2 * (np.arange(bits.size, dtype=np.uint64) + offset).astype(np.uint32) + np.uint32(1)
        mixed = (bits ^ (bits >> np.uint32(15))) * np.uint32(_MIX)
        mixed ^= mixed >> np.uint32(13)
        self.sums += np.array(
            [np.sum(bits * odd, dtype=np.uint32), np.sum(mixed * (odd * np.uint32(_WEIGHT)), dtype=np.uint32)],
            np.uint32,
        )


def as_text(sums: Iterable[int]) -> str:
    """A fingerprint as 16 hexadecimal digits."""
    return "".join(f"{int(value):08x}" for value in sums)


def of_numpy(array: np.ndarray) -> str:
    """The fingerprint of a whole array on the host."""
    running = Running()
    running.add(array, 0)
    return as_text(running.sums)
