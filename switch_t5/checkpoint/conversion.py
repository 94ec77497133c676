"""From any format to any: array by array, in memory that the model's size does not change."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import fcntl
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax import numpy as jnp

from switch_t5.checkpoint import huggingface, native_layout, t5x
from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.certificate import CERTIFICATE
from switch_t5.checkpoint.fingerprint import Running, as_text
from switch_t5.checkpoint.folder import is_url, read_file
from switch_t5.checkpoint.format_names import HUGGING_FACE, NATIVE, T5X
from switch_t5.checkpoint.huggingface_files import CONFIG, write_huggingface
from switch_t5.checkpoint.load import untold
from switch_t5.checkpoint.manifest import METADATA
from switch_t5.checkpoint.param_map import Layout, Placed, convert
from switch_t5.checkpoint.recognition import Recognised
from switch_t5.checkpoint.run_folder import DIRECTORY
from switch_t5.checkpoint.stored_arrays import Index, Produce, StoredArray, pieces
from switch_t5.checkpoint.streamed_save import save_streamed
from switch_t5.checkpoint.t5x_files import FOLDER, INDEX, write_t5x
from switch_t5.errors import UserError
from switch_t5.storage import storage_errors, writable_directory


@dataclasses.dataclass(frozen=True)
class Target:
    """What a conversion writes.

    Attributes:
      path: the checkpoint, when it is written.
      format: its format.
      places: its arrays.
      arrays: of each shape and dtype, and what makes a part of it.
      optimizer: whether the optimizer's state is among them.
    """

    path: Path
    format: str
    places: Mapping[str, Placed]
    arrays: Mapping[str, StoredArray]
    optimizer: bool


def plan(source: Recognised, to: str, form: str, *, dtype: str | None, scanned: bool) -> Target:
    """Lays out what a conversion will write; nothing is read or written yet.

    Args:
      source: the checkpoint.
      to: the folder to write into.
      form: ``native``, ``t5x`` or ``huggingface``.
      dtype: of the parameters; None keeps theirs. The optimizer's state stays float32.
      scanned: whether blocks are stacked, in the formats that can.

    Raises:
      UserError: the format has no place for the model, or the target exists.
    """
    architecture = source.architecture
    if form != NATIVE:
        _check_what_no_array_tells(source)
    layout, periods = _layout(architecture, form, scanned)
    moments = source.moments if form != HUGGING_FACE and source.moments else None
    places = layout.place(architecture, periods, moments)
    arrays = {name: _array(source, entry, dtype) for name, entry in places.items()}
    if form == HUGGING_FACE:
        huggingface.config_of(architecture, "float32")
        arrays |= {copy: arrays[name] for copy, name in huggingface.copies_of_embedding(architecture).items()}
    step = source.reader.checkpoint.step or 0
    if is_url(to) or not to:
        raise UserError(f"--to={to} must be a local or mounted folder.")
    folder = Path(to).absolute()  # As Orbax and tensorstore want it.
    if form == T5X and folder.is_dir() and {entry.name for entry in folder.iterdir()} & {DIRECTORY, CONFIG, INDEX}:
        raise UserError(f"--to: {folder} is a run or a checkpoint itself: name another folder.")
    path = {NATIVE: folder, T5X: folder / f"{FOLDER}{step}", HUGGING_FACE: folder}[form]
    _check_apart(path, source.reader.checkpoint.path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--to: {path} is a file: name a folder.")
    if path.exists() and any(path.iterdir()):
        raise _occupied(path)
    if os.path.ismount(path):
        raise UserError(f"--to: {path} is where a disk is mounted, which no new folder can replace: name one below it.")
    return Target(path, form, places, arrays, moments is not None)


def _check_apart(path: Path, source: str) -> None:
    """Refuses a target among a run's checkpoints or in a checkpoint, whose reader would take it for a part of that."""
    for folder in Path(os.path.realpath(path)).parents:
        if (folder / METADATA).exists() or (not is_url(source) and folder == Path(os.path.realpath(source))):
            raise UserError(f"--to: {path} is inside of the checkpoint {folder}: name a folder elsewhere.")
        if any(folder.glob(f"[0-9]*/{METADATA}")):
            raise UserError(f"--to: {path} would lie among a run's checkpoints, in {folder}: name a folder elsewhere.")


