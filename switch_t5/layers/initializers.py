"""How each kind of weight starts, by convention.

``paper``: every matrix is drawn from a normal of standard deviation ``sqrt(0.1 / fan_in)``, truncated at two
standard deviations (Fedus et al. 2022, section 2.4 and table 3). The embedding is a table and not a matrix
that sums over inputs: it keeps T5's unit normal in both conventions.

``t5x``: what T5X's configurations of T5 v1.1 and mT5 say: scale 1; matrices of attention and of the experts from
a plain normal, the query's divided by ``sqrt(head_dim)`` because T5 does not scale attention logits, dense
feed-forwards and logits from a truncated one; the router from a normal of 0.02; the relative position bias
uniform over ``fan_avg``.

``t5x_switch``: the same with scale 0.1 but for the router and the embedding, as the released Switch models.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from switch_t5.types import Array

Initialization = Literal["paper", "t5x", "t5x_switch"]
Kind = Literal["query", "attention", "mlp", "expert", "router", "logits", "embedding", "relpos"]


class Initializer(Protocol):
    """Draws a weight."""

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        """Returns an array of ``shape`` and ``dtype``."""
        ...


SMALL_SCALE = 0.1
"""The scale that table 3 recommends for sparse models."""


def initializer(
    kind: Kind, convention: Initialization, *, fan_in: int, fan_out: int = 1, head_dim: int = 1
) -> Initializer:
    """Returns the function ``(key, shape, dtype) -> array`` for one kind of weight.

    Args:
      kind: what the weight is for.
      convention: see the module's description.
      fan_in: inputs that one output sums over.
      fan_out: outputs, for the relative position bias' ``fan_avg``.
      head_dim: for the query's scale.
    """
    if kind == "embedding":
        return jax.nn.initializers.normal(1.0)
    # The query carries the 1 / sqrt(head_dim) that T5 leaves out of its attention.
    query_scale = head_dim if kind == "query" else 1
    if convention == "paper":
        return _truncated(math.sqrt(SMALL_SCALE / fan_in / query_scale))
    if kind == "router":
        return jax.nn.initializers.normal(0.02)
    scale = SMALL_SCALE if convention == "t5x_switch" else 1.0
    if kind == "relpos":
        limit = math.sqrt(3 * scale / ((fan_in + fan_out) / 2))
        return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)
    if kind in ("mlp", "logits"):
        # variance_scaling divides by the deviation that truncation leaves, so that the variance is exact.
        return _truncated(math.sqrt(scale / fan_in) / 0.87962566103423978)
    return jax.nn.initializers.normal(math.sqrt(scale / fan_in / query_scale))


def _truncated(sigma: float) -> Initializer:
    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return sigma * jax.random.truncated_normal(key, -2, 2, shape, dtype)

    return init
