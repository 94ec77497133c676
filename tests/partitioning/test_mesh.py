"""Devices to meshes, and the sentences for those that cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from switch_t5.errors import ConfigError
from switch_t5.partitioning import mesh as mesh_module
from switch_t5.partitioning.mesh import MeshConfig, batch_shards, make_mesh
from switch_t5.partitioning.rules import AXIS_RULES, partition_spec

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize(
    ("config", "shape", "shards"),
    [
        (MeshConfig(), (8, 1, 1, 1), 8),
        (MeshConfig(num_expert_partitions=8), (1, 1, 8, 1), 8),
        (MeshConfig(num_model_partitions=8), (1, 1, 1, 8), 1),
        (MeshConfig(num_expert_partitions=2, num_model_partitions=2), (2, 1, 2, 2), 4),
        (MeshConfig(num_expert_partitions=2, num_devices=2), (1, 1, 2, 1), 2),
        (MeshConfig(num_fsdp_partitions=4, num_model_partitions=2), (1, 4, 1, 2), 4),
        (MeshConfig(num_fsdp_partitions=2, num_expert_partitions=2), (2, 2, 2, 1), 8),
        (MeshConfig(num_devices=1), (1, 1, 1, 1), 1),
    ],
)
def test_what_the_other_axes_leave_is_data_parallel(
    config: MeshConfig, shape: tuple[int, int, int, int], shards: int
) -> None:
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "model"), shape, strict=True))
    assert batch_shards(mesh) == shards
    assert len(set(mesh.devices.flat)) == mesh.size


def test_rules_are_changed_by_name() -> None:
    rules = MeshConfig(logical_axis_rules={"vocab": None}, parameter_axis_rules={"embed": ["fsdp", "data"]}).axis_rules
    assert partition_spec(("vocab", "embed"), rules.used) == PartitionSpec((), None)
    assert partition_spec(("vocab", "embed"), rules.at_rest) == PartitionSpec((), ("fsdp", "data"))
    assert partition_spec(("embed", "mlp"), rules.at_rest) == PartitionSpec(("fsdp", "data"), "model")
    assert MeshConfig().axis_rules == AXIS_RULES


@pytest.mark.parametrize(
    ("axis", "target", "sentence"),
    [
        ("vocabulary", None, "has a rule for 'vocabulary', which is no logical axis. Did you mean 'vocab'?"),
        (3, "model", "has a rule for 3, which is no logical axis. There are batch, expert_batch, length"),
        ("mlp", "modle", "splits 'mlp' over 'modle', which is no mesh axis. Did you mean 'model'?"),
        ("mlp", 2, "splits 'mlp' over 2, which is no mesh axis. Give some of data, fsdp, expert, model, or None."),
        ("embed", ["fsdp", "fsdp"], "splits 'embed' over a mesh axis twice: ['fsdp', 'fsdp']."),
        ("layers", "data", "has a rule for 'layers', which are gone through one by one and cannot be split."),
        ("expert", "model", "has a rule for 'expert', which follows from the partitions: set num_expert_partitions"),
    ],
)
def test_rules_that_cannot_be_are_refused(axis: Any, target: Any, sentence: str) -> None:
    for field in ("logical_axis_rules", "parameter_axis_rules"):
        with pytest.raises(ConfigError) as caught:
            MeshConfig(**{field: {axis: target}})
        assert str(caught.value).startswith(f"MeshConfig.{field} {sentence}")


@pytest.mark.parametrize(
    ("field", "rules", "sentence"),
    [
        ("logical_axis_rules", {"mlp": "data"}, "would be sharded twice over the mesh axis 'data'"),
        ("logical_axis_rules", {"expert_mlp": ["model", "fsdp"]}, "would be sharded twice over the mesh axis 'fsdp'"),
        ("logical_axis_rules", {"length": "model"}, "would be sharded twice over the mesh axis 'model'"),
        (
            "parameter_axis_rules",
            {"heads": None},
            "leaves 'heads' whole along 'model', which it is split over where it is used; add 'model', or set",
        ),
    ],
)
def test_rules_that_do_not_go_together_are_refused(field: str, rules: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^MeshConfig.{field} {sentence}"):
        MeshConfig(**{field: rules})
    # Sequences are split along model where heads and hidden activations are not.
    MeshConfig(logical_axis_rules={"length": "model", "heads": None, "mlp": None, "vocab": None})


def test_a_mesh_takes_the_first_devices() -> None:
    mesh = make_mesh(MeshConfig(num_devices=4))
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize(
    ("config", "parameter", "part"),
    [
        (MeshConfig(num_devices=9), "MeshConfig.num_devices", "must be from 1 to 8, the devices here, got 9."),
        (MeshConfig(num_devices=0), "MeshConfig.num_devices", "must be from 1 to 8, the devices here, got 0."),
        (
            MeshConfig(num_expert_partitions=8, num_model_partitions=2),
            "MeshConfig.num_expert_partitions",
            "8 x 2 x 1 = 16 partitions, more than the 8 device(s) here",
        ),
        (
            MeshConfig(num_expert_partitions=3, num_model_partitions=2),
            "MeshConfig.num_expert_partitions",
            "3 x 2 x 1 = 6 partitions, which do not divide 8 devices; the nearest product that does is 4.",
        ),
        (
            MeshConfig(num_fsdp_partitions=3),
            "MeshConfig.num_expert_partitions",
            "x num_model_partitions x num_fsdp_partitions is 1 x 1 x 3 = 3 partitions, which do not divide 8 devices",
        ),
    ],
)
def test_a_mesh_that_the_devices_cannot_make_is_refused_by_name(config: MeshConfig, parameter: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mesh(config)
    assert caught.value.parameter == parameter
    assert part in str(caught.value)


@pytest.mark.parametrize("field", ["num_expert_partitions", "num_model_partitions", "num_fsdp_partitions"])
def test_partitions_are_at_least_one(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MeshConfig(**{field: 0})
    assert str(caught.value) == f"MeshConfig.{field} must be at least 1, got 0."


def two_slices(monkeypatch: pytest.MonkeyPatch, platform: str, **partitions: int) -> np.ndarray:
    """The slice of each device of a mesh over two slices of four, ``[data, fsdp, expert, model]``."""
    devices: list[Any] = [
        SimpleNamespace(
            id=4 * slice_index + number,
            process_index=0,
            platform=platform,
            device_kind={"tpu": "TPU v4", "gpu": "H100"}[platform],
            slice_index=slice_index,
            coords=(number % 2, number // 2, 0),
            core_on_chip=0,
        )
        for number in range(4)
        for slice_index in range(2)
    ]
    monkeypatch.setattr(mesh_module, "Mesh", lambda devices, axes: devices)
    found: Any = make_mesh(MeshConfig(**partitions), devices)
    return np.vectorize(lambda device: device.slice_index)(found)


def test_slices_are_apart_along_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = two_slices(monkeypatch, "tpu", num_expert_partitions=2, num_model_partitions=2)
    assert slices.shape == (2, 1, 2, 2)
    assert (slices == np.array([0, 1]).reshape(2, 1, 1, 1)).all()
    slices = two_slices(monkeypatch, "tpu", num_expert_partitions=2)
    assert slices[:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_experts_are_not_spread_over_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "which leave 1 along data; that must be a multiple of the 2 slices, .* lower their product to 4"
    with pytest.raises(ConfigError, match=expected):
        two_slices(monkeypatch, "tpu", num_expert_partitions=4, num_model_partitions=2)
    # Hosts of GPUs, which are slices by name alone.
    assert two_slices(monkeypatch, "gpu", num_expert_partitions=8).shape == (1, 1, 8, 1)
