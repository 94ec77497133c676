"""What a save reads in the background while the next step already overwrites the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from switch_t5.checkpoint import fingerprint


def held(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Starts copies of arrays that lie in the host's memory.

    An accelerator's arrays are returned as they are: Orbax copies them to the host before it returns. What it takes of
    a CPU device is the array itself, and a step that is given such an array must copy it first: later, and one
    array after another.

    Args:
      leaves: arrays by name.

    Returns:
      The arrays to save, sharded as they were; they may still be being copied, for which the state must stay.
    """
    return {
        name: jax.device_put(leaf, leaf.sharding, may_alias=False) if on_cpu(leaf) else leaf
        for name, leaf in leaves.items()
    }


def fingerprints(leaves: Mapping[str, Any], copies: Mapping[str, Any]) -> Callable[[], dict[str, np.ndarray]]:
    """Starts the fingerprints of a state in the background.

    Those of arrays that were not copied are begun at once, before their buffers are given away; of copies in turn,
    since all together would take the threads that the next step runs in.

    Args:
      leaves: the state's arrays by name.
      copies: what :func:`held` made of them.

    Returns:
      What waits for them and gives two uint32 an array.
    """
    begun = {name: fingerprint.begin(leaf) for name, leaf in leaves.items() if copies[name] is leaf}
    if jax.process_count() > 1:  # Processes must add up theirs together, here.
        begun |= {name: fingerprint.begin(copy) for name, copy in copies.items() if name not in begun}
        sums = fingerprint.finish(begun)
        return lambda: sums

    def in_turn() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for name, copy in copies.items():
            found |= fingerprint.finish({name: begun.get(name) or fingerprint.begin(copy)})
        return found

    background = ThreadPoolExecutor(1, "fingerprints")
    future = background.submit(in_turn)
    background.shutdown(wait=False)
    return future.result


def on_cpu(leaf: Any) -> bool:
    """Whether something is an array whose devices are all CPUs."""
    return isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.sharding.device_set)
