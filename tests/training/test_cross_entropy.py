"""The cross-entropy and its own derivative against float64 arithmetic."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.training.losses import LossConfig, batch_totals, cross_entropy

B, L, D, V = 2, 5, 7, 11


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """A decoder's output, an output kernel, targets, and weights with padding."""
    random = np.random.default_rng(0)
    weights = np.ones((B, L), np.float32)
    weights[0, 3:] = 0
    return {
        "hidden": random.standard_normal((B, L, D), np.float32),
        "kernel": random.standard_normal((V, D), np.float32),
        "targets": random.integers(0, V, (B, L)),
        "weights": weights,
    }


def _reference(arrays: Any, label_smoothing: float, z_loss: float) -> tuple[float, float]:
    nats = z = 0.0
    for b in range(B):
        for position in range(L):
            logits = arrays["kernel"].astype(np.float64) @ arrays["hidden"][b, position].astype(np.float64)
            log_z = np.log(np.sum(np.exp(logits)))
            wanted = np.full(V, label_smoothing / (V - 1))
            wanted[arrays["targets"][b, position]] = 1 - label_smoothing
            entropy = -sum(p * np.log(p) for p in wanted if p > 0)
            nats += arrays["weights"][b, position] * (np.sum(wanted * (log_z - logits)) - entropy)
            z += arrays["weights"][b, position] * z_loss * log_z**2
    return nats, z


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)])
def test_sums_are_those_of_float64(arrays: Any, label_smoothing: float, z_loss: float) -> None:
    sums = cross_entropy(*arrays.values(), label_smoothing=label_smoothing, z_loss=z_loss)
    np.testing.assert_allclose(sums, _reference(arrays, label_smoothing, z_loss), rtol=1e-5)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.2, 1e-2)])
@pytest.mark.parametrize("name", ["hidden", "kernel"])
def test_derivatives_are_those_of_float64_differences(
    arrays: Any, name: str, label_smoothing: float, z_loss: float
) -> None:
    def weighted(value: Any) -> Any:
        given = {**{key: jnp.asarray(array) for key, array in arrays.items()}, name: value}
        nats, z = cross_entropy(*given.values(), label_smoothing=label_smoothing, z_loss=z_loss)
        return 2 * nats + 3 * z

    gradient = np.asarray(jax.grad(weighted)(jnp.asarray(arrays[name])))
    for index in [(0, 0, 0), (1, 4, 6), (0, 4, 1)] if name == "hidden" else [(0, 0), (10, 6), (3, 2)]:
        moved = []
        for delta in (1e-5, -1e-5):
            value = arrays[name].astype(np.float64)
            value[index] += delta
            nats, z = _reference({**arrays, name: value}, label_smoothing, z_loss)
            moved.append(2 * nats + 3 * z)
        np.testing.assert_allclose(gradient[index], (moved[0] - moved[1]) / 2e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("factor", "normalizer"), [("num_real_target_tokens", 3.0), ("num_total_target_tokens", 8.0), (5.0, 5.0)]
)
def test_the_normalizing_factor_is_what_it_is_called(factor: Any, normalizer: float) -> None:
    targets = jnp.array([[4, 5, 0, 0], [6, 0, 0, 0]])
    batch = {
        "encoder_input_tokens": jnp.array([[1, 2, 0], [3, 0, 0]]),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(jnp.float32),
    }
    totals = batch_totals(batch, LossConfig(loss_normalizing_factor=factor))
    assert (float(totals.normalizer), float(totals.encoder), float(totals.decoder)) == (normalizer, 3.0, 3.0)
