"""Scanned, recomputed and written out: one model."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.attention import mask_bias
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.model.blocks import BlockInputs
from switch_t5.model.config import TransformerConfig
from switch_t5.model.stack import Stack, shortest_period
from switch_t5.types import Array, Params

BATCH, LENGTH, SIZE = 4, 6, 2
CONFIG = TransformerConfig(
    vocab_size=32,
    # Few distinct shapes compile in little time.
    emb_dim=SIZE,
    num_heads=SIZE,
    head_dim=SIZE,
    mlp_dim=SIZE,
    num_encoder_layers=4,
    num_decoder_layers=1,
    dropout_rate=0.1,
    initialization="t5x",
    moe=MoEConfig(SIZE, group_size=2 * LENGTH, train_capacity_factor=0.5, min_expert_capacity=1),
    decoder_sparse_layers="none",
)
SCANNED = dataclasses.replace(CONFIG, scan_layers=True)


@pytest.mark.parametrize(
    ("pattern", "period"),
    [
        ("0101", 2),
        ("0000", 1),
        ("1111", 1),
        ("1", 1),
        ("001001", 3),
        ("010", 3),
        ("0110", 4),
        ("01010", 5),
    ],
)
def test_the_shortest_period_repeats_to_the_whole(pattern: str, period: int) -> None:
    assert shortest_period(tuple(sparse == "1" for sparse in pattern)) == period


def make(config: TransformerConfig, pattern: tuple[bool, ...]) -> Stack:
    return Stack(config, pattern, decoder=False, rngs=nnx.Rngs(params=0))


@functools.cache
def made(config: TransformerConfig) -> tuple[Any, nnx.State]:
    return nnx.split(make(config, config.encoder_pattern))


@functools.cache
def outcome(config: TransformerConfig, *, random_parts: bool = False) -> tuple[Params, Any]:
    """Gradients and results of the encoder's stack, with padding and drops; with dropout and jitter if asked for."""
    graph, params = made(config)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(BATCH, LENGTH, SIZE)), jnp.float32)
    mask = jnp.arange(LENGTH) < jnp.asarray([6, 4, 6, 1])[:, None]
    positions = jnp.asarray(random.normal(size=(1, SIZE, LENGTH, LENGTH)), jnp.float32)
    rng = jax.random.key(1) if random_parts else None

    def loss(params: nnx.State, x: Array, positions: Array) -> tuple[Array, Any]:
        inputs = BlockInputs(
            jnp.ones(mask.shape, jnp.int32), mask, mask_bias(mask, mask), positions, None, None, sequences=2, train=True
        )
        y, stats = nnx.merge(graph, params)(x, inputs, rng)
        assert stats is not None
        return jnp.sum(jnp.sin(y)) + jnp.sum(stats.load_balance_loss + stats.router_z_loss), (y, stats)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (d_params, d_x, d_positions), results = gradient(params, x, positions)
    return {"params": nnx.to_pure_dict(d_params), "x": d_x, "positions": d_positions}, results


def written_out(blocks: Params) -> Params:
    """The parameters of two scanned periods under the names that they have without a scan."""
    period = len(blocks)
    return {
        f"layers_{repeat * period + index}": jax.tree.map(operator.itemgetter(repeat), blocks[f"layers_{index}"])
        for repeat in range(2)
        for index in range(period)
    }


def assert_close(ours: Any, reference: Any) -> None:
    """Each array within rounding of its own largest entry."""

    def compare(path: jax.tree_util.KeyPath, one: Array, other: Array) -> None:
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, reference)


def axes_by_name(stack: Stack) -> dict[str, tuple[str | None, ...]]:
    flat = nnx.to_flat_state(nnx.state(stack, nnx.Param))
    return {"/".join(map(str, path)): param.get_metadata()["axes"] for path, param in flat}


def test_scanned_parameters_have_a_leading_axis_over_the_periods() -> None:
    written, scanned = (axes_by_name(nnx.merge(*made(config))) for config in (CONFIG, SCANNED))
    # The period is a dense and a sparse block.
    assert {name.split("/")[1] for name in scanned} == {"layers_0", "layers_1"}
    assert {name.split("/")[1] for name in written} == {f"layers_{index}" for index in range(4)}
    for name, axes in scanned.items():
        assert axes == ("layers", *written[name])


def test_scanned_and_written_out_start_from_the_same_numbers() -> None:
    scanned, written = (nnx.to_pure_dict(made(config)[1])["blocks"] for config in (SCANNED, CONFIG))
    jax.tree.map(np.testing.assert_array_equal, written_out(scanned), written)


def test_a_stack_without_a_repetition_is_not_scanned() -> None:
    stack = nnx.eval_shape(lambda: make(SCANNED, (False, True, True)))
    assert axes_by_name(stack)["blocks/layers_0/mlp_norm/scale"] == ("embed",)


def test_statistics_have_a_leading_axis_over_sparse_layers_and_show_drops() -> None:
    _, (_, stats) = outcome(CONFIG)
    assert stats.expert_load.shape == (2, SIZE)
    np.testing.assert_array_equal(stats.tokens, [17, 17])
    assert (np.asarray(stats.dropped) > 0).all()


@pytest.mark.parametrize("remat_policy", get_args(RematPolicy))
def test_scanned_equals_written_out_in_value_statistics_and_gradients(remat_policy: RematPolicy) -> None:
    gradients, results = outcome(dataclasses.replace(SCANNED, remat_policy=remat_policy))
    reference, reference_results = outcome(CONFIG)
    assert_close(results, reference_results)
    gradients = gradients | {"params": {"blocks": written_out(gradients["params"]["blocks"])}}
    assert_close(gradients, reference)


@pytest.mark.parametrize("remat_policy", ["minimal", "full"])
def test_recomputed_equals_stored(remat_policy: RematPolicy) -> None:
    gradients, results = outcome(dataclasses.replace(CONFIG, remat_policy=remat_policy))
    reference, reference_results = outcome(CONFIG)
    assert_close(results, reference_results)
    assert_close(gradients, reference)


@pytest.mark.slow
def test_scanned_recomputed_and_written_out_draw_the_same_dropout_and_jitter() -> None:
    gradients, results = outcome(dataclasses.replace(SCANNED, remat_policy="full"), random_parts=True)
    reference, reference_results = outcome(CONFIG, random_parts=True)
    assert_close(results, reference_results)
    assert_close(written_out(gradients["params"]["blocks"]), reference["params"]["blocks"])
    still, _ = outcome(CONFIG)
    assert (np.asarray(still["x"]) != np.asarray(reference["x"])).any()
