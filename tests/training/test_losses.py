"""The loss and its derivative in float64, and what it is divided by."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import ConfigError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.transformer import ModelStats
from switch_t5.routing.balance import RouterStats
from switch_t5.training.losses import LossConfig, batch_totals, cross_entropy, router_losses
from switch_t5.types import Array

BATCH, LENGTH, FEATURES, VOCAB = 2, 5, 6, 11


def arrays(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(BATCH, LENGTH, FEATURES))
    kernel = random.normal(size=(VOCAB, FEATURES))
    targets = random.integers(0, VOCAB, (BATCH, LENGTH))
    weights = np.asarray([[1, 1, 0.5, 0, 1], [1, 2, 0, 0, 0]])
    return hidden.astype(dtype), kernel.astype(dtype), targets, weights.astype(dtype)


def naive(
    hidden: Array, kernel: Array, targets: Array, weights: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    """The definition: cross-entropy with the smoothed target less that target's entropy."""
    log_probs = jax.nn.log_softmax(hidden @ kernel.T)
    is_target = targets[..., None] == jnp.arange(VOCAB)
    smoothed = jnp.where(is_target, 1 - label_smoothing, label_smoothing / (VOCAB - 1))
    entropy = -jnp.sum(jnp.where(smoothed > 0, smoothed * jnp.log(jnp.maximum(smoothed, 1e-300)), 0), -1)
    loss = -jnp.sum(smoothed * log_probs, -1) - entropy
    log_z = jax.scipy.special.logsumexp(hidden @ kernel.T, axis=-1)
    return jnp.sum(loss * weights), z_loss * jnp.sum(log_z**2 * weights)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_equals_the_float64_definition_in_value_and_gradient(
    label_smoothing: float, z_loss: float
) -> None:
    ours_function = functools.partial(cross_entropy, label_smoothing=label_smoothing, z_loss=z_loss)
    naive_function = functools.partial(naive, label_smoothing=label_smoothing, z_loss=z_loss)

    def value_and_gradient(function: Any, hidden: Any, kernel: Any, targets: Any, weights: Any) -> Any:
        def weighted(hidden: Array, kernel: Array) -> tuple[Array, Any]:
            nats, z = function(hidden, kernel, targets, weights)
            # Both parts have cotangents of their own.
            return 0.7 * nats + 1.3 * z, (nats, z)

        return jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(hidden, kernel)

    gradients, parts = value_and_gradient(ours_function, *arrays())
    with jax.enable_x64(True):
        expected, expected_parts = jax.device_get(value_and_gradient(naive_function, *arrays(np.float64)))
    assert expected[0].dtype == np.float64
    np.testing.assert_allclose(parts, expected_parts, rtol=2e-6, atol=1e-7)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-5, atol=2e-6)


def test_cross_entropy_by_hand() -> None:
    """Logits are the logarithms of (1/2, 1/4, 1/4), so that the log-sum-exp is 0; then 1 more."""
    hidden = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]])) + jnp.asarray([0.0, 1.0])[:, None]
    targets, weights = jnp.asarray([[0, 2]]), jnp.asarray([[1.0, 3.0]])
    nats, z_loss = cross_entropy(hidden, jnp.eye(3), targets, weights, z_loss=0.01)
    np.testing.assert_allclose(nats, math.log(2) + 3 * math.log(4), rtol=1e-6)
    np.testing.assert_allclose(z_loss, 0.01 * 3, rtol=1e-5)


def test_a_perfect_prediction_of_the_smoothed_target_costs_nothing() -> None:
    hidden = jnp.log(jnp.asarray([[[0.15, 0.7, 0.15]]]))
    nats, _ = cross_entropy(hidden, jnp.eye(3), jnp.asarray([[1]]), jnp.ones((1, 1)), label_smoothing=0.3)
    np.testing.assert_allclose(nats, 0, atol=1e-6)
    # Certainty costs more than the right doubt.
    certain = jnp.log(jnp.asarray([[[1e-6, 1 - 2e-6, 1e-6]]]))
    worse, _ = cross_entropy(certain, jnp.eye(3), jnp.asarray([[1]]), jnp.ones((1, 1)), label_smoothing=0.3)
    assert worse > 1


