"""Devices to a mesh of data, fully sharded data, expert and model parallelism."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from switch_t5.errors import ConfigError, check_types, closest
from switch_t5.partitioning.rules import LOGICAL_AXIS_RULES, AxisRules, partition_spec, targets

MESH_AXES = ("data", "fsdp", "expert", "model")
BATCH_AXES = ("data", "fsdp", "expert")
_BATCH_RULES = ("batch", "expert_batch", "expert")
"""Logical axes of which the layers' exchanges and the batch's placement take the rules as given."""
_ACTIVATIONS = (
    ("batch", "length", "embed"),
    ("batch", "heads", "length", "kv"),
    ("batch", "length", "mlp"),
    ("batch", "length", "vocab"),
    ("expert", "expert_batch", "embed"),
    ("expert", "expert_batch", "expert_mlp"),
)
"""Which logical axes meet in an array."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are divided.

    Attributes:
      num_expert_partitions: devices that a layer's experts are spread over.
      num_model_partitions: devices that attention heads, feed-forward and vocabulary are split over.
      num_fsdp_partitions: devices that parameters and optimizer state are split over between their uses.
      num_devices: devices to use, from the first on; None for all there are.
      logical_axis_rules: for some logical axes another mesh axis, several, or None, than
        :data:`switch_t5.partitioning.rules.LOGICAL_AXIS_RULES` says.
      parameter_axis_rules: the same for parameters and the optimizer's state between their uses alone, where
        :data:`switch_t5.partitioning.rules.PARAMETER_AXIS_RULES` differs or is to differ.

    What is left, devices / (fsdp x expert x model), replicates the parameters: pure data parallelism. The batch is
    split over data, fsdp and expert alike.
    """

    num_expert_partitions: int = 1
    num_model_partitions: int = 1
    num_fsdp_partitions: int = 1
    num_devices: int | None = None
    logical_axis_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    parameter_axis_rules: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("logical_axis_rules", "parameter_axis_rules"):
            for axis, target in getattr(self, field).items():
                _check_rule(f"MeshConfig.{field}", axis, target)
        self._check_together()
        for field in ("num_expert_partitions", "num_model_partitions", "num_fsdp_partitions"):
            if getattr(self, field) < 1:
                raise ConfigError(f"MeshConfig.{field}", f"must be at least 1, got {getattr(self, field)}.")

    @property
    def axis_rules(self) -> AxisRules:
        """The tables that these fields change."""
        changes = (self.logical_axis_rules, self.parameter_axis_rules)
        return AxisRules.changed(*({axis: _mesh_axes(target) for axis, target in one.items()} for one in changes))

    def _check_together(self) -> None:
        """Checks that no array would be split twice over a mesh axis, nor parameters less than where they are used."""
        rules = self.axis_rules
        for axes in _ACTIVATIONS:
            partition_spec(axes, rules.used, name="MeshConfig.logical_axis_rules")
        for axis in self.parameter_axis_rules:
            if missing := [name for name in targets(rules.used[axis]) if name not in targets(rules.at_rest[axis])]:
                raise ConfigError(
                    "MeshConfig.parameter_axis_rules",
                    f"leaves {axis!r} whole along {missing[0]!r}, which it is split over where it is used; add "
                    f"{missing[0]!r}, or set logical_axis_rules.",
                )


def _check_rule(parameter: str, axis: str, target: Any) -> None:
    """Raises ConfigError where a rule names what is not there, or cannot be."""
    if axis not in LOGICAL_AXIS_RULES:
        near = closest(str(axis), LOGICAL_AXIS_RULES) or f" There are {', '.join(LOGICAL_AXIS_RULES)}."
        raise ConfigError(parameter, f"has a rule for {axis!r}, which is no logical axis.{near}")
    if axis == "layers":
        raise ConfigError(parameter, "has a rule for 'layers', which are gone through one by one and cannot be split.")
    if axis in _BATCH_RULES:
        raise ConfigError(
            parameter,
            f"has a rule for {axis!r}, which follows from the partitions: set num_expert_partitions, or "
            "num_fsdp_partitions.",
        )
    names = _mesh_axes(target)
    for name in names:
        if name not in MESH_AXES:
            near = closest(str(name), MESH_AXES) or f" Give some of {', '.join(MESH_AXES)}, or None."
            raise ConfigError(parameter, f"splits {axis!r} over {name!r}, which is no mesh axis.{near}")
    if len(set(names)) < len(names):
        raise ConfigError(parameter, f"splits {axis!r} over a mesh axis twice: {target!r}.")


def _mesh_axes(target: Any) -> tuple[Any, ...]:
    """What a rule of a configuration names: one mesh axis, several or, for None, no one."""
    if isinstance(target, tuple | list):
        return tuple(target)
    return () if target is None else (target,)


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (jax hides that it is a class)
) -> Mesh:
    """Arranges the devices as ``Mesh('data', 'fsdp', 'expert', 'model')``.

    Raises:
      ConfigError: more devices or partitions are asked for than there are, or the partitions do not divide
        the devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    wanted = config.num_devices if config.num_devices is not None else len(devices)
    if not 1 <= wanted <= len(devices):
        raise ConfigError(
            "MeshConfig.num_devices", f"must be from 1 to {len(devices)}, the devices here, got {wanted}."
        )
    left_out = {device.process_index for device in devices} - {device.process_index for device in devices[:wanted]}
    if left_out:
        raise ConfigError(
            "MeshConfig.num_devices",
            f"is {wanted}, which leaves process {min(left_out)} without a device: start fewer processes.",
        )
    devices = devices[:wanted]
    parts = (config.num_fsdp_partitions, config.num_expert_partitions, config.num_model_partitions)
    partitions = math.prod(parts)
    product = (
        f"x num_model_partitions x num_fsdp_partitions is {config.num_expert_partitions} x "
        f"{config.num_model_partitions} x {config.num_fsdp_partitions} = {partitions} partitions"
    )
    if partitions > wanted:
        raise ConfigError(
            "MeshConfig.num_expert_partitions",
            f"{product}, more than the {wanted} device(s) here; lower them, or on CPU raise NUM_CPU_DEVICES.",
        )
    if wanted % partitions:
        usable = max(d for d in range(1, wanted + 1) if wanted % d == 0 and d <= partitions)
        raise ConfigError(
            "MeshConfig.num_expert_partitions",
            f"{product}, which do not divide {wanted} devices; the nearest product that does is {usable}.",
        )
    return Mesh(_arranged(devices, (wanted // partitions, *parts)), MESH_AXES)


def _arranged(devices: Sequence[Any], shape: tuple[int, int, int, int]) -> np.ndarray:
    """The devices in the mesh's shape, neighbours by their links; slices that a network joins are apart along data.

    Raises:
      ConfigError: the slices are more than the data axis can hold.
    """
    # Descriptions of one slice have no such number. Of GPUs each host calls itself a slice, and experts may well be
    # spread over hosts.
    indices = {getattr(device, "slice_index", 0) for device in devices}
    slices = len(indices) if devices[0].platform == "tpu" else 1
    # On a torus an axis may be a part of a physical one: 4 x 32 x 2 on 16 x 16.
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *parts = shape
    if data % slices:
        partitions = math.prod(parts)
        raise ConfigError(
            "MeshConfig.num_expert_partitions",
            f"x num_model_partitions x num_fsdp_partitions is {partitions} partitions, which leave {data} along data; "
            f"that must be a multiple of the {slices} slices, between which gradients alone are sent: lower their "
            f"product to {math.gcd(len(devices) // slices, partitions)}.",
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *parts), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def batch_shards(mesh: Mesh) -> int:
    """The number of shards a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)
