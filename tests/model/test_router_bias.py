"""The bias of sigmoid routers: moved after a step, by load alone, and by nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.router_bias import update_router_biases
from switch_t5.routing.balance import RouterStats
from switch_t5.routing.router import RouterConfig
from switch_t5.training.losses import LossConfig
from switch_t5.training.optimizers import adafactor
from switch_t5.training.schedules import constant_schedule
from switch_t5.training.state import TrainState
from switch_t5.training.step import train_step

SIGMOID = RouterConfig(router="sigmoid_top_k", num_selected_experts=2, bias_update_rate=0.5)
MOE = MoEConfig(4, group_size=16, router=SIGMOID)
CONFIG = TransformerConfig(11, 8, 2, 4, 16, 4, 2, moe=MOE, encoder_sparse_layers=1)


def stats(loads: list[list[float]]) -> RouterStats:
    layers = jnp.zeros(len(loads))
    names = [field.name for field in dataclasses.fields(RouterStats)]
    return RouterStats(**{name: jnp.asarray(loads) if name == "expert_load" else layers for name in names})


def biases(params: Any, stack: str) -> list[Any]:
    """Of a stack's blocks in their order; a scanned block gives one row a repeat."""
    blocks = params[stack]["stack"]["blocks"]
    return [
        np.asarray(blocks[name]["mlp"]["router_bias"])
        for name in sorted(blocks)
        if "router_bias" in blocks[name]["mlp"]
    ]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_each_layers_bias_moves_against_its_own_load(scan_layers: bool) -> None:
    model = Model(dataclasses.replace(CONFIG, scan_layers=scan_layers))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), model.abstract_params)
    loads = [[4.0, 0, 0, 0], [0, 4.0, 0, 0], [1.0, 1, 1, 1], [2.0, 2, 0, 0]]
    of_stacks = {"encoder": stats(loads), "decoder": stats([[0, 0, 0, 8.0]])}
    updated = update_router_biases(params, params, of_stacks, model.config)
    expected = [[-0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, 0.5], [0, 0, 0, 0], [-0.5, -0.5, 0.5, 0.5]]
    np.testing.assert_array_equal(
        np.concatenate([np.atleast_2d(bias) for bias in biases(updated, "encoder")]), expected
    )
    np.testing.assert_array_equal(biases(updated, "decoder")[0].reshape(4), [0.5, 0.5, 0.5, -0.5])
    changed = sum(int((np.asarray(leaf) != 0).sum()) for leaf in jax.tree.leaves(updated))
    assert changed == 12 + 4


def test_a_step_moves_the_bias_by_its_rate_alone() -> None:
    model = Model(CONFIG)
    # Its weight decay would move a bias that is not zero.
    optimizer = adafactor(constant_schedule(0.1), weight_decay_rate=0.1)(model.axes)
    params = model.init(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    random = np.random.default_rng(0)
    batch = {
        name: jnp.asarray(random.integers(1, 11, (2, length)), jnp.int32)
        for name, length in (("encoder_input_tokens", 8), ("decoder_input_tokens", 4), ("decoder_target_tokens", 4))
    }
    batch["decoder_loss_weights"] = jnp.ones((2, 4))

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, Any]:
        return train_step(state, batch, model=model, optimizer=optimizer, config=LossConfig())

    expected = {"encoder": np.zeros(()), "decoder": np.zeros(())}
    for _ in range(2):
        state, metrics = step(state)
        for stack in expected:
            load = np.asarray(metrics["router"][stack].expert_load)
            expected[stack] = expected[stack] + 0.5 * np.sign(load.mean(-1, keepdims=True) - load)
            np.testing.assert_array_equal(np.stack(biases(state.params, stack)), expected[stack])
        assert np.isfinite(float(metrics["loss"]))


def test_a_rate_of_zero_has_no_bias() -> None:
    moe = dataclasses.replace(MOE, router=dataclasses.replace(MOE.router, bias_update_rate=0.0))
    model = Model(dataclasses.replace(CONFIG, moe=moe))
    assert not [
        path for path, _ in jax.tree_util.tree_leaves_with_path(model.abstract_params) if "bias" in str(path[-1])
    ]
