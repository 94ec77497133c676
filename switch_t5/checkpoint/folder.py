"""The files of a checkpoint's folder, on a disk or wherever tensorstore reads and lists: ``gs://`` above all.

A folder at a URL is what the names of its files begin with; how long a file is, only reading it tells.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import tensorstore as ts

from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.errors import UserError

_LARGEST = 1 << 30
# How tensorstore begins an error that says nothing about the file itself.
_OUT_OF_REACH = re.compile(
    r"(UNAVAILABLE|UNAUTHENTICATED|PERMISSION_DENIED|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED)\b"
)
# What tensorstore makes of its errors: ValueError for most of them.
_ERRORS = (ValueError, RuntimeError, OSError, OverflowError, TypeError)


def is_url(path: str) -> bool:
    """Whether a path is no disk's."""
    return "://" in path


def key_value_store(path: str) -> ts.KvStore:
    """The files below a folder, as tensorstore reads and writes them.

    Raises:
      UserError: it is a URL that tensorstore does not know.
    """
    if is_url(path):
        with _url_errors(path):
            return ts.KvStore.open(path.rstrip("/") + "/").result()
    # A URL would give some characters of a name a meaning.
    return ts.KvStore.open({"driver": "file", "path": f"{os.path.abspath(path)}/"}).result()


def read_file(folder: str, name: str, largest: int = _LARGEST) -> bytes | None:
    """The content of a file below a folder; None where there is no such file.

    Args:
      folder: on a disk or at a URL.
      name: the file's path in it.
      largest: how many bytes it may have at the most.

    Raises:
      UserError: it is larger, or its URL cannot be read.
      OSError: the disk cannot read it.
    """
    path = f"{folder}/{name}"
    if is_url(folder):
        if read_range(folder, name, largest, largest + 1):
            raise UserError(f"{path} has more than {largest:,} bytes, which no such file has.")
        with _url_errors(path):
            found = key_value_store(folder).read(name).result()
        return found.value if found.state == "value" else None
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise UserError(f"{path} has {size:,} bytes, which no such file has.")
            return file.read()
    except FileNotFoundError:
        return None


def read_range(url: str, name: str, begin: int, end: int) -> bytes:
    """The bytes of a file at a URL from ``begin`` to ``end``; none where it is shorter or not there.

    Raises:
      UserError: the URL cannot be read.
    """
    if begin == end:
        return b""
    with _url_errors(url):
        try:
            found = key_value_store(url).read(name, byte_range=slice(begin, end)).result()
        except ValueError as error:
            if "OUT_OF_RANGE" in str(error):
                return b""
            raise
    return found.value if found.state == "value" else b""


def has_file(folder: str, name: str) -> bool:
    """Whether there is such a file below a folder.

    Raises:
      UserError: the URL cannot be read.
    """
    if not is_url(folder):
        return os.path.isfile(os.path.join(folder, name))
    with _url_errors(folder):
        return bool(key_value_store(folder).list(ts.KvStore.KeyRange(name, name + "\0")).result())


def file_names(folder: str) -> set[str]:
    """All files below a folder, by their paths in it.

    Raises:
      UserError: it cannot be read.
    """
    with _url_errors(folder):
        return {key.decode() for key in key_value_store(folder).list().result()}


def entries(path: str) -> set[str]:
    """What lies in a folder, folders with a slash behind their names; nothing where there is no folder.

    Raises:
      UserError: it cannot be read.
    """
    if is_url(path):
        return {first + slash for first, slash, _ in (name.partition("/") for name in file_names(path))}
    if not os.path.isdir(path):
        return set()
    try:
        names = os.listdir(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    folders = {name + "/" for name in names if os.path.isdir(os.path.join(path, name))}
    return folders | {name for name in names if os.path.isfile(os.path.join(path, name))}


@contextlib.contextmanager
def array_errors(what: str) -> Iterator[None]:
    """Says of an array that tensorstore cannot read, inside the block, that it is damaged.

    Args:
      what: the array, by the path of its folder; it begins the sentence.

    Raises:
      CheckpointDamaged: it is.
      UserError: it is out of reach, by its URL or for want of a permission, which says nothing about the array.
    """
    try:
        yield
    except ValueError as error:
        if _OUT_OF_REACH.match(str(error)):
            raise _unreadable(what, error) from error
        raise CheckpointDamaged(f"{what} is damaged ({_first_line(error)}).") from error


@contextlib.contextmanager
def _url_errors(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _ERRORS as error:
        raise _unreadable(url, error) from error


def _unreadable(what: str, error: Exception) -> UserError:
    return UserError(f"{what} cannot be read ({_first_line(error)}).")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
