"""What dropout zeroes, and what it shares."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.layers.dropout import dropout, row_dropout_mask, split_rng
from switch_t5.layers.moe import layer_keys


def test_dropout_is_the_identity_without_a_key_and_at_rate_zero() -> None:
    x = jnp.arange(6.0).reshape(1, 2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_draws_once_for_all_positions_of_a_sequence() -> None:
    result = np.asarray(dropout(jnp.ones((4, 5, 64)), 0.25, jax.random.key(0)))
    np.testing.assert_array_equal(result, np.broadcast_to(result[:, :1], result.shape))
    np.testing.assert_array_equal(np.unique(result), np.asarray([0, 1 / 0.75], np.float32))
    # Sequences and features draw on their own.
    assert (result[0] != result[1]).any()
    assert (result[0, 0] != result[0, 0, 0]).any()


def test_dropout_draws_each_entry_where_nothing_is_shared() -> None:
    result = np.asarray(dropout(jnp.ones((2, 64, 8)), 0.5, jax.random.key(1), broadcast_dim=None))
    assert (result != result[:, :1]).any()


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    result = np.asarray(dropout(jnp.ones((400, 1, 500)), 0.1, jax.random.key(2)))
    # The standard error of the share dropped is below 0.001.
    np.testing.assert_allclose((result == 0).mean(), 0.1, atol=0.004)
    np.testing.assert_allclose(result.mean(), 1.0, atol=0.004)


@pytest.mark.parametrize("rate", [0.4, 0.05])
@pytest.mark.parametrize(("width", "kind"), [(500, "threefry2x32"), (501, "rbg"), (502, "unsafe_rbg"), (503, "rbg")])
def test_rows_drop_at_their_rate_each_by_its_number_alone(rate: float, width: int, kind: str) -> None:
    def kept(*numbers: int) -> np.ndarray:
        key = jax.random.key(3, impl=kind)
        return np.asarray(row_dropout_mask(jnp.asarray(numbers), width, rate, key, columns="expert_mlp"))

    keep = kept(*range(400))
    assert keep.shape == (400, width)
    # Of 200,000 draws the standard error is below 0.0012; of 50,000 pairs of one hash or of two beside it, 0.0022.
    np.testing.assert_allclose(1 - keep.mean(), rate, atol=0.005)
    eights = keep[:, : width - width % 8].reshape(400, -1, 8)
    for one, other in itertools.combinations(range(8), 2):
        both = eights[..., one] & eights[..., other]
        np.testing.assert_allclose(both.mean(), (1 - rate) ** 2, atol=0.011)
    np.testing.assert_allclose(keep.mean(axis=0), 1 - rate, atol=0.12)  # Five times a column's standard error.
    np.testing.assert_array_equal(kept(399, 7), keep[[399, 7]])
    assert len(np.unique(keep, axis=0)) == 400


def test_dropout_keeps_the_dtype() -> None:
    assert dropout(jnp.ones((1, 2, 3), jnp.bfloat16), 0.5, jax.random.key(0)).dtype == jnp.bfloat16


def test_splitting_no_key_gives_no_keys_and_splitting_one_gives_distinct_ones() -> None:
    assert split_rng(None, 3) == [None, None, None]
    keys = split_rng(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys if key is not None}) == 3


def test_no_key_of_a_sparse_layer_is_that_of_one_of_its_rows() -> None:
    """Rows fold their number into the key of the experts."""
    keys = layer_keys(jax.random.key(0))
    assert keys.experts is not None
    rows = [jax.random.fold_in(keys.experts, row) for row in range(8)]
    drawn = {tuple(jax.random.key_data(key).tolist()) for key in (*keys, *rows) if key is not None}
    assert len(drawn) == len(keys) + len(rows)
