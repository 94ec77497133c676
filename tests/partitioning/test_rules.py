"""Logical axes to mesh axes, strictly."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from switch_t5.errors import ConfigError
from switch_t5.partitioning.mesh import MESH_AXES, MeshConfig, make_mesh
from switch_t5.partitioning.rules import (
    LOGICAL_AXIS_RULES,
    PARAMETER_AXIS_RULES,
    constrain,
    gather_parameter,
    named_sharding,
    partition_spec,
    partitioned,
)

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    """Two devices along each axis."""
    return make_mesh(MeshConfig(num_expert_partitions=2, num_model_partitions=2))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), PartitionSpec("model", None)),
        (("expert", "embed", "expert_mlp"), PartitionSpec("expert", None, "model")),
        (("layers", "embed", "heads", "kv"), PartitionSpec(None, None, "model", None)),
        (("batch", "length", "mlp"), PartitionSpec(("data", "fsdp", "expert"), None, "model")),
        (("expert", "expert_batch", None, "embed"), PartitionSpec("expert", ("data", "fsdp"), None, None)),
        ((), PartitionSpec()),
    ],
)
def test_logical_axes_become_mesh_axes(axes: tuple[str | None, ...], spec: PartitionSpec) -> None:
    assert partition_spec(axes) == spec


def test_every_rule_names_axes_of_the_mesh() -> None:
    for target in LOGICAL_AXIS_RULES.values():
        assert set((target,) if isinstance(target, str) else target or ()) <= set(MESH_AXES)


def test_an_unmatched_name_is_an_error_that_names_the_parameter_and_the_nearest_axis() -> None:
    with pytest.raises(ConfigError) as caught:
        partition_spec(("embed", "head"), name="decoder/query")
    assert str(caught.value) == ("decoder/query has the logical axis 'head', which no rule maps. Did you mean 'heads'?")


def test_two_dimensions_on_one_mesh_axis_are_an_error_that_names_the_parameter_and_both() -> None:
    with pytest.raises(ConfigError) as caught:
        partition_spec(("heads", "mlp"), name="decoder/fused")
    assert str(caught.value) == (
        "decoder/fused would be sharded twice over the mesh axis 'model': by its logical axes 'heads' and 'mlp'; "
        "map one of them to None."
    )
    with pytest.raises(ConfigError, match="over the mesh axis 'expert': by its logical axes 'batch' and 'expert'"):
        partition_spec(("batch", "expert"))


def test_a_size_that_the_partitions_do_not_divide_is_an_error_that_names_the_parameter(mesh: Mesh) -> None:
    with pytest.raises(ConfigError) as caught:
        named_sharding(mesh, ("embed", "heads", "kv"), (4, 3, 8), name="encoder/query")
    assert str(caught.value) == (
        "encoder/query has 'heads' of size 3, which 2 partitions along 'model' do not divide; "
        "the nearest size that fits is 4."
    )
    with pytest.raises(ConfigError, match=r"'batch' of size 6, which 4 partitions along 'dataxfsdpxexpert'"):
        named_sharding(mesh, ("batch", "length"), (6, 8))


def test_as_many_axes_as_dimensions_are_needed(mesh: Mesh) -> None:
    with pytest.raises(ConfigError) as caught:
        named_sharding(mesh, ("embed", "mlp"), (2, 4, 8), name="mlp/wi")
    assert str(caught.value) == "mlp/wi has 3 dimensions (2, 4, 8) but 2 logical axes ('embed', 'mlp')."


def test_a_sharding_splits_each_dimension_over_its_devices(mesh: Mesh) -> None:
    shape = (8, 6, 4)
    assert named_sharding(mesh, ("batch", "length", "mlp"), shape).shard_shape(shape) == (2, 6, 2)


def test_parameters_lie_in_parts_along_fsdp_and_are_used_whole() -> None:
    mesh = make_mesh(MeshConfig(num_fsdp_partitions=4, num_model_partitions=2))
    kernel, axes = jnp.arange(64.0).reshape(8, 8), ("embed", "mlp")
    lies = named_sharding(mesh, axes, kernel.shape, PARAMETER_AXIS_RULES)
    assert lies.shard_shape(kernel.shape) == (2, 4)

    def used(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        gathered, pullback = jax.vjp(lambda kernel: gather_parameter(kernel, axes), kernel)
        return gathered, pullback(gathered)[0]

    with partitioned(mesh):
        gathered, gradient = jax.jit(used)(jax.device_put(kernel, lies))
    assert gathered.sharding.shard_shape(kernel.shape) == (8, 4)
    assert gradient.sharding.is_equivalent_to(lies, 2)
    assert (gathered == kernel).all() and (gradient == kernel).all()
    with partitioned(make_mesh(MeshConfig())):
        assert gather_parameter(kernel, axes) is kernel
    assert gather_parameter(kernel, axes) is kernel


def test_constrain_is_the_identity_without_a_mesh() -> None:
    x = jnp.ones((3, 5))
    assert constrain(x, ("no such axis", "nor this")) is x


def test_constrain_shards_within_the_block_and_not_after(mesh: Mesh) -> None:
    x = jnp.ones((8, 4))
    with partitioned(mesh):
        inside = jax.jit(lambda x: constrain(x, ("batch", "mlp")))(x)
        with pytest.raises(ConfigError, match="an activation has the logical axis 'mpl'"):
            constrain(x, ("batch", "mpl"))
    assert inside.sharding.shard_shape(x.shape) == (2, 2)
    assert constrain(x, ("batch", "mlp")) is x


def test_an_error_within_the_block_still_ends_it(mesh: Mesh) -> None:
    x = jnp.ones((3, 5))
    with pytest.raises(ConfigError, match="'batch' of size 3"), partitioned(mesh):
        constrain(x, ("batch", "mlp"))
    assert constrain(x, ("batch", "mlp")) is x
