"""Ways of computing one step that must agree: microbatches of several groups, another dispatch, a scan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.training.losses import LossConfig
from switch_t5.training.optimizers import sgd
from switch_t5.training.state import TrainState
from switch_t5.training.step import train_step

CONFIG = TransformerConfig(
    vocab_size=64,
    emb_dim=16,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    # Two sequences a group, and room for few: some tokens are dropped, so that order and grouping matter.
    moe=MoEConfig(num_experts=4, group_size=32, train_capacity_factor=1.0, jitter_noise=0.0),
)
LOSS = LossConfig(z_loss=1e-2, load_balance_loss_weight=0.1, router_z_loss_weight=0.1, label_smoothing=0.1)


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Eight packed sequences with unequal padding, so that the parts of the batch weigh differently."""
    random = np.random.default_rng(0)
    features: dict[str, Any] = {}
    for stack, length in (("encoder", 16), ("decoder", 12)):
        real = np.arange(length) < random.integers(3, length + 1, 8)[:, None]
        names = ["encoder_input_tokens"] if stack == "encoder" else ["decoder_input_tokens", "decoder_target_tokens"]
        for name in names:
            features[name] = np.where(real, random.integers(1, 64, real.shape), 0).astype(np.int32)
        features[f"{stack}_segment_ids"] = np.where(real, 1 + (np.arange(length) > length // 2), 0).astype(np.int32)
    features["decoder_loss_weights"] = (features["decoder_target_tokens"] > 0).astype(np.float32)
    return {name: jnp.asarray(value) for name, value in features.items()}


def _step(config: TransformerConfig, batch: Any, *, microbatches: int = 1) -> Any:
    """Parameters' gradient (by a step of size 1) and metrics."""
    model = Model(config)
    optimizer = sgd(1.0)(model.axes)
    params = model.init(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=LOSS, microbatches=microbatches)
    after, metrics = jax.jit(step)(state, batch)
    return jax.tree.map(jnp.subtract, params, after.params), metrics


def _assert_close(one: Any, other: Any, atol: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), one, other)


def test_microbatches_give_the_whole_batchs_gradients_and_metrics(batch: Any) -> None:
    gradients, metrics = _step(CONFIG, batch)
    parts, part_metrics = _step(CONFIG, batch, microbatches=2)
    assert float(metrics["router"]["encoder"].dropped.sum()) > 0
    _assert_close(metrics, part_metrics, atol=1e-4)
    _assert_close(gradients, parts)


def test_gathered_and_one_hot_dispatch_give_the_same_step(batch: Any) -> None:
    assert CONFIG.moe is not None
    einsum = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, dispatch="einsum"))
    one, other = _step(CONFIG, batch), _step(einsum, batch)
    _assert_close(one, other)


@pytest.mark.slow
def test_scanned_and_written_out_layers_give_the_same_step(batch: Any) -> None:
    deep = dataclasses.replace(CONFIG, num_encoder_layers=4, num_decoder_layers=4)
    gradients, metrics = _step(deep, batch)
    scanned, scanned_metrics = _step(dataclasses.replace(deep, scan_layers=True), batch)
    _assert_close(metrics, scanned_metrics)
    for stack in ("encoder", "decoder"):
        blocks = gradients[stack]["stack"]["blocks"]
        for place in (0, 1):
            both = (blocks[f"layers_{place}"], blocks[f"layers_{place + 2}"])
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
            _assert_close(stacked, scanned[stack]["stack"]["blocks"][f"layers_{place}"])
