"""One model, one batch, any mesh: the same losses and the same parameters afterwards."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.placement import place_batch, tree_shardings
from switch_t5.partitioning.rules import partitioned
from switch_t5.training.losses import LossConfig
from switch_t5.training.optimizers import sgd, state_axes
from switch_t5.training.state import TrainState
from switch_t5.training.step import train_step
from tests.model.small import examples, packed, random_params

pytestmark = pytest.mark.multidevice

STEPS = 3
CONFIG = TransformerConfig(
    vocab_size=32,
    emb_dim=8,
    num_heads=8,
    head_dim=2,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    # A group is half of a sequence in the encoder, and experts are short of room. Jitter is drawn on every mesh.
    moe=MoEConfig(8, group_size=6, train_capacity_factor=1.0, min_expert_capacity=1),
    encoder_sparse_layers=1,
    decoder_sparse_layers="none",
)
MOE_DROPOUT = MoEConfig(8, group_size=6, min_expert_capacity=1, expert_dropout_rate=0.2)
WITH_DROPOUT = dataclasses.replace(CONFIG, dropout_rate=0.1, moe=MOE_DROPOUT)
MESHES = {
    "data 8": MeshConfig(),
    "expert 8": MeshConfig(num_expert_partitions=8),
    "model 8": MeshConfig(num_model_partitions=8),
    "data 2, expert 2, model 2": MeshConfig(num_expert_partitions=2, num_model_partitions=2),
    "data 4, expert 2": MeshConfig(num_expert_partitions=2),
    "fsdp 8": MeshConfig(num_fsdp_partitions=8),
    "fsdp 2, expert 2, model 2": MeshConfig(num_fsdp_partitions=2, num_expert_partitions=2, num_model_partitions=2),
    "data 2, fsdp 2, model 2, other rules": MeshConfig(
        num_fsdp_partitions=2,
        num_model_partitions=2,
        logical_axis_rules={"heads": None, "kv": "model", "vocab": None},
        parameter_axis_rules={"embed": ["fsdp", "data"], "vocab": "model"},
    ),
}


def batch(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step)
    lengths = [(int(random.integers(2, 7)), int(random.integers(1, 5))) for _ in range(16)]
    content = examples(lengths, seed=step)
    rows = packed([content[i : i + 2] for i in range(0, 16, 2)], 12, 8)
    return {name: np.asarray(value) for name, value in rows.items()}


@functools.cache
def run(mesh_config: MeshConfig, config: TransformerConfig = CONFIG) -> tuple[list[Any], Any]:
    """The metrics of a few steps, and the parameters after them."""
    mesh, rules, model = make_mesh(mesh_config), mesh_config.axis_rules, Model(config)
    # Its updates are the gradients' size, which Adafactor would hide.
    optimizer = sgd(0.5)(model.axes)
    params = random_params(model)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    shardings = TrainState(
        NamedSharding(mesh, PartitionSpec()),
        tree_shardings(mesh, params, model.axes, rules.at_rest),
        tree_shardings(mesh, state.opt_state, state_axes(state.opt_state, params, model.axes), rules.at_rest),
    )
    state = jax.device_put(state, shardings)
    step_function = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, config=LossConfig(router_z_loss_weight=1e-2)),
        out_shardings=(shardings, None),
    )
    history = []
    for step in range(STEPS):
        with partitioned(mesh, rules):
            state, metrics = step_function(state, place_batch(batch(step), mesh))
        history.append(jax.device_get(metrics))
    return history, jax.device_get(state.params)


def assert_equal_within_rounding(results: tuple[list[Any], Any], reference: tuple[list[Any], Any]) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), results[0], reference[0])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), results[1], reference[1])


ALONG_ALL = ("data 2, expert 2, model 2", "fsdp 2, expert 2, model 2", "data 2, fsdp 2, model 2, other rules")


@pytest.mark.parametrize(
    "name", [name if name in ALONG_ALL else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_every_mesh_trains_as_one_device_does(name: str) -> None:
    reference = run(MeshConfig(num_devices=1))
    assert reference[0][0]["router"]["encoder"].dropped > 0
    losses = [float(metrics["loss"]) for metrics in reference[0]]
    assert len(set(losses)) == STEPS
    assert_equal_within_rounding(run(MESHES[name]), reference)


@pytest.mark.slow
def test_sparse_attention_trains_on_a_mesh_as_on_one_device() -> None:
    moe = MoEConfig(8, group_size=6, train_capacity_factor=1.0, min_expert_capacity=1)
    projections = ("query", "key", "value", "out")
    config = dataclasses.replace(
        CONFIG, attention_moe=moe, attention_sparse_projections=projections, encoder_sparse_attention=1
    )
    reference = run(MeshConfig(num_devices=1), config)
    assert (reference[0][0]["router"]["encoder"].dropped > 0).all()
    assert_equal_within_rounding(run(MESHES["data 2, expert 2, model 2"], config), reference)


@pytest.mark.slow
def test_without_capacity_a_mesh_trains_and_drops_out_as_one_device_does() -> None:
    assert WITH_DROPOUT.moe is not None and WITH_DROPOUT.moe.expert_dropout_rate > 0
    config = dataclasses.replace(WITH_DROPOUT, moe=dataclasses.replace(WITH_DROPOUT.moe, dispatch="dropless"))
    reference = run(MeshConfig(num_devices=1), config)
    assert (reference[0][0]["router"]["encoder"].dropped == 0).all()
    assert_equal_within_rounding(run(MESHES["data 2, expert 2, model 2"], config), reference)


@pytest.mark.slow
def test_an_explicit_all_to_all_trains_and_drops_out_as_one_device_does() -> None:
    assert WITH_DROPOUT.moe is not None
    config = dataclasses.replace(WITH_DROPOUT, moe=dataclasses.replace(WITH_DROPOUT.moe, exchange="all_to_all"))
    found = run(MESHES["data 2, expert 2, model 2"], config)
    assert_equal_within_rounding(found, run(MeshConfig(num_devices=1), WITH_DROPOUT))


@pytest.mark.slow
def test_sparse_attention_with_an_explicit_all_to_all_trains_as_on_one_device() -> None:
    moe = MoEConfig(8, group_size=6, train_capacity_factor=1.0, min_expert_capacity=1, exchange="all_to_all")
    config = dataclasses.replace(
        CONFIG,
        attention_moe=moe,
        attention_sparse_projections=("query", "key", "value", "out"),
        encoder_sparse_attention=1,
    )
    reference = run(MeshConfig(num_devices=1), config)
    assert_equal_within_rounding(run(MESHES["data 2, expert 2, model 2"], config), reference)


@pytest.mark.slow
def test_dropout_draws_the_same_on_every_mesh() -> None:
    reference = run(MeshConfig(num_devices=1), WITH_DROPOUT)
    for mesh_config in MESHES.values():
        assert_equal_within_rounding(run(mesh_config, WITH_DROPOUT), reference)
