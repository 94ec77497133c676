"""Opens a checkpoint of any format that a path names: one of ours, T5X's or Hugging Face's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from switch_t5.checkpoint import huggingface, native_layout, t5x
from switch_t5.checkpoint.folder import entries, has_file, is_url
from switch_t5.checkpoint.format_names import HUGGING_FACE, NATIVE, T5X
from switch_t5.checkpoint.huggingface_files import CONFIG, PICKLES, WEIGHTS, WEIGHTS_INDEX, open_huggingface
from switch_t5.checkpoint.manager import Checkpointer, locate_checkpoint
from switch_t5.checkpoint.manifest import METADATA
from switch_t5.checkpoint.native_files import checked, open_native
from switch_t5.checkpoint.native_remote import open_remote
from switch_t5.checkpoint.recognition import Recognised, check_whole, recognise
from switch_t5.checkpoint.run_folder import DIRECTORY, run_and_step
from switch_t5.checkpoint.stored_arrays import OpenCheckpoint
from switch_t5.checkpoint.t5x_files import FOLDER, INDEX, open_t5x, step_of_folder
from switch_t5.errors import UserError


def format_of(path: str) -> tuple[str, str]:
    """Finds what lies at a path.

    Args:
      path: a MODEL_DIR, its folder ``checkpoints`` or one checkpoint in it; a T5X checkpoint, or the folder that holds
        ``checkpoint_<step>``, for the newest; a Hugging Face folder. On a disk or a URL such as ``gs://``.

    Returns:
      The format, and the path of the checkpoint itself.

    Raises:
      UserError: nothing of the kind is there.
    """
    if not path:
        raise UserError("A checkpoint's path is empty: name a folder.")
    place = path.rstrip("/") if is_url(path) else str(Path(path).absolute())
    names = entries(place)
    steps = _steps(names)
    if run_and_step(place)[1] is None and f"{DIRECTORY}/" not in names:
        if INDEX in names:
            return T5X, place
        if names & {CONFIG, WEIGHTS, WEIGHTS_INDEX, *PICKLES}:
            return HUGGING_FACE, place
        if steps:
            # One that is being copied there has no index yet.
            whole = [step for step in steps if has_file(f"{place}/{FOLDER}{step}", INDEX)]
            return T5X, f"{place}/{FOLDER}{max(whole or steps)}"
        if any(name.startswith(("target.", "state.")) for name in names):
            return T5X, place
        if METADATA in names and os.path.basename(os.path.dirname(place)) == DIRECTORY:
            raise UserError(f"{path} is no step of its run: it was put aside as damaged, or has been renamed.")
        if METADATA in names:
            where = f"MODEL_DIR/{DIRECTORY}/<step>"
            raise UserError(f"{path} is a checkpoint of ours outside of a run: move it to {where}.")
        if os.path.basename(place) != DIRECTORY:
            raise UserError(
                f"{path} {_what_is_there(place, names)}: name a MODEL_DIR of ours, a T5X folder (with the file "
                f"{INDEX!r}) or a Hugging Face folder (with {CONFIG} and {WEIGHTS})."
            )
    return NATIVE, place


def _what_is_there(place: str, names: Collection[str]) -> str:
    if names:
        return "is no checkpoint"
    return "is empty" if os.path.isdir(place) else "is a file" if os.path.isfile(place) else "does not exist"


def _steps(names: Iterable[str]) -> list[int]:
    """The steps of the folders that T5X would call so."""
    found = (step_of_folder(name.removesuffix("/")) for name in names if name.endswith("/"))
    return [step for step in found if step is not None]


def open_checkpoint(path: str) -> OpenCheckpoint:
    """Opens the checkpoint at a path; what it holds is known, nothing is read.

    Raises:
      UserError: there is none, or it is damaged.
    """
    form, place = format_of(path)
    if form == T5X:
        return open_t5x(place)
    if form == HUGGING_FACE:
        return open_huggingface(place)
    if is_url(place):
        return open_remote(place)
    model_dir, step = locate_checkpoint(place)
    with Checkpointer(model_dir, read_only=True) as checkpointer:
        return open_native(str(checkpointer.directory / str(step)), step, checkpointer.leaves(step))


def read_checkpoint(path: str, *, optimizer: bool = True) -> Recognised:
    """Opens the checkpoint at a path and finds the place of each of its arrays, see :func:`recognised`."""
    return recognised(open_checkpoint(path), optimizer=optimizer)


def recognised(checkpoint: OpenCheckpoint, *, optimizer: bool = True) -> Recognised:
    """Finds the place of each array of a checkpoint, strictly; those of ours are checked when they are read.

    Args:
      checkpoint: opened.
      optimizer: False leaves out of one of ours the optimizer's state, as is done where no table knows it.

    Raises:
      UserError: it is damaged or not whole, or of a model that is not known.
    """
    arrays, expected = checkpoint.arrays, None
    if checkpoint.format == T5X:
        kept = t5x.without_placeholders(arrays)
        layouts = t5x.LAYOUTS
    elif checkpoint.format == NATIVE:
        kept = native_layout.tabled(checked(checkpoint).arrays, optimizer=optimizer)
        layouts = tuple(native_layout.LAYOUTS.values())
    else:
        assert checkpoint.config is not None
        expected = huggingface.architecture_of(checkpoint.config, checkpoint.path, len(arrays))
        kept = huggingface.without_copies(arrays, checkpoint.config, expected, checkpoint.path)
        layouts = huggingface.LAYOUTS
    found = recognise(dataclasses.replace(checkpoint, arrays=kept), layouts, expected=expected)
    check_whole(found)
    unknown = checkpoint.format == NATIVE and native_layout.has_unknown_optimizer(arrays)
    return found._replace(unknown_optimizer=unknown)
