"""The state of a tf.data iterator as bytes.

TensorFlow saves an iterator, with all that its shuffling, packing and prefetching hold at the moment, as a
checkpoint of files. Here the files live in memory and become one archive, together with what the iterator was
made for.
"""

from __future__ import annotations

import io
import json
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from switch_t5.errors import UserError

_DESCRIPTION = "description.json"
# tf.data's buffers are mostly small integers: light compression makes them four times smaller in
# milliseconds.
_COMPRESSION_LEVEL = 1


def save(iterator: Any, description: Mapping[str, Any]) -> bytes:
    """Returns the state of a `tf.data.Iterator`.

    Args:
      iterator: the iterator; it goes on undisturbed.
      description: JSON values that say what the iterator reads; `restore` compares them.
    """
    from switch_t5.data.tensorflow_runtime import tf

    archive = io.BytesIO()
    with (
        _memory_folder() as folder,
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION_LEVEL) as files,
    ):
        tf.train.Checkpoint(iterator=iterator).write(f"{folder}/iterator")
        files.writestr(_DESCRIPTION, json.dumps(description))
        for name in sorted(tf.io.gfile.listdir(folder)):
            with tf.io.gfile.GFile(f"{folder}/{name}", "rb") as file:
                files.writestr(name, file.read())
    return archive.getvalue()


def restore(iterator: Any, state: bytes, description: Mapping[str, Any]) -> None:
    """Moves an iterator to where the saved one was.

    Args:
      iterator: made over the same dataset as the one that was saved, and not read from yet.
      state: what `save` returned.
      description: as given to `save`.

    Raises:
      UserError: the state is not one, or was saved for something else.
    """
    from switch_t5.data.tensorflow_runtime import tf

    check_same(saved_description(io.BytesIO(state)), json.loads(json.dumps(description)))
    with _memory_folder() as folder, zipfile.ZipFile(io.BytesIO(state)) as files:
        for name in files.namelist():
            if name != _DESCRIPTION:
                with tf.io.gfile.GFile(f"{folder}/{name}", "wb") as file:
                    file.write(files.read(name))
        try:
            tf.train.Checkpoint(iterator=iterator).read(f"{folder}/iterator").assert_consumed()
        except (tf.errors.OpError, AssertionError):
            raise UserError(
                "The saved position in the data does not fit this pipeline: it was saved by another version "
                "of switch_t5, seqio or TensorFlow."
            ) from None


def saved_description(state: BinaryIO) -> dict[str, Any]:
    """Returns what `save`, whose result the file holds, was told that the iterator reads.

    Raises:
      UserError: the state is not one.
    """
    try:
        with zipfile.ZipFile(state) as files:
            return json.loads(files.read(_DESCRIPTION))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError):
        raise UserError("The saved position in the data is damaged: it cannot be read.") from None


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares two descriptions.

    Raises:
      UserError: they differ; names the first difference.
    """
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"The position in the data was saved with {key}={saved.get(key)!r}, but this run has "
                f"{key}={now.get(key)!r}: restore the old value, or start in a new folder."
            )


@contextmanager
def _memory_folder() -> Iterator[str]:
    """A folder in TensorFlow's in-memory file system, so that a full disk cannot lose a position."""
    from switch_t5.data.tensorflow_runtime import tf

    folder = f"ram://switch_t5_iterator_{uuid.uuid4().hex}"
    tf.io.gfile.makedirs(folder)
    try:
        yield folder
    finally:
        tf.io.gfile.rmtree(folder)
