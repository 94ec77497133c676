"""T5's relative position bias: one learned number per head and bucket of distances.

Source: Raffel et al. 2020, section 2.1.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain
from switch_t5.types import Array


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Sorts distances into buckets: exact up to half of them, then logarithmic up to ``max_distance``.

    Args:
      relative_position: integers, the key's position less the query's.
      bidirectional: half of the buckets are for keys after the query (the encoder); otherwise such keys,
        which a decoder never sees, share bucket 0.
      num_buckets: buckets in all.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 bucket indices of the same shape.
    """
    offset = np.zeros_like(relative_position)
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0) * num_buckets
        distance = np.abs(relative_position)
    else:
        distance = np.maximum(-relative_position, 0)
    exact = num_buckets // 2
    # float32, and an epsilon against a distance that is a bucket's very edge, as every T5 has it.
    ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
    logarithmic = exact + (np.log(ratio) / math.log(max_distance / exact) * (num_buckets - exact)).astype(np.int32)
    return (offset + np.where(distance < exact, distance, np.minimum(logarithmic, num_buckets - 1))).astype(np.int32)


class RelativePositionBias(nnx.Module):
    """The bias of one stack, shared by its layers, or of one layer."""

    def __init__(
        self,
        num_heads: int,
        num_buckets: int,
        max_distance: int,
        bidirectional: bool,
        convention: Initialization,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        init = initializer("relpos", convention, fan_in=num_heads, fan_out=num_buckets)
        self.embedding = parameter(rngs, init, (num_heads, num_buckets), ("heads", "relpos_buckets"))

    def __call__(self, query_length: int, key_length: int, dtype: jnp.dtype, *, shards: int = 1) -> Array:
        """The bias of every pair of positions.

        Args:
          query_length: queries.
          key_length: keys.
          dtype: of the result.
          shards: of the batch. Each has a copy, so that the layers' gradients, ``[heads, query, key]``, stay where they
            are, and the few numbers that they come down to are all that is summed over devices.

        Returns:
          ``[shards, heads, query_length, key_length]``.
        """
        # Entry r holds the bias at distance r, negative distances at the end, as modulo has it.
        period = query_length + key_length
        distance = (np.arange(period) + query_length) % period - query_length
        bucket = relative_position_bucket(
            distance,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        one_hot = (bucket == np.arange(self.num_buckets)[:, None]).astype(np.float32)
        by_distance = self.embedding[...] @ jnp.asarray(one_hot)
        copies = jnp.broadcast_to(by_distance, (shards, *by_distance.shape))
        copies = constrain(copies, ("batch" if shards > 1 else None, "heads", None))  # One is for the whole batch.
        return along_diagonals(copies, query_length, key_length).astype(dtype)


def along_diagonals(values: Array, rows: int, columns: int) -> Array:
    """Fills matrices that are constant along their diagonals.

    Rows of length ``period`` that are read as if they were one shorter shift by one from each to the next. Its
    derivative, a sum along diagonals, is then one along an axis; to look each entry up by bucket would make
    it a matrix multiplication over all pairs of positions.

    Args:
      values: ``[shards, heads, period]``; ``period`` is at least ``rows + columns``.
      rows: queries.
      columns: keys.

    Returns:
      ``[shards, heads, rows, columns]``: entry (q, k) is ``values[(k - q) % period]``.
    """
    *leading, period = values.shape
    repeated = jnp.broadcast_to(values[..., None, :], (*leading, rows, period)).reshape(*leading, rows * period)
    shifted = repeated[..., : rows * (period - 1)].reshape(*leading, rows, period - 1)
    return shifted[..., :columns]
