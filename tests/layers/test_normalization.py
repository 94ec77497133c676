"""Root-mean-square normalization against its formula."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.normalization import RMSNorm
from switch_t5.types import Array


def normalized(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    exact = x.astype(np.float64)
    return exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_norm_divides_by_the_root_mean_square_and_subtracts_no_mean() -> None:
    norm = RMSNorm(2, rngs=nnx.Rngs(0))
    # The mean square of (1, 7) is 25.
    np.testing.assert_allclose(norm(jnp.asarray([[[1.0, 7.0]]])), [[[0.2, 1.4]]], rtol=1e-6)


def test_norm_equals_the_float64_formula_for_large_and_small_inputs() -> None:
    random = np.random.default_rng(0)
    x = (random.normal(size=(2, 3, 8)) * [[[1e4], [1.0], [1e-3]]]).astype(np.float32)
    norm = RMSNorm(8, rngs=nnx.Rngs(0))
    scale = random.normal(size=8).astype(np.float32)
    norm.scale[...] = jnp.asarray(scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), normalized(x, scale), rtol=2e-6)


def test_norm_of_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 64)), jnp.bfloat16)
    norm = RMSNorm(64, rngs=nnx.Rngs(0))
    result = norm(x)
    assert result.dtype == jnp.bfloat16
    expected = normalized(np.asarray(x, np.float32), np.ones(64)).astype(np.float32)
    np.testing.assert_array_equal(result, jnp.asarray(expected).astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_float64_formula(dtype: str) -> None:
    random = np.random.default_rng(2)
    x = jnp.asarray(random.normal(size=(2, 3, 8)) * [[[10.0], [1.0], [1e-3]]], dtype)
    norm = RMSNorm(8, rngs=nnx.Rngs(0))
    scale = jnp.asarray(random.normal(size=8), jnp.float32)
    cotangent = jnp.asarray(random.normal(size=x.shape), dtype)
    split: Any = nnx.split(norm)
    graph, params = split

    def ours(x: Array, scale: Array) -> Array:
        params["scale"] = params["scale"].replace(scale)
        module: Any = nnx.merge(graph, params)
        return module(x)

    def formula(x: Array, scale: Array) -> Array:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    found = jax.vjp(ours, x, scale)[1](cotangent)
    assert [one.dtype for one in found] == [x.dtype, jnp.float32]
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(one, np.float64)) for one in (x, scale, cotangent)]
        expected = jax.device_get(jax.vjp(formula, *exact[:2])[1](exact[2]))
    # The result is rounded once to the dtype of x; eps of bfloat16 is 2**-8.
    rtol = 2e-5 if dtype == "float32" else 2**-8
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=rtol, atol=rtol * np.abs(other).max() / 10)


def test_norm_of_zeros_is_zeros() -> None:
    np.testing.assert_array_equal(RMSNorm(4, rngs=nnx.Rngs(0))(jnp.zeros((1, 1, 4))), np.zeros((1, 1, 4)))
