"""How weights start: deviations and bounds, by convention."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from switch_t5.layers.initializers import Initialization, Kind, initializer
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model

TRUNCATED = 0.87962566
"""What is left of a normal's deviation where it is truncated at two of them."""


def draw(kind: Kind, convention: Initialization, **fans: int) -> np.ndarray:
    return np.asarray(initializer(kind, convention, **fans)(jax.random.key(0), (400, 500), np.float32))


@pytest.mark.parametrize("kind", ["attention", "mlp", "expert", "router", "logits", "relpos"])
def test_the_paper_truncates_a_normal_of_variance_a_tenth_over_fan_in_at_two_deviations(kind: Kind) -> None:
    values, sigma = draw(kind, "paper", fan_in=250), math.sqrt(0.1 / 250)
    assert 1.99 * sigma < np.abs(values).max() <= 2 * sigma * (1 + 1e-6)
    np.testing.assert_allclose(values.std(), TRUNCATED * sigma, rtol=0.01)
    assert abs(values.mean()) < 0.01 * sigma


@pytest.mark.parametrize("convention", ["paper", "t5x", "t5x_switch"])
def test_the_query_carries_the_scale_that_attention_leaves_out(convention: Initialization) -> None:
    query = draw("query", convention, fan_in=250, head_dim=64)
    np.testing.assert_allclose(query, draw("attention", convention, fan_in=250) / 8, rtol=1e-6)


@pytest.mark.parametrize("convention", ["paper", "t5x", "t5x_switch"])
def test_the_embedding_is_a_unit_normal(convention: Initialization) -> None:
    values = draw("embedding", convention, fan_in=1)
    np.testing.assert_allclose(values.std(), 1.0, rtol=0.01)
    assert np.abs(values).max() > 3.5


@pytest.mark.parametrize(
    ("kind", "deviation", "bound"),
    [
        ("attention", math.sqrt(1 / 250), None),
        ("expert", math.sqrt(1 / 250), None),
        ("router", 0.02, None),
        ("mlp", math.sqrt(1 / 250), 2 * math.sqrt(1 / 250) / TRUNCATED),
        ("logits", math.sqrt(1 / 250), 2 * math.sqrt(1 / 250) / TRUNCATED),
        ("relpos", math.sqrt(2 / (250 + 32)), math.sqrt(6 / (250 + 32))),
    ],
)
def test_the_released_models_conventions(kind: Kind, deviation: float, bound: float | None) -> None:
    values = draw(kind, "t5x", fan_in=250, fan_out=32)
    np.testing.assert_allclose(values.std(), deviation, rtol=0.01)
    largest = np.abs(values).max()
    if bound is None:
        assert largest > 3.5 * deviation
    else:
        assert 0.99 * bound < largest <= bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["query", "attention", "mlp", "expert", "logits", "relpos"])
def test_the_released_switch_models_start_with_a_tenth_of_the_dense_ones_variance(kind: Kind) -> None:
    fans = {"fan_in": 250, "fan_out": 32, "head_dim": 64}
    found, expected = draw(kind, "t5x_switch", **fans), math.sqrt(0.1) * draw(kind, "t5x", **fans)
    # Draws near zero are differences of numbers near one, which programs round each in its way.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())


def test_the_released_switch_models_router_and_embedding_start_as_the_dense_ones() -> None:
    for kind in ("router", "embedding"):
        np.testing.assert_array_equal(draw(kind, "t5x_switch", fan_in=250), draw(kind, "t5x", fan_in=250))


def test_every_matrix_of_the_papers_model_starts_by_its_own_fan_in() -> None:
    config = TransformerConfig(
        vocab_size=200,
        emb_dim=64,
        num_heads=4,
        head_dim=32,
        mlp_dim=256,
        num_encoder_layers=2,
        num_decoder_layers=2,
        tied_logits=False,
        moe=MoEConfig(8),
    )
    params = jax.jit(Model(config).init)(jax.random.key(0))
    block = params["decoder"]["stack"]["blocks"]["layers_1"]
    attention = {"query": 64 * 32, "key": 64, "value": 64, "out": 4 * 32}
    fan_in = {
        **{("self_attention", name): fan for name, fan in attention.items()},
        **{("cross_attention", name): fan for name, fan in attention.items()},
        ("mlp", "router"): 64,
        ("mlp", "experts", "wi"): 64,
        ("mlp", "experts", "wo"): 256,
    }
    dense = params["encoder"]["stack"]["blocks"]["layers_0"]["mlp"]
    cases = [(dense["wi"], 64), (dense["wo"], 256), (params["logits_dense"]["kernel"], 64)]
    for path, fan in fan_in.items():
        leaf = block
        for name in path:
            leaf = leaf[name]
        cases.append((leaf, fan))
    for leaf, fan in cases:
        sigma = math.sqrt(0.1 / fan)
        assert np.abs(leaf).max() <= 2 * sigma * (1 + 1e-6)
        np.testing.assert_allclose(np.asarray(leaf).std(), TRUNCATED * sigma, rtol=0.08)
    np.testing.assert_array_equal(block["mlp_norm"]["scale"], np.ones(64))


def test_experts_start_apart() -> None:
    values = np.asarray(initializer("expert", "paper", fan_in=8)(jax.random.key(0), (4, 8, 8), np.float32))
    assert len(np.unique(values[:, 0, 0])) == 4
