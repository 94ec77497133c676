"""Arrays onto a mesh: parameters and states by their axes, batches by their first dimension."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.partitioning.mesh import BATCH_AXES
from switch_t5.partitioning.rules import LOGICAL_AXIS_RULES, Rules, named_sharding
from switch_t5.types import Batch


def tree_shardings(mesh: Mesh, tree: Any, axes: Any, rules: Rules = LOGICAL_AXIS_RULES) -> Any:
    """Returns the sharding of each array of a tree.

    Args:
      mesh: the devices.
      tree: arrays, or their shapes.
      axes: shaped as the tree, a tuple of logical axes for each array.
      rules: logical axes to mesh axes.

    Raises:
      ConfigError: an array cannot be sharded so; it is named.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any, leaf_axes: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return named_sharding(mesh, leaf_axes, leaf.shape, rules, name=name)

    return jax.tree_util.tree_map_with_path(sharding, tree, axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every feature of a batch: sequences over the data and expert axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Makes global arrays of the sequences that this process holds."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
