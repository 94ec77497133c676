"""Arrays onto a mesh: parameters and states by their axes, batches by their first dimension."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.partitioning.mesh import BATCH_AXES
from switch_t5.partitioning.rules import PARAMETER_AXIS_RULES, Rules, named_sharding
from switch_t5.types import Batch


def tree_shardings(mesh: Mesh, tree: Any, axes: Any, rules: Rules = PARAMETER_AXIS_RULES) -> Any:
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
    """The sharding of every feature of a batch: sequences over all axes but model."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """The rows of a batch that concern this process.

    Attributes:
      held: int [held rows], ascending: those that its devices hold.
      owned: those of them that no process of a lower number holds too; every row has one owner.
    """

    held: np.ndarray
    owned: np.ndarray


def batch_rows(mesh: Mesh, batch_size: int) -> BatchRows:
    """Returns which rows of a batch this process reads and places; of one process, all."""
    owner = np.full(batch_size, jax.process_count())
    held = np.zeros(batch_size, bool)
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch_size,)).items():
        owner[rows] = np.minimum(owner[rows], device.process_index)
        held[rows] |= device.process_index == jax.process_index()
    return BatchRows(np.flatnonzero(held), np.flatnonzero(held & (owner == jax.process_index())))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Makes global arrays of the sequences that this process holds, in the order of :attr:`BatchRows.held`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
