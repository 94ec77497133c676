"""Opens a checkpoint of any format that a path names: one of ours, T5X's or Hugging Face's."""

from __future__ import annotations

import os
from pathlib import Path

from switch_t5.checkpoint import huggingface, native_layout, t5x
from switch_t5.checkpoint.architecture import Architecture
from switch_t5.checkpoint.huggingface_files import CONFIG, PICKLES, WEIGHTS, WEIGHTS_INDEX, open_huggingface
from switch_t5.checkpoint.manager import Checkpointer, locate_checkpoint
from switch_t5.checkpoint.native_files import open_native
from switch_t5.checkpoint.recognition import Recognised, check_whole, recognise
from switch_t5.checkpoint.stored_arrays import OpenCheckpoint
from switch_t5.checkpoint.t5x_files import FOLDER, INDEX, key_value_store, open_t5x
from switch_t5.errors import UserError

NATIVE, T5X, HUGGING_FACE = FORMATS = ("native", "t5x", "huggingface")


def format_of(path: str) -> tuple[str, str]:
    """Finds what lies at a path.

    Args:
      path: a MODEL_DIR, its folder ``checkpoints`` or one checkpoint in it; a T5X checkpoint, or the folder that holds
        ``checkpoint_<step>``, for the newest; a Hugging Face folder. T5X's may be on ``gs://``.

    Returns:
      The format, and the path of the checkpoint itself.

    Raises:
      UserError: nothing of the kind is there.
    """
    if "://" in path:
        return T5X, _t5x_folder(path)
    folder = Path(path).absolute()
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    steps = [int(name.removeprefix(FOLDER)) for name in names if name.removeprefix(FOLDER).isdecimal()]
    if folder.parent.name != "checkpoints" and "checkpoints" not in names:
        if (folder / INDEX).is_file():
            return T5X, str(folder)
        if names & {CONFIG, WEIGHTS, WEIGHTS_INDEX, *PICKLES}:
            return HUGGING_FACE, str(folder)
        if any(name.startswith(FOLDER) for name in names) and steps:
            return T5X, str(folder / f"{FOLDER}{max(steps)}")
        if any(name.startswith(("target.", "state.")) for name in names):
            return T5X, str(folder)
        if folder.name != "checkpoints":
            what = "is no checkpoint" if names else "is empty" if folder.is_dir() else "does not exist"
            raise UserError(
                f"{path} {what}: name a MODEL_DIR of ours, a T5X folder (with the file {INDEX!r}) or a Hugging Face "
                f"folder (with {CONFIG} and {WEIGHTS})."
            )
    return NATIVE, str(folder)


def _t5x_folder(url: str) -> str:
    try:
        store = key_value_store(url)
        if store.read(INDEX).result().state == "value":
            return url.rstrip("/")
        keys = [key.decode() for key in store.list().result()]
    except ValueError as error:
        raise UserError(f"{url} cannot be read ({str(error).splitlines()[0][:200]}).") from error
    steps = [int(key.split("/")[0].removeprefix(FOLDER)) for key in keys if key.endswith(f"/{INDEX}")]
    if not steps:
        raise UserError(f"{url} holds no checkpoint of T5X: there is no file {INDEX!r} below it.")
    return f"{url.rstrip('/')}/{FOLDER}{max(steps)}"


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
    model_dir, step = locate_checkpoint(place)
    with Checkpointer(model_dir, read_only=True) as checkpointer:
        return open_native(checkpointer.directory, step, checkpointer.leaves(step))


def read_checkpoint(path: str, expected: Architecture | None = None, *, optimizer: bool = True) -> Recognised:
    """Opens the checkpoint at a path and finds the place of each of its arrays, strictly.

    Args:
      path: see :func:`format_of`.
      expected: the model that is wanted, which says what is missing from a partly downloaded checkpoint; None reads
        the model off the checkpoint.
      optimizer: False leaves out of one of ours all but its parameters, so that its optimizer need not be known.

    Raises:
      UserError: there is none, it is damaged or not whole, or of a model that is not known.
    """
    checkpoint = open_checkpoint(path)
    arrays = checkpoint.arrays
    if checkpoint.format == T5X:
        kept = t5x.without_placeholders(arrays)
        layouts = t5x.LAYOUTS
    elif checkpoint.format == NATIVE:
        kept = {name: array for name, array in arrays.items() if name not in (native_layout.STEP, native_layout.COUNT)}
        if not optimizer:
            kept = {name: array for name, array in kept.items() if name.startswith("params/")}
        layouts = tuple(native_layout.LAYOUTS.values())
    else:
        assert checkpoint.config is not None
        expected = huggingface.architecture_of(checkpoint.config, checkpoint.path)
        kept = huggingface.without_copies(arrays, expected)
        layouts = huggingface.LAYOUTS
    named = OpenCheckpoint(checkpoint.path, checkpoint.format, kept, checkpoint.step, checkpoint.config)
    recognised = recognise(named, layouts, expected=expected if checkpoint.format == HUGGING_FACE else None)
    check_whole(recognised)
    return recognised