def test_a_token_of_weight_zero_adds_nothing_and_gets_exactly_no_gradient() -> None:
    hidden, kernel, targets, weights = arrays()
    ours = functools.partial(cross_entropy, label_smoothing=0.1, z_loss=0.1)
    gradient = jax.grad(lambda h: sum(ours(h, kernel, targets, weights)))(hidden)
    np.testing.assert_array_equal(gradient[weights == 0], 0)
    other = np.where(weights == 0, (targets + 1) % VOCAB, targets)
    np.testing.assert_array_equal(ours(hidden, kernel, targets, weights), ours(hidden, kernel, other, weights))


def test_a_bfloat16_hidden_state_has_a_float32_loss_and_a_bfloat16_gradient() -> None:
    hidden, kernel, targets, weights = arrays()
    low = jnp.asarray(hidden, jnp.bfloat16)
    nats, gradient = jax.value_and_grad(lambda h: cross_entropy(h, jnp.asarray(kernel), targets, weights)[0])(low)
    assert nats.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    exact, _ = cross_entropy(low.astype(jnp.float32), jnp.asarray(kernel), targets, weights)
    np.testing.assert_allclose(nats, exact, rtol=1e-6)


def test_very_large_logits_do_not_overflow() -> None:
    nats, _ = cross_entropy(
        jnp.full((1, 1, 1), 1e4), jnp.asarray([[1.0], [-1.0]]), jnp.asarray([[1]]), jnp.ones((1, 1))
    )
    np.testing.assert_allclose(nats, 2e4, rtol=1e-6)


DENSE = TransformerConfig(8, 4, 1, 4, 4, 2, 2)
BATCH_OF_COUNTS = {
    "encoder_input_tokens": jnp.asarray([[3, 4, 5, 0], [6, 0, 0, 0]]),
    "decoder_target_tokens": jnp.asarray([[3, 4, 0], [5, 6, 1]]),
    "decoder_loss_weights": jnp.asarray([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]]),
}


@pytest.mark.parametrize(
    ("factor", "normalizer"),
    [("num_real_target_tokens", 3.5), ("num_total_target_tokens", 6.0), (233472.0, 233472.0), (2, 2.0)],
)
def test_the_normalizer_is_what_the_configuration_says(factor: Any, normalizer: float) -> None:
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(loss_normalizing_factor=factor), DENSE)
    assert float(totals.normalizer) == normalizer
    assert totals.normalizer.dtype == jnp.float32


def test_totals_count_what_the_routers_see_and_never_divide_by_zero() -> None:
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE)
    assert (float(totals.encoder), float(totals.decoder)) == (4, 5)
    zeros = {name: jnp.zeros_like(value) for name, value in BATCH_OF_COUNTS.items()}
    nothing = batch_totals(zeros, LossConfig(), DENSE)
    assert (float(nothing.normalizer), float(nothing.encoder), float(nothing.decoder)) == (1, 1, 1)


# Of eight positions of the encoder four are real, of six of the decoder five.
@pytest.mark.parametrize(
    ("padding", "routed", "counted"),
    [("ignored", (4, 5), (4, 5)), ("counted", (4, 5), (8, 6)), ("zeroed", (8, 6), (8, 6)), ("routed", (8, 6), (8, 6))],
)
def test_totals_count_padding_where_the_layers_do(padding: Any, routed: tuple[int, int], counted: tuple[int, int]):
    model = dataclasses.replace(DENSE, moe=MoEConfig(2, padding=padding))
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), model)
    assert (float(totals.encoder), float(totals.decoder)) == routed
    assert (float(totals.encoder_counted), float(totals.decoder_counted)) == counted


def test_each_stack_counts_padding_as_its_own_layers_do() -> None:
    model = dataclasses.replace(DENSE, moe=MoEConfig(2, padding="routed"), decoder_moe=MoEConfig(2))
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), model)
    assert (float(totals.encoder), float(totals.decoder)) == (8, 5)


def stack_stats(balance: list[float], z_loss: list[float]) -> RouterStats:
    layers = len(balance)
    zeros = jnp.zeros(layers)
    return RouterStats(
        tokens=zeros,
        counted=zeros,
        load_balance_loss=jnp.asarray(balance),
        router_z_loss=jnp.asarray(z_loss),
        importance_loss=3 * jnp.asarray(balance),
        load_loss=5 * jnp.asarray(z_loss),
        expert_load=jnp.zeros((layers, 2)),
        dropped=zeros,
        router_entropy=zeros,
        router_confidence=zeros,
        nonfinite=zeros,
    )


