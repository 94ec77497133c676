"""Scanned, recomputed and written out: one model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.moe import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.stack import shortest_period
from switch_t5.training.losses import LossConfig, batch_totals
from switch_t5.training.step import batch_loss
from switch_t5.types import Array, Params
from tests.model.batches import examples, packed

CONFIG = TransformerConfig(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=4,
    num_decoder_layers=2,
    dropout_rate=0.1,
    initialization="t5x",
    moe=MoEConfig(3, group_size=20, min_expert_capacity=1),
    encoder_sparse_layers=2,
    decoder_sparse_layers=1,
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


@functools.cache
def parameters(config: TransformerConfig) -> Params:
    return jax.jit(Model(config).init)(jax.random.key(0))


@functools.cache
def outcome(config: TransformerConfig) -> tuple[Params, dict[str, Any]]:
    """Gradients and metrics of one packed batch, with dropout, jitter and drops."""
    content = examples([(6, 4), (3, 5), (9, 3), (2, 2), (5, 5)])
    batch = packed([content[:2], content[2:3], content[3:4], content[4:]], 10, 9)
    loss_config = LossConfig(router_z_loss_weight=1e-3)
    loss = functools.partial(batch_loss, model=Model(config), config=loss_config)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    return gradient(parameters(config), batch, jax.random.key(1), batch_totals(batch, loss_config))


def written_out(scanned: Params) -> Params:
    """The parameters of a scanned model under the names of one that is not."""

    def stack(blocks: Params, repeats: int) -> Params:
        period = len(blocks)
        return {
            f"layers_{repeat * period + index}": jax.tree.map(lambda leaf: leaf[repeat], blocks[f"layers_{index}"])
            for repeat in range(repeats)
            for index in range(period)
        }

    result = dict(scanned)
    for name in ("encoder", "decoder"):
        result[name] = scanned[name] | {"stack": {"blocks": stack(scanned[name]["stack"]["blocks"], repeats=2)}}
    return result


def assert_close(ours: Any, reference: Any, rtol: float = 1e-5) -> None:
    """Each array within rounding of its own largest entry."""

    def compare(path: jax.tree_util.KeyPath, one: Array, other: Array) -> None:
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, reference)


def test_scanned_parameters_have_a_leading_axis_over_the_periods() -> None:
    written, scanned = Model(CONFIG), Model(SCANNED)
    # The encoder's period is a dense and a sparse block; the decoder's a sparse block alone.
    assert set(scanned.axes["encoder"]["stack"]["blocks"]) == {"layers_0", "layers_1"}
    assert set(scanned.axes["decoder"]["stack"]["blocks"]) == {"layers_0"}
    for name in ("encoder", "decoder"):
        block = scanned.axes[name]["stack"]["blocks"]["layers_0"]
        reference = written.axes[name]["stack"]["blocks"]["layers_0"]
        assert jax.tree.structure(block) == jax.tree.structure(reference)
        is_axes = functools.partial(lambda leaf: isinstance(leaf, tuple))
        pairs = zip(
            jax.tree.leaves(block, is_leaf=is_axes), jax.tree.leaves(reference, is_leaf=is_axes), strict=True
        )
        assert all(axes == ("layers", *plain) for axes, plain in pairs)


def test_scanned_and_written_out_start_from_the_same_numbers() -> None:
    assert_same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    assert_same(written_out(parameters(SCANNED)), parameters(CONFIG))


def test_the_batch_has_drops() -> None:
    _, metrics = outcome(CONFIG)
    assert all((np.asarray(stats.dropped) > 0).any() for stats in metrics["router"].values())


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_written_out_in_losses_statistics_and_gradients(remat: bool) -> None:
    gradients, metrics = outcome(dataclasses.replace(SCANNED, remat=remat))
    reference, reference_metrics = outcome(CONFIG)
    assert_close(metrics, reference_metrics)
    assert_close(written_out(gradients), reference)


def test_recomputed_equals_stored() -> None:
    gradients, metrics = outcome(dataclasses.replace(CONFIG, remat=True))
    reference, reference_metrics = outcome(CONFIG)
    assert_close(metrics, reference_metrics)
    assert_close(gradients, reference)
