"""Checkpoints of ours at a URL such as ``gs://``: found, checked and read by tensorstore, where Orbax wants a disk.

They are copies of what a run wrote on a disk; nothing is written there.
"""

from __future__ import annotations

import re
from typing import Any

from switch_t5.checkpoint import naming, native_restore
from switch_t5.checkpoint.folder import file_names
from switch_t5.checkpoint.manifest import METADATA, Manifest, check_files, read_manifest
from switch_t5.checkpoint.native_files import open_native
from switch_t5.checkpoint.run_folder import DIRECTORY, chosen_step, run_and_step
from switch_t5.checkpoint.stored_arrays import OpenCheckpoint
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
    return open_native(folder, step, manifest.leaves)


def _manifest(folder: str) -> Manifest:
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder} has no manifest, by which it would be read from there: copy it to a disk.")
    return manifest


def fits(checkpoint: OpenCheckpoint, name: str, abstract_part: Any) -> bool:
    """Whether a part of a checkpoint has these leaves, of these shapes; as of a Checkpointer."""
    wanted = naming.leaves_of_part(name, abstract_part)
    return naming.first_difference(wanted, naming.part(checkpoint.arrays, name), dtypes=False) is None


def restore_part(checkpoint: OpenCheckpoint, name: str, abstract_part: Any) -> Any:
    """Reads one part of the state of a checkpoint that :func:`open_remote` opened; as a Checkpointer does.

    Raises:
      CheckpointDamaged: an array is not what was saved.
      UserError: a leaf has another shape or is missing.
    """
    manifest = _manifest(checkpoint.path)
    return native_restore.restore_part(checkpoint.path, name, abstract_part, checkpoint.arrays, manifest)
