"""Failures of the disk, told to the user in one sentence.

Whatever writes into ``MODEL_DIR`` uses this: a full disk or a folder without permission is the user's to
mend, and neither deserves a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from switch_t5.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
FAILING = (errno.EIO, errno.ENXIO, errno.ESTALE, errno.EUCLEAN, errno.EBADMSG)
"""The system's numbers for a disk that is out of order, or out of reach."""

# tensorstore raises ValueError with the system's error number only inside its text.
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")


def writable_directory(path: str | os.PathLike[str], name: str = "MODEL_DIR") -> Path:
    """Makes a folder, parents included, and proves that a file can be written there.

    Args:
      path: the folder.
      name: what the user calls it, for the sentence.

    Raises:
      UserError: the folder cannot be made or written.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"{name} {directory} cannot be written ({error.strerror}): name a folder that can.") from error
    return directory


@contextlib.contextmanager
def storage_errors(doing: str, consequence: str = "") -> Iterator[None]:
    """Turns a full, forbidden or failing disk, met inside the block, into a UserError.

    Args:
      doing: what was under way, such as ``"Writing /runs/1/metrics.jsonl"``; it begins the sentence.
      consequence: what it means for the run; it ends the sentence.

    Raises:
      UserError: the block ran out of room, lacked permission or met a broken disk. Other exceptions pass unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        remedy = "make room there" if number in _NO_ROOM else "name a folder that can be written"
        remedy = "see to that disk" if number in FAILING else remedy
        end = f"; {consequence}" if consequence else ""
        raise UserError(f"{doing} failed ({os.strerror(number)}): {remedy}{end}.") from error


def _disk_error(error: BaseException | None) -> int | None:
    """The system's number of the first disk error in a chain of exceptions, or None."""
    while error is not None:
        match = _TENSORSTORE_ERRNO.search(str(error))
        number = int(match.group(1)) if match else getattr(error, "errno", None)
        if number in _NO_ROOM + _NO_PERMISSION + FAILING:
            return number
        error = error.__cause__ or error.__context__
    return None
