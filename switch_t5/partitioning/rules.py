"""Logical axis names to mesh axes: the one table, and its strict application."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.errors import ConfigError, closest
from switch_t5.types import Array, Axes

Target = str | tuple[str, ...] | None
"""The mesh axis, or several, that a logical axis is split over."""

Rules = Mapping[str, Target]

LOGICAL_AXIS_RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "expert_batch": ("data", "fsdp"),
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
"""For activations, and for parameters where they are used."""

_PARAMETER_AXES: Rules = {"embed": "fsdp"}
"""What is different where parameters and the optimizer's state lie."""

PARAMETER_AXIS_RULES: Rules = {**LOGICAL_AXIS_RULES, **_PARAMETER_AXES}
"""For parameters and the optimizer's state between their uses."""


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Both tables of a run.

    Attributes:
      used: for activations, and for parameters where they are used.
      at_rest: for parameters and the optimizer's state between their uses.
    """

    used: Rules
    at_rest: Rules

    @classmethod
    def changed(cls, used: Rules, at_rest: Rules) -> AxisRules:
        """The tables above, with other rules for some axes; those of ``used`` hold for parameters at rest too."""
        return cls({**LOGICAL_AXIS_RULES, **used}, {**PARAMETER_AXIS_RULES, **used, **at_rest})


AXIS_RULES = AxisRules(LOGICAL_AXIS_RULES, PARAMETER_AXIS_RULES)

_active: ContextVar[tuple[Mesh, AxisRules] | None] = ContextVar("active_partitioning", default=None)
_shard: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("partitioning_of_a_shard", default=None)


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
        for mesh_axis in targets(target):
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
        mesh_axes = targets(target)
        shards = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if size % shards:
            raise ConfigError(
                name,
                f"has {axis!r} of size {size}, which {shards} partitions along {'x'.join(mesh_axes)!r} do not "
                f"divide; the nearest size that fits is {max(shards, round(size / shards) * shards)}.",
            )
    return NamedSharding(mesh, spec)


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: AxisRules = AXIS_RULES) -> Iterator[None]:
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


def target_platform() -> str:
    """The platform, such as ``cpu`` or ``tpu``, of the devices that what is being traced will run on."""
    active = _active.get() or _shard.get()
    return jax.default_backend() if active is None else active[0].devices.flat[0].platform


def num_shards(axis: str) -> int:
    """Parts that a logical axis of what is being traced is split into; 1 outside :func:`partitioned`."""
    active = _active.get()
    if active is None:
        return 1
    mesh, rules = active
    return math.prod(mesh.shape[name] for name in targets(rules.used[axis]))


def constrain(x: Array, axes: Axes) -> Array:
    """Fixes how an activation is sharded; outside :func:`partitioned` it returns ``x`` as it is."""
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    sharding = named_sharding(mesh, axes, x.shape, rules.used, name="an activation")
    return jax.lax.with_sharding_constraint(x, sharding)


def gather_parameter(x: Array, axes: Axes) -> Array:
    """A parameter as a layer uses it: whole along ``fsdp``, or wherever else it lies in parts, as its gradient does.

    Outside :func:`partitioned`, and where it is whole already, it returns ``x`` as it is.
    """
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    lies = named_sharding(mesh, axes, x.shape, rules.at_rest)
    used = named_sharding(mesh, axes, x.shape, rules.used)
    return x if lies.is_equivalent_to(used, x.ndim) else _resharded(x, used, lies)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _resharded(x: Array, used: NamedSharding, lies: NamedSharding) -> Array:
    """``x`` sharded as it is ``used``. A constraint's own derivative would leave the gradient so too."""
    return jax.lax.with_sharding_constraint(x, used)


def _resharded_forward(x: Array, used: NamedSharding, lies: NamedSharding) -> tuple[Array, None]:
    return jax.lax.with_sharding_constraint(x, used), None  # By name, so that a rematerialisation policy knows it.


def _resharded_backward(used: NamedSharding, lies: NamedSharding, residual: None, gradient: Array) -> tuple[Array]:
    # Summed first, which compilers for accelerators join with the dealing out; else a look-up's gradient is resharded.
    return (jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(gradient, used), lies),)


_resharded.defvjp(_resharded_forward, _resharded_backward)