def test_the_load_balance_loss_is_over_the_tokens_it_counts() -> None:
    stats = ModelStats(stack_stats([8.0], [2.0]), None)
    model = dataclasses.replace(DENSE, moe=MoEConfig(2, padding="counted"))
    _, losses = router_losses(stats, batch_totals(BATCH_OF_COUNTS, LossConfig(), model), LossConfig())
    np.testing.assert_allclose(losses["load_balance_loss"], 8 / 8)
    np.testing.assert_allclose(losses["router_z_loss"], 2 / 4)


def test_stacks_may_be_averaged_each_and_added() -> None:
    stats = ModelStats(stack_stats([8.0, 4.0], [2.0, 6.0]), stack_stats([10.0], [5.0]))
    config = LossConfig(sparse_layer_reduction="stack_mean")
    _, losses = router_losses(stats, batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE), config)
    np.testing.assert_allclose(losses["load_balance_loss"], 12 / 4 / 2 + 10 / 5, rtol=1e-6)
    np.testing.assert_allclose(losses["router_z_loss"], 8 / 4 / 2 + 5 / 5, rtol=1e-6)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1 / 3), ("sum", 1.0)])
def test_router_losses_are_over_their_stacks_tokens_and_reduced_over_sparse_layers(
    reduction: Any, scale: float
) -> None:
    stats = ModelStats(stack_stats([8.0, 4.0], [2.0, 6.0]), stack_stats([10.0], [5.0]))
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE)
    weights = {"importance_loss_weight": 0.1, "load_loss_weight": 0.1}
    _, losses = router_losses(stats, totals, LossConfig(sparse_layer_reduction=reduction, **weights))
    np.testing.assert_allclose(losses["load_balance_loss"], scale * (12 / 4 + 10 / 5), rtol=1e-6)
    np.testing.assert_allclose(losses["router_z_loss"], scale * (8 / 4 + 5 / 5), rtol=1e-6)
    np.testing.assert_allclose(losses["importance_loss"], 3 * losses["load_balance_loss"], rtol=1e-6)
    np.testing.assert_allclose(losses["load_loss"], 5 * losses["router_z_loss"], rtol=1e-6)


@pytest.mark.parametrize(("weight", "decoders", "expected"), [(0.1, None, 0.5), (0.1, 0.0, 0.3), (0.0, 0.1, 0.2)])
def test_the_decoders_balance_may_weigh_something_else(weight: float, decoders: float | None, expected: float) -> None:
    stats = ModelStats(stack_stats([8.0, 4.0], [2.0, 6.0]), stack_stats([10.0], [5.0]))
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE)
    config = LossConfig(load_balance_loss_weight=weight, decoder_load_balance_loss_weight=decoders)
    weighted, losses = router_losses(stats, totals, config)
    np.testing.assert_allclose(weighted, expected, rtol=1e-6)
    np.testing.assert_allclose(losses["load_balance_loss"], 12 / 4 + 10 / 5, rtol=1e-6)


def test_a_model_sparse_in_one_stack_alone_averages_over_that_stack() -> None:
    stats = ModelStats(None, stack_stats([10.0, 20.0], [5.0, 5.0]))
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE)
    _, losses = router_losses(stats, totals, LossConfig(sparse_layer_reduction="mean"))
    np.testing.assert_allclose(losses["load_balance_loss"], 30 / 5 / 2, rtol=1e-6)


def test_a_dense_model_has_no_router_losses() -> None:
    totals = batch_totals(BATCH_OF_COUNTS, LossConfig(), DENSE)
    weighted, losses = router_losses(ModelStats(None, None), totals, LossConfig())
    assert (float(weighted), losses) == (0, {})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_smoothing", 1.0, "must be in [0, 1), got 1.0."),
        ("label_smoothing", -0.1, "must be in [0, 1), got -0.1."),
        ("z_loss", -1.0, "must not be negative, got -1.0."),
        ("load_balance_loss_weight", -1.0, "must not be negative, got -1.0."),
        ("router_z_loss_weight", -1.0, "must not be negative, got -1.0."),
        ("loss_normalizing_factor", 0.0, "must be above 0, got 0.0."),
        ("sparse_layer_reduction", "max", "must be one of 'mean', 'sum', 'stack_mean', got 'max'."),
        ("z_loss", "1e-4", "must be a number, got '1e-4'."),
        (
            "loss_normalizing_factor",
            "num_tokens",
            "must be a number or one of 'num_real_target_tokens', 'num_total_target_tokens', got 'num_tokens'. "
            "Did you mean 'num_real_target_tokens'?",
        ),
    ],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LossConfig(**{field: value})
    assert str(caught.value) == f"LossConfig.{field} {message}"
