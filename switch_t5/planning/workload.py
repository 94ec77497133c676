"""What a plan is of: a model, a batch, an optimizer's state; and the meshes that it may be spread over."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh

from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.model.config import TransformerConfig
from switch_t5.partitioning.mesh import MESH_AXES
from switch_t5.partitioning.rules import PARAMETER_AXIS_RULES, named_sharding, partition_spec
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

    def axes(self) -> dict[str, int]:
        """Devices along each axis, in the order in which a mesh numbers them."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def abstract(self) -> AbstractMesh:
        """A mesh without devices, for the rules of :mod:`switch_t5.partitioning`."""
        return AbstractMesh(tuple(self.axes().values()), MESH_AXES)

    def __str__(self) -> str:
        return "x".join(map(str, self if self.fsdp > 1 else self[:3]))


class ArrayKind(NamedTuple):
    """Arrays of one shape, dtype and axes, in the blocks of a stack or outside."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: Axes
    in_blocks: bool

    @property
    def nbytes(self) -> int:
        """Of a whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Arrays:
    """The arrays of a tree, counted by kind, and the name of the first of each."""

    kinds: tuple[tuple[ArrayKind, int, str], ...]

    @classmethod
    def of(cls, tree: Any, axes: Any) -> Arrays:
        """Args: a tree of arrays or shapes, and one shaped alike with a tuple of logical axes for each."""
        counts: Counter[ArrayKind] = Counter()
        names: dict[ArrayKind, str] = {}

        def count(path: jax.tree_util.KeyPath, leaf: Any, leaf_axes: Axes) -> None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            kind = ArrayKind(tuple(leaf.shape), np.dtype(leaf.dtype), tuple(leaf_axes), "blocks" in name.split("/"))
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
    sharding = named_sharding(devices, kind.axes, kind.shape, PARAMETER_AXIS_RULES, name=name)
    return math.prod(sharding.shard_shape(kind.shape)) * kind.dtype.itemsize


def sharded_over(kind: ArrayKind) -> set[str]:
    """The mesh axes that a parameter is split over."""
    found: set[str] = set()
    for target in partition_spec(kind.axes, PARAMETER_AXIS_RULES):
        found |= {target} if isinstance(target, str) else set(target or ())
    return found


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
    """

    config: TransformerConfig
    batch: int
    encoder_length: int
    decoder_length: int
    params: Arrays
    opt_state: Arrays
    microbatches: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a step, the decoder's too."""
        return self.batch * (self.encoder_length + self.decoder_length)

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
