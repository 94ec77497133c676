"""What a plan is of: a model, a batch, an optimizer's state; and the meshes that it may be spread over."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.model.config import TransformerConfig
from switch_t5.partitioning.mesh import MESH_AXES
from switch_t5.partitioning.rules import AXIS_RULES, AxisRules, named_sharding, partition_spec, targets
from switch_t5.types import Axes


class MeshShape(NamedTuple):
    """Devices along each mesh axis; written as they stand here, ``fsdp`` only where there is any."""

    data: int
    expert: int
    model: int
    fsdp: int = 1

    @property
    def size(self) -> int:
        """All devices."""
        return math.prod(self)

    @property
    def batch_shards(self) -> int:
        """Parts that a batch is split into."""
        return self.data * self.fsdp * self.expert

    def along(self, axes: Iterable[str]) -> int:
        """Devices along some axes together."""
        return math.prod(getattr(self, axis) for axis in axes)

    def axes(self) -> dict[str, int]:
        """Devices along each axis, in the order in which a mesh numbers them."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def abstract(self) -> AbstractMesh:
        """A mesh without devices, for the rules of :mod:`switch_t5.partitioning`."""
        return AbstractMesh(tuple(self.axes().values()), MESH_AXES)

    def __str__(self) -> str:
        return "x".join(map(str, self if self.fsdp > 1 else self[:3]))


class ArrayKind(NamedTuple):
    """Arrays of one shape, dtype and axes, in the blocks of a stack or outside.

    ``split`` and ``used`` are the mesh axes that each dim is split over, between uses and where it is used.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    split: tuple[tuple[str, ...], ...]
    used: tuple[tuple[str, ...], ...]
    in_blocks: bool

    @property
    def gathered_over(self) -> set[str]:
        """The mesh axes that it is made whole along before it is used."""
        return set(itertools.chain(*self.split)) - set(itertools.chain(*self.used))

    def gathered(self, mesh: MeshShape) -> int:
        """Parts that are gathered; 1 where it lies as it is used."""
        return mesh.along(self.gathered_over)

    @property
    def nbytes(self) -> int:
        """Of a whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a tree, counted by kind, and the name of the first of each."""

    kinds: tuple[tuple[ArrayKind, int, str], ...]

    @classmethod
    def of(cls, tree: Any, axes: Any, rules: AxisRules = AXIS_RULES) -> Arrays:
        """Counts the arrays of a tree.

        Args:
          tree: arrays or shapes.
          axes: the same tree with a tuple of logical axes for each.
          rules: what these are split over.
        """
        counts: Counter[ArrayKind] = Counter()
        names: dict[ArrayKind, str] = {}

        def count(path: jax.tree_util.KeyPath, leaf: Any, leaf_axes: Axes) -> None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            split, used = (
                tuple(targets(target) for target in partition_spec(leaf_axes, table, name=name))
                for table in (rules.at_rest, rules.used)
            )
            in_blocks = "blocks" in name.split("/")
            kind = ArrayKind(tuple(leaf.shape), np.dtype(leaf.dtype), tuple(leaf_axes), split, used, in_blocks)
            counts[kind] += 1
            names.setdefault(kind, name)

        jax.tree_util.tree_map_with_path(count, tree, axes)
        return cls(tuple((kind, number, names[kind]) for kind, number in counts.items()))

    @property
    def nbytes(self) -> int:
        """Of all arrays, whole."""
        return sum(kind.nbytes * number for kind, number, _ in self.kinds)

    def shard_bytes(self, mesh: MeshShape) -> int:
        """Bytes that one device holds.

        Raises:
          ConfigError: an array cannot be sharded so; it is named.
        """
        return sum(shard_bytes(kind, mesh, name) * number for kind, number, name in self.kinds)


def shard_bytes(kind: ArrayKind, mesh: MeshShape, name: str = "array") -> int:
    """Bytes that one device holds of an array, by the rules of partitioning.

    Raises:
      ConfigError: it cannot be sharded so.
    """
    devices: Any = mesh.abstract()
    rules = {axis: split for axis, split in zip(kind.axes, kind.split, strict=True) if axis is not None}
    sharding = named_sharding(devices, kind.axes, kind.shape, rules, name=name)
    return math.prod(sharding.shard_shape(kind.shape)) * kind.dtype.itemsize


def is_kernel(kind: ArrayKind) -> bool:
    """Whether a parameter is multiplied in the dtype of activations."""
    return bool({"mlp", "expert_mlp", "kv"} & set(kind.axes))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step, as far as its cost is concerned.

    Attributes:
      config: of the model.
      batch: sequences of a step.
      encoder_length: tokens of an input.
      decoder_length: tokens of a target.
      params: the parameters.
      opt_state: the optimizer's arrays.
      microbatches: equal parts of a batch that are computed one after the other.
      rules: what logical axes are split over.
    """

    config: TransformerConfig
    batch: int
    encoder_length: int
    decoder_length: int
    params: Arrays
    opt_state: Arrays
    microbatches: int = 1
    rules: AxisRules = AXIS_RULES

    @property
    def tokens(self) -> int:
        """Tokens of a step, the decoder's too."""
        return self.batch * (self.encoder_length + self.decoder_length)

    def split_over(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a logical axis of activations is split over."""
        return targets(self.rules.used[axis])

    def parts(self, axis: str, mesh: MeshShape) -> int:
        """Parts that a logical axis of activations is split into."""
        return mesh.along(self.split_over(axis))

    def length(self, *, decoder: bool) -> int:
        """Tokens in a sequence of one stack."""
        return self.decoder_length if decoder else self.encoder_length

    @property
    def itemsize(self) -> int:
        """Bytes of an activation's entry."""
        return self.config.activation_dtype.itemsize

    @property
    def forward_passes(self) -> int:
        """How often a block sends what its forward pass sends: once more where it is recomputed as a whole."""
        return 2 if self.config.remat_policy == "full" else 1

    def with_changes(self, *, remat_policy: RematPolicy, microbatches: int) -> Workload:
        """The same with what saves memory changed; neither changes a parameter."""
        config = dataclasses.replace(self.config, remat_policy=remat_policy)
        return dataclasses.replace(self, config=config, microbatches=microbatches)
