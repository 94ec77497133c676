"""What a save reads in the background while the next step already overwrites the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def held(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Starts copies of arrays that lie in the host's memory.

    An accelerator's arrays are returned as they are: Orbax copies them to the host before it returns. What it takes of
    a CPU device is the array itself, and a step that is given such an array must copy it first: later, and one
    array after another.

    Args:
      leaves: arrays by name.

    Returns:
      The arrays to save, sharded as they were; they may still be being copied.
    """
    return {
        name: jax.device_put(leaf, leaf.sharding, may_alias=False) if _on_cpu(leaf) else leaf
        for name, leaf in leaves.items()
    }


def _on_cpu(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.sharding.device_set)