def gathers_parameters() -> bool:
    """Whether what is being traced will run on devices that parameters are split over between their uses alone."""
    active = _active.get()
    if active is None:
        return False
    mesh, rules = active
    at_rest, used = (
        {(axis, name) for axis, target in table.items() for name in targets(target) if mesh.shape[name] > 1}
        for table in (rules.at_rest, rules.used)
    )
    return at_rest != used


def per_shard(function: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
    """``function``, run by each device on its shards of the arguments.

    In it :func:`constrain` does nothing, and :func:`gather_shards`, :func:`exchange_shards`, :func:`sum_shards` and
    :func:`shard_index` are how devices meet. On one device, or outside :func:`partitioned`, they are identities and it
    is ``function`` itself.

    Args:
      function: of arrays, or trees of them.
      in_axes: for each argument a tree of logical axes; None for what every device has whole.
      out_axes: the same for the result.
    """
    active = _active.get()
    if active is None or not is_partitioned():
        return function
    mesh, rules = active[0], active[1].used

    def on_a_shard(*args: Any) -> Any:
        tokens = _active.set(None), _shard.set((mesh, rules))
        try:
            return function(*args)
        finally:
            _active.reset(tokens[0])
            _shard.reset(tokens[1])

    def specs(axes: Any) -> Any:
        is_axes = lambda node: node is None or isinstance(node, tuple)  # noqa: E731
        return jax.tree.map(lambda node: partition_spec(node or (), rules), axes, is_leaf=is_axes)

    in_specs = tuple(specs(axes) for axes in in_axes)
    # Loops of a data-dependent length cannot say along which axes their result is the same.
    return jax.shard_map(on_a_shard, mesh=mesh, in_specs=in_specs, out_specs=specs(out_axes), check_vma=False)


def gather_shards(x: Array, axis: str) -> Array:
    """Inside :func:`per_shard`: all devices' ``x`` along the mesh axis of a logical one, one after the other."""
    names = _mesh_axes(axis)
    return jax.lax.all_gather(x, names, tiled=True) if names else x


def exchange_shards(x: Array, axis: str, *, split: int, join: int) -> Array:
    """Inside :func:`per_shard`: an all-to-all along a logical axis.

    Each device cuts the dim ``split`` of its ``x`` into a part for every device, and joins what it is sent along the
    dim ``join``, in the devices' order.
    """
    names = _mesh_axes(axis)
    return jax.lax.all_to_all(x, names, split_axis=split, concat_axis=join, tiled=True) if names else x


def sum_shards(x: Array, *, over: str, scatter: str | None = None) -> Array:
    """Inside :func:`per_shard`: the sum of all devices' ``x``, whole ``over`` an axis, a part each along ``scatter``.

    The shard's result must be this sum, or what every device along ``over`` makes of it alike.
    """
    if scatter is not None and (names := _mesh_axes(scatter)):
        x = jax.lax.psum_scatter(x, names, tiled=True)
    names = _mesh_axes(over)
    return _summed(x, names) if names else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(x: Array, names: tuple[str, ...]) -> Array:
    """A sum whose derivative sends nothing: of a result that all have, each already holds its part of the gradient."""
    return jax.lax.psum(x, names)


def _summed_forward(x: Array, names: tuple[str, ...]) -> tuple[Array, None]:
    return _summed(x, names), None


def _summed_backward(names: tuple[str, ...], residual: None, gradient: Array) -> tuple[Array]:
    # A shard is handed the gradient over the devices that share its result, so that their sum would be the whole.
    return (gradient * jax.lax.axis_size(names),)


_summed.defvjp(_summed_forward, _summed_backward)


def shard_index(axis: str) -> Array | int:
    """Inside :func:`per_shard`: which of the shards along a logical axis this is."""
    names = _mesh_axes(axis)
    return jax.lax.axis_index(names) if names else 0


def shard_count(axis: str) -> int:
    """Inside :func:`per_shard`: how many shards there are along a logical axis."""
    shard = _shard.get()
    return 1 if shard is None else math.prod(shard[0].shape[name] for name in _mesh_axes(axis))


def _mesh_axes(axis: str) -> tuple[str, ...]:
    """Those of a shard's mesh, of more than one device, that a logical axis is split over."""
    shard = _shard.get()
    if shard is None:
        return ()
    mesh, rules = shard
    return tuple(name for name in targets(rules[axis]) if mesh.shape[name] > 1)


def targets(target: Target) -> tuple[str, ...]:
    """The mesh axes of a rule."""
    return (target,) if isinstance(target, str) else tuple(target or ())
