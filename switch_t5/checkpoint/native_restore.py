"""Arrays of a checkpoint of ours from its files onto devices: each process reads what its own hold, and checks it.

Orbax would read them too, from a disk and in twice the time (``scripts/benchmarks/checkpoint.py``): it waits for all of
them before the first can be checked.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from switch_t5.checkpoint import fingerprint, naming
from switch_t5.checkpoint.agreement import agreed
from switch_t5.checkpoint.folder import array_errors
from switch_t5.checkpoint.manifest import Manifest, check_arrays
from switch_t5.checkpoint.native_files import check_opened, open_array
from switch_t5.checkpoint.stored_arrays import Index, bounded
from switch_t5.errors import UserError

_AHEAD = 1 << 29
"""Bytes that are being read while the array before them is checked."""
_LARGE = 1 << 24
"""Bytes from which a part is read into the device's own memory: a program must be compiled to have it."""

_Box = tuple[tuple[int, int], ...]
"""Start and stop a dim."""


def read_arrays(
    folder: str, wanted: Mapping[str, Any], saved: Mapping[str, Any], manifest: Manifest | None
) -> dict[str, jax.Array]:
    """Reads arrays of a checkpoint; all processes of a run call it together.

    Args:
      folder: of the checkpoint, ``MODEL_DIR/checkpoints/<step>``, on a disk or at a URL.
      wanted: jax.ShapeDtypeStruct with shardings, by name; an array of another dtype is cast when it is checked.
      saved: shape and dtype of at least these in the checkpoint.
      manifest: what they must be; None for a checkpoint that has none.

    Raises:
      CheckpointDamaged: names the first array that cannot be read or is not what was saved.
      UserError: it is out of reach, or an array has more bits than JAX holds here.
    """
    found: dict[str, jax.Array] = {}
    checking: dict[str, Future[fingerprint.Parts]] = {}
    with agreed(folder), ThreadPoolExecutor(1, "fingerprints") as background:
        for name, array in _as_they_come(folder, wanted, saved):
            if manifest is not None:
                checking[name] = background.submit(fingerprint.begin, array)
            # A fingerprint is of the bits that were saved.
            found[name] = array if array.dtype == wanted[name].dtype else array.astype(wanted[name].dtype)
        parts = {name: begun.result() for name, begun in checking.items()}
    if manifest is not None:
        check_arrays(folder, manifest, fingerprint.finish(parts))
    return found


def restore_part(
    folder: str, name: str, abstract_part: Any, saved: Mapping[str, Any], manifest: Manifest | None
) -> Any:
    """Reads one part of a state, such as the parameters without the optimizer's state.

    Args:
      folder: of the checkpoint.
      name: the part's name in the state, such as ``"params"``; empty for all of it.
      abstract_part: a pytree of jax.ShapeDtypeStruct with shardings; leaves are cast to its dtypes.
      saved: shape and dtype of each array in the checkpoint.
      manifest: as of :func:`read_arrays`.

    Raises:
      CheckpointDamaged: an array is not what was saved.
      UserError: a leaf has another shape or is missing.
    """
    wanted = naming.leaves_of_part(name, abstract_part)
    naming.check_fit(folder, wanted, naming.part(saved, name), dtypes=False)
    found = read_arrays(folder, wanted, saved, manifest)
    return jax.tree.unflatten(jax.tree.structure(abstract_part), [found[leaf] for leaf in wanted])


