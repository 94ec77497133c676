"""Arrays of a checkpoint of ours from its files onto devices: each process reads what its own hold, and checks it.

Orbax would read them too, from a disk and in twice the time (``scripts/benchmarks/checkpoint.py``): it waits for all of
them before the first can be checked.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from switch_t5.checkpoint import fingerprint, naming
from switch_t5.checkpoint.agreement import agreed
from switch_t5.checkpoint.folder import array_errors
from switch_t5.checkpoint.manifest import Manifest, check_arrays
from switch_t5.checkpoint.native_files import check_opened, open_array
from switch_t5.checkpoint.stored_arrays import Index, bounded
from switch_t5.errors import UserError

_AHEAD = 1 << 28
"""Bytes that are being read while the array before them is checked."""

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
    if manifest is not None:
        check_arrays(folder, manifest, fingerprint.finish({name: parts.result() for name, parts in checking.items()}))
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
    tree = {name: abstract_part} if name else abstract_part
    wanted = naming.named_leaves(tree)
    naming.check_fit(folder, wanted, naming.part(saved, name), dtypes=False)
    found = naming.like(tree, read_arrays(folder, wanted, saved, manifest))
    return found[name] if name else found


def _as_they_come(folder: str, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """Gives each array with its name, while those after it are being read."""
    opening = {name: open_array(folder, name) for name in wanted}
    reading: deque[tuple[str, int, dict[_Box, ts.Future[np.ndarray]]]] = deque()

    def arrived() -> tuple[str, jax.Array]:
        name, _, reads = reading.popleft()
        with array_errors(f"{folder}: {name}"):
            return name, _placed(wanted[name], {box: future.result() for box, future in reads.items()})

    for name, leaf in wanted.items():
        with array_errors(f"{folder}: {name}"):
            opened = opening.pop(name).result()
            check_opened(opened, saved[name])
        if jax.dtypes.canonicalize_dtype(saved[name].dtype) != saved[name].dtype:
            raise UserError(f"{folder}: {name} is {saved[name].dtype}, which JAX holds only with jax_enable_x64 set.")
        boxes = _to_read({_box(index, leaf.shape) for index in _indices(leaf).values()})
        size = sum(map(_entries, boxes)) * opened.dtype.numpy_dtype.itemsize
        reading.append((name, size, {box: opened[_slices(box)].read() for box in boxes}))
        while len(reading) > 1 and sum(size for _, size, _ in reading) > _AHEAD:
            yield arrived()
    while reading:
        yield arrived()


def _placed(leaf: Any, values: dict[_Box, np.ndarray]) -> jax.Array:
    """An array of what was read of it."""
    shards = []
    for device, index in _indices(leaf).items():
        box = _box(index, leaf.shape)
        around = next(other for other in values if _hull({other, box}) == other)
        inside = tuple(slice(at - start, end - start) for (at, end), (start, _) in zip(box, around, strict=True))
        # Memory of its own: XLA could not give away NumPy's, and the first step would copy it.
        shards.append(jax.device_put(values[around][inside], device, may_alias=False))
    jax.block_until_ready(shards)  # Until then JAX holds what was read, beside what is being read.
    return jax.make_array_from_single_device_arrays(tuple(leaf.shape), leaf.sharding, shards)


def _indices(leaf: Any) -> Mapping[Any, Index]:
    return leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape))


def _to_read(boxes: set[_Box]) -> set[_Box]:
    """What to read for parts that do not overlap.

    If they leave nothing between them it is all at once: pieces of a file are read whole, though several want parts.
    """
    hull = _hull(boxes)
    return {hull} if sum(map(_entries, boxes)) == _entries(hull) else boxes


def _hull(boxes: set[_Box]) -> _Box:
    dims = zip(*boxes, strict=True)
    return tuple((min(start for start, _ in dim), max(stop for _, stop in dim)) for dim in dims)


def _entries(box: _Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _box(index: Index, shape: tuple[int, ...]) -> _Box:
    return tuple((at.start, at.stop) for at in bounded(index, shape))


def _slices(box: _Box) -> Index:
    return tuple(itertools.starmap(slice, box))
