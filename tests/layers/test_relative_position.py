"""Buckets of distances in exact integers, and matrices filled along their diagonals."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.relative_position import (
    RelativePositionBias,
    along_diagonals,
    relative_position_bucket,
)

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "huggingface" / "switch_io.npz"


def buckets(relative: list[int] | np.ndarray, *, bidirectional: bool) -> np.ndarray:
    return relative_position_bucket(np.asarray(relative), bidirectional=bidirectional, num_buckets=32, max_distance=128)


def exact_bucket(relative: int, *, bidirectional: bool) -> int:
    """The same in integers: distance / exact >= (128 / exact) ** (k / steps), raised to a power without roots."""
    half = 16 if bidirectional else 32
    offset = half if bidirectional and relative > 0 else 0
    distance = abs(relative) if bidirectional else max(-relative, 0)
    exact = half // 2
    if distance < exact:
        return offset + distance
    steps = half - exact
    reached = [k for k in range(steps) if distance**steps >= exact**steps * (128 // exact) ** k]
    return offset + exact + max(reached)


def test_buckets_by_hand_in_the_encoder() -> None:
    relative = [0, -1, -7, -8, -11, -12, -15, -16, -22, -23, -31, -32, -63, -64, -90, -91, -127, -128, -10_000]
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 13, 14, 14, 15, 15, 15, 15]
    np.testing.assert_array_equal(buckets(relative, bidirectional=True), expected)
    # Keys after the query mirror those before it, 16 buckets further.
    mirrored = [-distance for distance in relative[1:]]
    np.testing.assert_array_equal(buckets(mirrored, bidirectional=True), np.asarray(expected[1:]) + 16)


def test_buckets_by_hand_in_the_decoder() -> None:
    relative = [0, 1, 100, -1, -15, -16, -18, -19, -20, -21, -112, -113, -128, -10_000]
    expected = [0, 0, 0, 1, 15, 16, 16, 17, 17, 18, 30, 31, 31, 31]
    np.testing.assert_array_equal(buckets(relative, bidirectional=False), expected)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_exact_integer_arithmetic(bidirectional: bool) -> None:
    relative = np.arange(-600, 601)
    expected = [exact_bucket(int(r), bidirectional=bidirectional) for r in relative]
    result = buckets(relative, bidirectional=bidirectional)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parity
@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"there are no golden bucket tables at {GOLDEN}")
def test_buckets_are_those_of_hugging_face() -> None:
    with np.load(GOLDEN) as golden:
        relative = golden["relpos"]
        np.testing.assert_array_equal(buckets(relative, bidirectional=True), golden["relpos_bucket_bidir"])
        np.testing.assert_array_equal(buckets(relative, bidirectional=False), golden["relpos_bucket_causal"])


@pytest.mark.parametrize(("rows", "columns", "period"), [(4, 4, 8), (3, 5, 8), (5, 2, 7), (1, 3, 4), (4, 3, 11)])
def test_along_diagonals_fills_by_distance_and_its_gradient_sums_them(rows: int, columns: int, period: int) -> None:
    random = np.random.default_rng(rows)
    values = jnp.asarray(random.normal(size=(3, 2, period)), jnp.float32)
    weights = jnp.asarray(random.normal(size=(3, 2, rows, columns)), jnp.float32)
    index = (np.arange(columns) - np.arange(rows)[:, None]) % period

    filled, pull = jax.vjp(lambda v: along_diagonals(v, rows, columns), values)
    looked_up, pull_looked_up = jax.vjp(lambda v: v[..., index], values)
    np.testing.assert_array_equal(filled, looked_up)
    np.testing.assert_allclose(pull(weights)[0], pull_looked_up(weights)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 150)])
def test_the_bias_of_a_pair_is_its_buckets_entry(bidirectional: bool, queries: int, keys: int) -> None:
    bias = RelativePositionBias(3, 32, 128, bidirectional, "paper", rngs=nnx.Rngs(0))
    table = np.asarray(bias.embedding[...])
    relative = np.arange(keys) - np.arange(queries)[:, None]
    expected = table[:, buckets(relative, bidirectional=bidirectional)]
    result = bias(queries, keys, jnp.dtype(jnp.float32), shards=2)
    assert result.shape == (2, 3, queries, keys)
    for copy in result:
        np.testing.assert_array_equal(copy, expected)