def _as_they_come(folder: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """Gives each array with its name, while those after it are being read."""
    opening = {name: open_array(folder, name) for name in wanted}
    reading: deque[tuple[str, int, dict[_Box, Callable[[], np.ndarray | jax.Array]]]] = deque()

    def arrived() -> tuple[str, jax.Array]:
        name, _, reads = reading.popleft()
        with array_errors(f"{folder}: {name}"):
            return name, _placed(wanted[name], {box: finished() for box, finished in reads.items()})

    for name, leaf in wanted.items():
        with array_errors(f"{folder}: {name}"):
            opened = opening.pop(name).result()
            check_opened(opened, saved[name])
        if jax.dtypes.canonicalize_dtype(saved[name].dtype) != saved[name].dtype:
            raise UserError(f"{folder}: {name} is {saved[name].dtype}, which JAX holds only with jax_enable_x64 set.")
        devices = {_box(index, leaf.shape): device for device, index in _indices(leaf).items()}
        boxes = _to_read(set(devices), opened.chunk_layout.read_chunk.shape or ())
        size = sum(map(_entries, boxes)) * opened.dtype.numpy_dtype.itemsize
        reading.append((name, size, {box: _begun(opened[_slices(box)], devices.get(box)) for box in boxes}))
        while len(reading) > 1 and sum(size for _, size, _ in reading) > _AHEAD:
            yield arrived()
    while reading:
        yield arrived()


def _begun(part: ts.TensorStore, device: Any | None) -> Callable[[], np.ndarray | jax.Array]:
    """Begins to read a part.

    Args:
      part: of an array.
      device: that holds all of it, if one does. What is large is read into the memory of a CPU itself: into NumPy's it
        would be copied from there, and both be cleared first.

    Returns:
      What waits for it.
    """
    dtype = part.dtype.numpy_dtype
    if device is None or device.platform != "cpu" or part.size * dtype.itemsize < _LARGE:
        return part.read().result
    blank = jax.block_until_ready(_blanks(part.shape, dtype, device)())  # Nobody else has it yet.
    view = np.asarray(_Memory(blank)).view(dtype).reshape(part.shape)
    written = ts.array(view).write(part[ts.d[:].translate_to[0]] if part.rank else part)

    def finished() -> jax.Array:
        written.result()
        return blank

    return finished


class _Memory:
    """The bytes of an array on a CPU, for NumPy to write; the array stays while they are in use.

    After a failed read of another array this one may be dropped, and its own read still be under way.
    """

    def __init__(self, array: jax.Array) -> None:
        self._array = array
        address = array.unsafe_buffer_pointer()
        self.__array_interface__ = {"data": (address, False), "shape": (array.nbytes,), "typestr": "|u1", "version": 3}


@functools.cache
def _blanks(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> Callable[[], jax.Array]:
    """The program that takes memory for an array."""
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=jax.sharding.SingleDeviceSharding(device))


def _placed(leaf: Any, values: dict[_Box, np.ndarray | jax.Array]) -> jax.Array:
    """An array of what was read of it."""
    shards = []
    for device, index in _indices(leaf).items():
        box = _box(index, leaf.shape)
        around = next(other for other in values if _hull({other, box}) == other)
        value = values[around]
        if isinstance(value, jax.Array):
            shards.append(value if value.device == device else jax.device_put(value, device, may_alias=False))
            continue
        inside = tuple(slice(at - start, end - start) for (at, end), (start, _) in zip(box, around, strict=True))
        # Memory of its own: XLA could not give away NumPy's, and the first step would copy it.
        shards.append(jax.device_put(value[inside], device, may_alias=False))
    jax.block_until_ready(shards)  # Until then JAX holds what was read, beside what is being read.
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), leaf.sharding, shards)


def _indices(leaf: Any) -> Mapping[Any, Index]:
    return leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape))


def _to_read(boxes: set[_Box], piece: tuple[int | None, ...]) -> set[_Box]:
    """What to read for parts that do not overlap.

    If they share pieces of a file, which are read whole, and leave nothing between them, it is all at once.
    """
    shared = any(start % (size or 1) for box in boxes for (start, _), size in zip(box, piece, strict=True))
    hull = _hull(boxes)
    return {hull} if shared and sum(map(_entries, boxes)) == _entries(hull) else boxes


def _hull(boxes: set[_Box]) -> _Box:
    dims = zip(*boxes, strict=True)
    return tuple((min(start for start, _ in dim), max(stop for _, stop in dim)) for dim in dims)


def _entries(box: _Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _box(index: Index, shape: tuple[int, ...]) -> _Box:
    return tuple((at.start, at.stop) for at in bounded(index, shape))


def _slices(box: _Box) -> Index:
    return tuple(itertools.starmap(slice, box))
