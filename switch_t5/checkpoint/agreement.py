"""What the processes of a run must do alike, although each sees its own host and its own part of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np

from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.errors import UserError

_SOUND, _DAMAGED, _FAILED = range(3)


def meet(name: str) -> None:
    """Waits for all processes of the run."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
    """What fails on one process inside the block fails on all: else the others would wait for it where they meet next.

    All processes of the run enter it together; none may wait for others inside.

    Args:
      what: the checkpoint, for the sentence of a process that has nothing to complain of.

    Raises:
      CheckpointDamaged: another process found it damaged, and none failed otherwise.
      UserError: another process failed otherwise.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        mine = _SOUND if error is None else _DAMAGED if isinstance(error, CheckpointDamaged) else _FAILED
        worst = int(np.max(multihost_utils.process_allgather(np.int32(mine))))
        if worst == _FAILED and mine != _FAILED:
            error = UserError(f"{what}: another process cannot read it, and says why.")
        elif worst == _DAMAGED and mine == _SOUND:
            error = CheckpointDamaged(f"{what}: another process found it damaged")
    if error is not None:
        raise error
