"""What a checkpoint must be: its arrays and the files that hold them, in ``manifest/manifest.json``.

The manifest is an item of Orbax's, and the last to be finished: when it is written every other file of the checkpoint
is there under a temporary name, and all of them get their final name together. It has each array's shape, dtype and
fingerprint, each file's size and its CRC-32, but for large ones that hold nothing but arrays.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from switch_t5.checkpoint.fingerprint import as_text
from switch_t5.checkpoint.folder import file_names, is_url, read_file, read_range
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.errors import UserError

ITEM = "manifest"
PROMISE = {"manifest": True}
"""Stands in the metadata of a checkpoint that has a manifest: one that lost it is no older one."""
_FILE = "manifest.json"
_VERSION = 2
_LONGEST_PATH = 1000
_SMALL = 1 << 20
_ARRAYS = "d"
"""Folders of this name are OCDBT's, of values; in small ones lie its nodes too."""
_BLOCK = 1 << 20
METADATA = "_CHECKPOINT_METADATA"
"""Orbax's own description of a checkpoint; a folder without it is not finished."""
# Orbax writes these after every item; they hold times and the promise.
_LATER = (METADATA, "commit_success.txt")
_TEMPORARY = ".orbax-checkpoint-tmp"


class ManifestHandler(ocp.CheckpointHandler):
    """Writes the manifest when all items before it are finished."""

    def __init__(self) -> None:
        self._saving: ManifestSave | None = None
        self._written: Path | None = None

    def save(self, directory: epath.Path, args: ManifestSave) -> None:
        """Remembers the fingerprints: they are still being computed."""
        self._saving = args

    def finalize(self, directory: epath.Path) -> None:
        """Writes the manifest; process 0 alone is called."""
        assert self._saving is not None
        sums, leaves = self._saving.fingerprints(), self._saving.leaves
        self._saving = None
        arrays = {name: [leaf.shape, leaf.dtype.name, as_text(sums[name])] for name, leaf in leaves.items()}
        checkpoint = Path(directory).parent
        content = {"version": _VERSION, "arrays": arrays, "files": _files(checkpoint)}
        # Its own checksum goes before it, so that a flipped bit in the manifest is told from one in an array.
        text = json.dumps(content, sort_keys=True)
        with open(Path(directory) / _FILE, "w") as file:
            file.write(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
            file.flush()
            os.fsync(file.fileno())
        self._written = checkpoint

    def check_written(self) -> None:
        """Checks the files of the checkpoint that is about to get its name, after which older ones are deleted.

        Raises:
          CheckpointDamaged: the disk has not what it was given.
        """
        if self._written is not None:
            manifest = read_manifest(self._written)
            assert manifest is not None
            check_files(self._written, manifest)

    def restore(self, directory: epath.Path, args: Any = None) -> None:
        """Manifests are read by :func:`read_manifest`."""
        raise NotImplementedError


@ocp.args.register_with_handler(ManifestHandler, for_save=True)
@dataclasses.dataclass
class ManifestSave(ocp.args.CheckpointArgs):
    """What to save.

    Attributes:
      fingerprints: called in the background; gives two uint32 an array, by name.
      leaves: the arrays, or what has their shape and dtype, which is all that is kept of them.
    """

    fingerprints: Callable[[], Mapping[str, Any]]
    leaves: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self.leaves.items()}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint must be.

    Attributes:
      leaves: shape and dtype of each array, by name.
      fingerprints: of each, as :func:`switch_t5.checkpoint.fingerprint.as_text` writes it.
      files: size and, but for large ones of arrays, CRC-32, by path in the checkpoint.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    fingerprints: Mapping[str, str]
    files: Mapping[str, tuple[int, str | None]]