def _check_what_no_array_tells(source: Recognised) -> None:
    """Refuses a run of ours with other position buckets or activations than the released models'."""
    checkpoint = source.reader.checkpoint
    if checkpoint.format != NATIVE:
        return
    run = os.path.dirname(os.path.dirname(checkpoint.path))
    known = untold(source.architecture)
    try:
        text = (read_file(run, "config.gin") or b"").decode()
        found = {name: re.search(rf"^TransformerConfig\.{name} = (.+)$", text, re.MULTILINE) for name in known}
        told = {name: ast.literal_eval(match[1]) for name, match in found.items() if match}
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{run}/config.gin is no configuration of a run ({str(error)[:100]}).") from error
    for name, value in told.items():
        read_with = known[name]
        if (tuple(value) if isinstance(value, list) else value) != read_with:
            raise UserError(
                f"{run}/config.gin has TransformerConfig.{name} = {value!r}, and models of the other formats are read "
                f"with {read_with!r}: only --format=native keeps what it computes."
            )


def _occupied(path: Path) -> UserError:
    return UserError(f"--to: {path} is there already and not empty: name another folder, or remove it.")


def _layout(architecture: Architecture, form: str, scanned: bool) -> tuple[Layout, dict[str, int]]:
    periods = native_layout.periods(architecture)
    if form == HUGGING_FACE:
        if scanned:
            raise UserError("--scanned: transformers stacks no blocks; leave it out of --format=huggingface.")
        return huggingface.layout_of(architecture), {}
    if form == NATIVE:
        return native_layout.layout_of(architecture, scan_layers=scanned), periods
    if not architecture.relpos_per_layer:
        if scanned:
            raise UserError(
                "T5X's scanned layouts have a relative position bias in every block, and this model shares one: leave "
                "--scanned out."
            )
        return t5x.WRITTEN_OUT, {}
    return (t5x.SCANNED if architecture.is_sparse else t5x.SCALABLE), periods


def _array(source: Recognised, entry: Placed, dtype: str | None) -> StoredArray:
    """An array of the target; a part of it is read from the source when it is asked for."""
    stored = source.reader.dtype(entry.parameter)
    kept = stored if dtype is None or "@" in entry.parameter else jnp.dtype(dtype)

    def read(index: Index) -> np.ndarray:
        return convert(source.reader, entry, source.architecture, index).astype(kept, copy=False)

    return StoredArray(entry.shape, kept, read)


def write(
    source: Recognised, target: Target, *, tokenizer: Path | None = None, compression: str = "gzip"
) -> dict[str, Any]:
    """Writes the target under another name, and renames it when it is whole.

    Args:
      source: the checkpoint.
      target: what :func:`plan` laid out.
      tokenizer: a SentencePiece model to lie beside a Hugging Face model, as ``spiece.model``.
      compression: of a T5X checkpoint, see :data:`switch_t5.checkpoint.t5x_files.COMPRESSIONS`.

    Returns:
      The certificate: what was read and written, and the fingerprint of each array that was written.

    Raises:
      UserError: the disk is full or cannot be written, or another conversion was there first; nothing is left.
    """
    untouched = storage_errors(f"Writing {target.path}", "what stood there before is untouched")
    with _folder_above(target.path), _partial(target.path) as partial, untouched:
        certificate = _fill(partial, source, target, tokenizer, compression)
        sync(partial)
        _put_in_place(partial, target.path)
    return certificate


def sync(folder: Path) -> None:
    """Waits until a folder and all that is below it are on the disk; an OSError tells that something is not."""
    for parent, _, names in os.walk(folder):
        for path in (*(os.path.join(parent, name) for name in names), parent):
            sync_path(path)


