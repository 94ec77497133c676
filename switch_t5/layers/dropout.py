"""Dropout with its randomness as an argument."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from switch_t5.types import Array


def dropout(x: Array, rate: float, rng: Array | None, *, broadcast_dim: int | None = -2) -> Array:
    """Zeroes entries with probability ``rate`` and scales the rest by ``1 / (1 - rate)``.

    Args:
      x: any shape.
      rate: in [0, 1).
      rng: a key; None leaves ``x`` as it is (evaluation).
      broadcast_dim: the dimension along which one draw is shared; T5 shares it along the length.
    """
    if rng is None or rate == 0:
        return x
    shape = list(x.shape)
    if broadcast_dim is not None:
        shape[broadcast_dim] = 1
    keep = jax.random.bernoulli(rng, 1 - rate, tuple(shape))
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def split_rng(rng: Array | None, count: int) -> list[Array | None]:
    """``count`` keys from one; as many None from None."""
    return [None] * count if rng is None else list(jax.random.split(rng, count))
