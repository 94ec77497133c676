"""Dropout with its randomness as an argument."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from switch_t5.partitioning.rules import is_partitioned, shard_count, shard_index, target_platform
from switch_t5.types import Array


def dropout(x: Array, rate: float, rng: Array | None, *, broadcast_dim: int | None = -2) -> Array:
    """Zeroes entries with probability ``rate`` and scales the rest by ``1 / (1 - rate)``.

    Args:
      x: any shape.
      rate: in [0, 1).
      rng: a key; None leaves ``x`` as it is (evaluation).
      broadcast_dim: the dimension along which one draw is shared; T5 shares it along the length.
    """
    return drop(x, dropout_mask(x.shape, rate, rng, broadcast_dim=broadcast_dim), rate)


def dropout_mask(
    shape: tuple[int, ...], rate: float, rng: Array | None, *, broadcast_dim: int | None = None
) -> Array | None:
    """Which entries :func:`dropout` keeps, bool; None for all."""
    if rng is None or rate == 0:
        return None
    drawn = list(shape)
    if broadcast_dim is not None:
        drawn[broadcast_dim] = 1
    return jax.random.bernoulli(rng, 1 - rate, tuple(drawn))


def drop(x: Array, keep: Array | None, rate: float) -> Array:
    """Zeroes the entries that ``keep`` of :func:`dropout_mask` leaves out, and scales the others."""
    if keep is None:
        return x
    # Products have rows of one dimension on a CPU. Where gradients are of more, XLA computes this for each of two
    # products anew, the draws of each entry included, and once in a transposed order.
    rows = math.prod(x.shape[:-1])
    shape = (rows, x.shape[-1]) if target_platform() == "cpu" and not is_partitioned() else x.shape
    flat, keep = x.reshape(shape), jnp.broadcast_to(keep, x.shape).reshape(shape)
    return jnp.where(keep, flat / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype).reshape(x.shape)


def row_dropout_mask(numbers: Array, width: int, rate: float, rng: Array | None, *, columns: str) -> Array | None:
    """:func:`dropout_mask` whose draw for a row follows from the row's number alone, wherever the row stands.

    Args:
      numbers: ``[...]`` int32, one of each row.
      width: columns of a row; this device's in :func:`switch_t5.partitioning.rules.per_shard`.
      rate: in [0, 1).
      rng: None in evaluation.
      columns: the logical axis of the columns.

    Returns:
      ``[..., width]`` bool; None for all.
    """
    if rng is None or rate == 0:
        return None
    every = width * shard_count(columns)

    # Whatever the key's kind: vectorized draws of others follow from all rows together.
    threefry = jax.random.wrap_key_data(jax.random.key_data(rng)[:2], impl="threefry2x32")

    def keep(number: Array) -> Array:
        # Four draws of 16 bits from each hash, for hashes are what takes time: a key of threefry, which serves nothing
        # else here, is all 64 bits of one, where jax.random.bits gives half of them. A rate is met within 1 / 2^17.
        keys = jax.random.split(jax.random.fold_in(threefry, number), -(-every // 4))
        draws = jax.random.key_data(keys)[..., None] >> jnp.array([0, 16], jnp.uint32) & 0xFFFF
        whole = draws.reshape(-1)[:every] < round((1 - rate) * 2**16)
        return jax.lax.dynamic_slice_in_dim(whole, shard_index(columns) * width, width)

    return jax.vmap(keep)(numbers.reshape(-1)).reshape(*numbers.shape, width)


def split_rng(rng: Array | None, count: int) -> list[Array | None]:
    """``count`` keys from one; as many None from None."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))