def sync_path(path: str | Path) -> None:
    """:func:`sync` of one file, or of a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_above(path: Path) -> Iterator[None]:
    """Makes the folders above a path; where what is inside fails, those that are new and empty are removed again."""
    new = [folder for folder in path.parents if not folder.exists()]
    writable_directory(path.parent, "--to")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A new folder beside a path, locked while it is written; those that killed conversions left there are removed."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), _locked(stale) as alone:
            if alone:
                shutil.rmtree(stale, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        with _locked(partial):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder; whether that could be done."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except OSError:  # Another has it, or the file system knows no locks.
        alone = False
    try:
        yield alone
    finally:
        os.close(descriptor)


def _fill(
    partial: Path, source: Recognised, target: Target, tokenizer: Path | None, compression: str
) -> dict[str, Any]:
    """Writes all files of the target into an empty folder, and returns the certificate."""
    sums: dict[str, str] = {}
    recorded = {name: _recording(name, array, sums) for name, array in target.arrays.items()}
    step = source.reader.checkpoint.step or 0
    if target.format == T5X:
        scalars = {t5x.STEP: np.array(step, np.int32)}
        scalars |= t5x.placeholders(target.places) if target.optimizer else {}
        write_t5x(str(partial), recorded, scalars, compression)
    elif target.format == HUGGING_FACE:
        dtype = next(iter(target.arrays.values())).dtype.name
        config = huggingface.config_of(source.architecture, dtype) | _capacity(source)
        write_huggingface(partial, config, recorded)
        if tokenizer is not None:
            shutil.copy(tokenizer, partial / "spiece.model")
    else:
        scalars = {native_layout.STEP: step} | ({native_layout.COUNT: step} if target.optimizer else {})
        save_streamed(partial, step, recorded, {name: np.array(value, np.int32) for name, value in scalars.items()})
        (partial / "model.gin").write_text(source.architecture.gin())
    certificate = _certificate(source, target, sums)
    (partial / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    return certificate


def _put_in_place(partial: Path, path: Path) -> None:
    """Renames, which takes the place of nothing or of an empty folder: of two that write there, the first one stays."""
    try:
        partial.rename(path)
        sync_path(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _occupied(path) from error
        raise


def _recording(name: str, array: StoredArray, sums: dict[str, str]) -> tuple[StoredArray, Produce]:
    """An array whose fingerprint is kept as its parts are made, each once."""
    running = Running()

    def produce(index: Index | None) -> np.ndarray:
        values = array.whole() if index is None else array.read(index)
        index = tuple(slice(0, dim) for dim in array.shape) if index is None else index
        running.add_part(values, index, array.shape)
        sums[name] = as_text(running.sums)
        return values

    return array, produce


def _certificate(source: Recognised, target: Target, sums: Mapping[str, str]) -> dict[str, Any]:
    checkpoint = source.reader.checkpoint
    return {
        "from": {"path": checkpoint.path, "format": checkpoint.format, "step": checkpoint.step},
        "to": {"path": str(target.path), "format": target.format, "optimizer": target.optimizer},
        "left_out": _left_out(source, target),
        "architecture": json.loads(json.dumps(dataclasses.asdict(source.architecture))),
        "parameters": sum(int(np.prod(entry.shape)) for entry in target.places.values() if "@" not in entry.parameter),
        "arrays": {
            name: {"shape": list(array.shape), "dtype": array.dtype.name, "fingerprint": sums[name]}
            for name, array in target.arrays.items()
        },
    }


def _left_out(source: Recognised, target: Target) -> str | None:
    """What of the source is not in the target."""
    left_out = []
    if source.unknown_optimizer:
        left_out.append("the optimizer's state, which is not Adafactor's")
    if source.moments and not target.optimizer:
        left_out.append("the optimizer's state, for which the format has no place")
    if target.format == HUGGING_FACE and source.architecture.is_sparse and not _capacity(source):
        left_out.append(
            f"{huggingface.CAPACITY}, which no array tells: without it in {CONFIG} transformers takes "
            f"{huggingface.DEFAULT_CAPACITY}"
        )
    return "; ".join(left_out) or None


def _capacity(source: Recognised) -> dict[str, Any]:
    """The slots of an expert, where the source's own configuration tells them, as Hugging Face's does."""
    told = (source.reader.checkpoint.config or {}).get(huggingface.CAPACITY)
    return {huggingface.CAPACITY: told} if type(told) is int and told > 0 else {}


def compare(source: Recognised, written: Recognised, dtype: str | None = None) -> dict[str, Any]:
    """Compares what was written, read anew, with its source, parameter by parameter, moments too.

    Args:
      source: what was converted.
      written: what was written, opened anew.
      dtype: what the parameters were cast to; None where they were not.

    Returns:
      ``arrays`` compared, ``worst_absolute`` and ``worst_relative`` differences (of two numbers, and as a share of the
      largest of a piece of the array), and the ``bound`` of the latter: 0 where nothing was cast.
    """
    worst = {"arrays": 0, "worst_absolute": 0.0, "worst_relative": 0.0, "bound": 0.0}
    if dtype is not None:
        worst["bound"] = float(jnp.finfo(dtype).eps) / 2
    architecture = source.architecture
    kept = written.moments if written.moments else None
    layout = native_layout.layout_of(architecture, scan_layers=False)
    for entry in layout.place(architecture, {}, kept).values():
        for index in pieces(entry.shape, 4):
            one, other = (
                convert(side.reader, entry, architecture, index).astype(np.float64) for side in (source, written)
            )
            absolute, size = _worst(one, other), float(np.abs(one).max(initial=0.0))
            worst["worst_absolute"] = max(worst["worst_absolute"], absolute)
            worst["worst_relative"] = max(worst["worst_relative"], absolute / size if size else absolute)
        worst["arrays"] += 1
    return worst


def _worst(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference; numbers that are not finite must be the same ones, or they differ without bound."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(one - other)
    alike = (one == other) | (np.isnan(one) & np.isnan(other))
    return float(np.nan_to_num(np.where(alike, 0.0, difference), nan=np.inf).max(initial=0.0))
