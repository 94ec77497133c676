"""One writer a folder: two programs that save into the same run would overwrite each other."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from switch_t5.errors import UserError
from switch_t5.storage import storage_errors

_NAME = ".writer"


class WriterLock:
    """Held from its making until `release`, or until the process ends in whatever way."""

    def __init__(self, directory: Path) -> None:
        """Takes the lock.

        Raises:
          UserError: another process, or another checkpointer of this one, has it; or the folder is another's.
        """
        with storage_errors(f"Writing {directory / _NAME}"):
            self._file = open(directory / _NAME, "a+")  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            who = self._file.read().strip()
            self._file.close()
            raise UserError(
                f"{directory} is being written by another run{f' (process {who})' if who else ''}: wait for its end or "
                "choose another MODEL_DIR."
            ) from None
        except OSError:
            return  # A file system without locks: there the user must see to it.
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back."""
        self._file.close()
