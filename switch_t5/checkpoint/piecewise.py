"""Arrays that reach a checkpoint of ours in parts, one after another: Orbax writes them once all of them are there.

So a part is on its way to the disk while the next is copied or read, and what is in memory beside it is bounded. Their
pieces in the files are of several experts, where Orbax can make them of one alone: tensorstore copies a part whose
first dim is 1 once more before it writes it, and one with an index of what is in it, as Orbax's are.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint import type_handlers

from switch_t5.checkpoint.stored_arrays import Index, bounded, piece_shape

_AS_IN_MEMORY = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclasses.dataclass
class Piecewise:
    """An array that Orbax takes for a leaf of the tree, and the handler below for something to ask for parts.

    Attributes:
      shape: its dims.
      dtype: of its entries.
      largest: dims of its largest part; pieces in the files divide them.
      parts: gives the parts with where they lie, for the shape of a piece: each is of whole pieces.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    largest: tuple[int, ...]
    parts: Callable[[tuple[int, ...]], Iterator[tuple[Index, np.ndarray]]]

    @property
    def size(self) -> int:
        """Its entries."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.size * self.dtype.itemsize


def of_shards(array: jax.Array) -> Piecewise:
    """An array in the memory of this process, which may still be being computed: each shard is waited for in turn."""

    def parts(_piece: tuple[int, ...]) -> Iterator[tuple[Index, np.ndarray]]:
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                yield bounded(shard.index, array.shape), np.asarray(shard.data)

    return Piecewise(array.shape, np.dtype(array.dtype), array.sharding.shard_shape(array.shape), parts)


class PiecewiseHandler(type_handlers.NumpyHandler):
    """How Orbax writes arrays that come in parts."""

    def __init__(self, in_flight: int) -> None:
        """Of saves one after another.

        Args:
          in_flight: bytes of parts on their way to the disk; the one that comes last is beside them.
        """
        super().__init__(deepcopy_host_arrays=False)
        self._in_flight = in_flight

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        await _OneSave(self._in_flight)._background_serialize(values, infos, args)

    def memory_size(self, values: Sequence[Any]) -> Sequence[tuple[int, int]]:
        """Bytes of each array that are written and read."""
        return [(value.nbytes, value.nbytes) for value in values]


class _OneSave(type_handlers.NumpyHandler):
    """Writes the parts of one array after another's, into the files that Orbax would write, as they lie in memory."""

    def __init__(self, in_flight: int) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._in_flight = in_flight
        self._writing: deque[tuple[int, ts.WriteFutures]] = deque()
        self._failure: Exception | None = None

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        await super()._background_serialize(values, infos, args)
        while self._writing:  # After a failure: a part that is still being written would make its folder anew.
            with contextlib.suppress(Exception):
                self._writing.popleft()[1].result()
        if self._failure is not None:
            raise self._failure

    async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        try:
            await self._write(value, tspec, ts_context)
        except Exception as error:  # Raised above, when no other array is being written any more.
            # Its frames hold the array.
            self._failure = self._failure or error.with_traceback(None)

    async def _write(self, value: Piecewise, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        piece = piece_shape(value.largest, value.dtype.itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": list(piece)}}
        tspec["metadata"] |= {"chunk_grid": grid, "codecs": [_AS_IN_MEMORY]}
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        if self._failure is not None:  # What comes after a full disk need not be tried.
            return
        begun = []
        # Until all of it is begun nothing is awaited: Orbax starts all arrays together, and so one follows another.
        for index, part in value.parts(piece):
            begun.append(store[index].write(part, can_reference_source_data_indefinitely=True))
            self._writing.append((part.nbytes, begun[-1]))
            del part
            while sum(size for size, _ in self._writing) > self._in_flight:
                self._writing.popleft()[1].result()
        for written in begun:
            await written


def registry(handler: PiecewiseHandler) -> type_handlers.TypeHandlerRegistry:
    """How Orbax writes the leaves of a tree: arrays of ours in parts, those of JAX and NumPy as it always does."""
    usual = ((kind, type_handlers.get_type_handler(kind)) for kind in (np.ndarray, jax.Array))
    return type_handlers.create_type_handler_registry((Piecewise, handler), *usual)
