"""Where a run keeps its checkpoints: ``MODEL_DIR/checkpoints/<step>``, on a disk or at a URL."""

from __future__ import annotations

import os
from collections.abc import Sequence

from switch_t5.errors import UserError

DIRECTORY = "checkpoints"


def run_and_step(path: str) -> tuple[str, int | None]:
    """The MODEL_DIR that a path names, and the step where it names one checkpoint in it.

    Args:
      path: a MODEL_DIR, its folder ``checkpoints``, or one checkpoint in that; not ending in a slash.
    """
    above, name = os.path.split(path)
    if name == DIRECTORY:
        return above, None
    if os.path.basename(above) == DIRECTORY and name.isdecimal():
        return os.path.dirname(above), int(name)
    return path, None


def chosen_step(path: str, steps: Sequence[int]) -> int:
    """The step that a path names, or the newest of those that its run has.

    Raises:
      UserError: the run has none, or not this one.
    """
    model_dir, step = run_and_step(path)
    if not steps or (step is not None and step not in steps):
        have = f" ({model_dir} has {listed(steps)})" if steps else ""
        raise UserError(
            f"{path} is no checkpoint{have}: name a MODEL_DIR that has some, or one of its folders "
            f"MODEL_DIR/{DIRECTORY}/<step>."
        )
    return max(steps) if step is None else step


def listed(steps: Sequence[int]) -> str:
    """Steps in a sentence."""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
