"""Checkpoints of ours at a URL such as ``gs://``: found, checked and read by tensorstore, where Orbax wants a disk.

They are copies of what a run wrote on a disk; nothing is written there.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from switch_t5.checkpoint import fingerprint, naming
from switch_t5.checkpoint.folder import array_errors, file_names
from switch_t5.checkpoint.manifest import METADATA, Manifest, check_arrays, check_files, read_manifest
from switch_t5.checkpoint.native_files import open_array, open_native
from switch_t5.checkpoint.run_folder import DIRECTORY, chosen_step, run_and_step
from switch_t5.checkpoint.stored_arrays import Index, OpenCheckpoint
from switch_t5.errors import UserError


def open_remote(url: str) -> OpenCheckpoint:
    """Opens a checkpoint; its files are checked, arrays are not read.

    Args:
      url: of a MODEL_DIR, for its newest checkpoint, of its folder ``checkpoints``, or of one checkpoint in it.

    Raises:
      CheckpointDamaged: a file of the checkpoint is damaged or missing.
      UserError: there is none, or it is one without a manifest.
    """
    directory = f"{run_and_step(url)[0]}/{DIRECTORY}"
    found = (re.fullmatch(rf"(\d{{1,18}})/{METADATA}", file) for file in file_names(directory))
    step = chosen_step(url, sorted(int(match[1]) for match in found if match))
    folder = f"{directory}/{step}"
    manifest = _manifest(folder)
    check_files(folder, manifest)
    with array_errors(folder):
        opening = {name: open_array(folder, name) for name in manifest.arrays}
        stores = {name: future.result() for name, future in opening.items()}
    leaves = {
        name: jax.ShapeDtypeStruct(tuple(store.shape), np.dtype(store.dtype.numpy_dtype))
        for name, store in stores.items()
    }
    return open_native(folder, step, leaves)


def _manifest(folder: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest, by which it would be read from there: copy it to a disk.")
    return manifest


def fits(checkpoint: OpenCheckpoint, name: str, abstract_part: Any) -> bool:
    """Whether a part of a checkpoint has these leaves, of these shapes; as of a Checkpointer."""
    wanted = naming.named_leaves({name: abstract_part})
    return naming.first_difference(wanted, naming.part(checkpoint.arrays, name), dtypes=False) is None


def restore_part(checkpoint: OpenCheckpoint, name: str, abstract_part: Any) -> Any:
    """Reads one part of the state, each device its own share, and checks it; as a Checkpointer does.

    Args:
      checkpoint: opened by :func:`open_remote`.
      name: the part's name in the state, such as ``"params"``; empty for all of it.
      abstract_part: a pytree of jax.ShapeDtypeStruct with shardings; leaves are cast to its dtypes.

    Raises:
      CheckpointDamaged: an array is not what was saved.
      UserError: a leaf has another shape or is missing.
    """
    wanted = naming.named_leaves({name: abstract_part} if name else abstract_part)
    saved = naming.part(checkpoint.arrays, name)
    naming.check_fit(checkpoint.path, wanted, saved, dtypes=False)
    manifest = _manifest(checkpoint.path)
    cast = {}
    for key, leaf in wanted.items():

        def share(index: Index | None, key: str = key) -> np.ndarray:
            assert index is not None
            shape = saved[key].shape
            return saved[key].read(tuple(slice(*at.indices(dim)[:2]) for at, dim in zip(index, shape, strict=True)))

        # Cast when it is checked: a fingerprint is of the bits that were saved.
        array = jax.make_array_from_callback(tuple(leaf.shape), leaf.sharding, share)
        check_arrays(checkpoint.path, manifest, fingerprint.finish({key: fingerprint.begin(array)}))
        cast[key] = array.astype(leaf.dtype)
    return naming.like({name: abstract_part}, cast)[name] if name else naming.like(abstract_part, cast)
