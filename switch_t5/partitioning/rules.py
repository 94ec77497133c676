"""Logical axis names to mesh axes: the one table, and its strict application."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.errors import ConfigError, closest
from switch_t5.types import Array, Axes

Rules = Mapping[str, str | tuple[str, ...] | None]

LOGICAL_AXIS_RULES: Rules = {
    "batch": ("data", "expert"),
    "expert_batch": "data",
    "length": None,
    "embed": None,
    "mlp": "model",
    "expert": "expert",
    "expert_mlp": "model",
    "heads": "model",
    "kv": None,
    "vocab": "model",
    "layers": None,
    "relpos_buckets": None,
}

_active: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("active_partitioning", default=None)


def partition_spec(axes: Axes, rules: Rules = LOGICAL_AXIS_RULES, *, name: str = "array") -> PartitionSpec:
    """Translates logical axes to a ``PartitionSpec``.

    Args:
      axes: one logical name (or None) a dimension.
      rules: logical name to mesh axis, several mesh axes, or None.
      name: what the axes belong to, for the error's sentence.

    Raises:
      ConfigError: a logical name is not in the table, or two dimensions would share a mesh axis.
    """
    taken: dict[str, str] = {}
    spec = []
    for axis in axes:
        if axis is None:
            spec.append(None)
            continue
        if axis not in rules:
            raise ConfigError(name, f"has the logical axis {axis!r}, which no rule maps.{closest(axis, rules)}")
        target = rules[axis]
        for mesh_axis in (target,) if isinstance(target, str) else target or ():
            if mesh_axis in taken:
                raise ConfigError(
                    name,
                    f"would be sharded twice over the mesh axis {mesh_axis!r}: by its logical axes "
                    f"{taken[mesh_axis]!r} and {axis!r}; map one of them to None.",
                )
            taken[mesh_axis] = axis
        spec.append(target)
    return PartitionSpec(*spec)


def named_sharding(
    mesh: Mesh,
    axes: Axes,
    shape: tuple[int, ...],
    rules: Rules = LOGICAL_AXIS_RULES,
    *,
    name: str = "array",
) -> NamedSharding:
    """Returns the sharding of an array of this shape on the mesh.

    Raises:
      ConfigError: as :func:`partition_spec`; or the number of axes is not the rank; or a dimension is not
        divisible by the devices it is split over.
    """
    if len(axes) != len(shape):
        raise ConfigError(name, f"has {len(shape)} dimensions {shape} but {len(axes)} logical axes {axes}.")
    spec = partition_spec(axes, rules, name=name)
    for size, axis, target in zip(shape, axes, spec, strict=True):
        mesh_axes = (target,) if isinstance(target, str) else target or ()
        shards = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % shards:
            raise ConfigError(
                name,
                f"has {axis!r} of size {size}, which {shards} partitions along {'x'.join(mesh_axes)!r} do not "
                f"divide; the nearest size that fits is {max(shards, round(size / shards) * shards)}.",
            )
    return NamedSharding(mesh, spec)


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: Rules = LOGICAL_AXIS_RULES) -> Iterator[None]:
    """While a function is traced inside this block, :func:`constrain` refers to the mesh."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def is_partitioned() -> bool:
    """Whether what is being traced will run on more than one device."""
    active = _active.get()
    return active is not None and active[0].size > 1


def constrain(x: Array, axes: Axes) -> Array:
    """Fixes how an activation is sharded; outside :func:`partitioned` it returns ``x`` as it is."""
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    sharding = named_sharding(mesh, axes, x.shape, rules, name="an activation")
    return jax.lax.with_sharding_constraint(x, sharding)