def read_manifest(checkpoint: str | Path) -> Manifest | None:
    """Reads a checkpoint's manifest; None for one that was saved before there were any.

    Args:
      checkpoint: its folder, on a disk or at a URL.

    Raises:
      CheckpointDamaged: the manifest is damaged, or gone from a checkpoint that had one.
      UserError: it is of another version.
    """
    path = f"{checkpoint}/{ITEM}/{_FILE}"
    found = read_file(str(checkpoint), f"{ITEM}/{_FILE}")
    if found is None:
        if os.path.exists(os.path.dirname(path)) or _is_promised(str(checkpoint)):
            raise CheckpointDamaged(f"{path} is missing.")
        return None
    try:
        checksum, _, text = found.decode().partition("\n")
        text, end = text[:-1], text[-1:]
        if end != "\n" or f"{zlib.crc32(text.encode()):08x}" != checksum:
            raise ValueError("its checksum differs")
        content = json.loads(text)
        version = operator.index(content["version"])
        if version == _VERSION:
            return _manifest(content)
    # A hostile file may nest, and hold anything anywhere.
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise CheckpointDamaged(f"{path} is damaged ({str(error)[:100]}).") from error
    raise UserError(
        f"{path} is of version {version}, and this release reads version {_VERSION}: use that which saved it."
    )


def _manifest(content: Any) -> Manifest:
    """A manifest of its JSON; any of many errors where that is another."""
    leaves, fingerprints = {}, {}
    for name, (shape, dtype, sums) in content["arrays"].items():
        leaves[name] = jax.ShapeDtypeStruct(tuple(map(operator.index, shape)), jnp.dtype(dtype))
        fingerprints[name] = sums
    if not leaves or not all(
        isinstance(text, str) and text.isprintable() for text in (*leaves, *fingerprints.values())
    ):
        raise ValueError("it names no arrays")
    files = {name: (operator.index(entry[0]), entry[1]) for name, entry in content["files"].items()}
    for name in files:
        parts = name.split("/")
        if ".." in parts or "" in parts or len(name) > _LONGEST_PATH or not name.isprintable():
            raise ValueError(f"it names the file {name[:50]!r}, which no checkpoint has")
    return Manifest(leaves, fingerprints, files)


def _is_promised(checkpoint: str) -> bool:
    try:
        return bool(json.loads(read_file(checkpoint, METADATA) or b"").get("custom_metadata"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return True  # Nothing says that there was none.


def check_files(checkpoint: str | Path, manifest: Manifest) -> None:
    """Checks that each file is there, as long as it was, and all but large ones of arrays bit for bit.

    At a URL large ones of arrays must be as long at the least.

    Raises:
      CheckpointDamaged: names the first that is not.
    """
    if is_url(str(checkpoint)):
        _check_remote_files(str(checkpoint), manifest)
        return
    checkpoint = Path(checkpoint)
    for name, (size, checksum) in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointDamaged(f"{path} is missing.")
        if path.stat().st_size != size:
            raise CheckpointDamaged(f"{path} has {path.stat().st_size:,} bytes of {size:,}.")
        if checksum is not None and _checksum(path) != checksum:
            raise CheckpointDamaged(f"{path} is damaged: its checksum differs.")


def _check_remote_files(url: str, manifest: Manifest) -> None:
    there = file_names(url)
    for name, (size, checksum) in manifest.files.items():
        if name not in there:
            raise CheckpointDamaged(f"{url}/{name} is missing.")
        if size and not read_range(url, name, size - 1, size):
            raise CheckpointDamaged(f"{url}/{name} is shorter than {size:,} bytes.")
        if checksum is not None and f"{zlib.crc32(read_file(url, name) or b''):08x}" != checksum:
            raise CheckpointDamaged(f"{url}/{name} is damaged: its checksum differs.")


def check_arrays(checkpoint: str | Path, manifest: Manifest, found: Mapping[str, Any]) -> None:
    """Checks fingerprints of arrays that were read.

    Args:
      checkpoint: its folder.
      manifest: what they must be.
      found: two uint32 an array, by name; may be some of them.

    Raises:
      CheckpointDamaged: names the first that differs.
    """
    for name, sums in found.items():
        if as_text(sums) != manifest.fingerprints.get(name):
            raise CheckpointDamaged(f"{checkpoint}: {name} is damaged: its values are not those that were saved.")


def _files(checkpoint: Path) -> dict[str, tuple[int, str | None]]:
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        parts = [part.split(_TEMPORARY)[0] for part in path.relative_to(checkpoint).parts]
        if path.is_file() and parts[0] != ITEM and parts[-1] not in _LATER:
            size = path.stat().st_size
            holds_arrays_alone = parts[-2] == _ARRAYS and size > _SMALL
            found["/".join(parts)] = (size, None if holds_arrays_alone else _checksum(path))
    return found


def _checksum(path: Path) -> str:
    found = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return f"{found:08x}"
