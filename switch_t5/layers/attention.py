"""Multi-head attention as in T5: no biases and no scale, which the query's initialisation carries instead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.dropout import dropout
from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain
from switch_t5.types import Array

MASKED = -1e10
"""Added to the logits of positions that must not be seen; exp of it is exactly 0 in float32."""


class Attention(nnx.Module):
    """Attention of queries ``[B, Q, D]`` over keys and values ``[B, T, D]``."""

    def __init__(
        self, emb_dim: int, num_heads: int, head_dim: int, convention: Initialization, *, rngs: nnx.Rngs
    ) -> None:
        shape, axes = (emb_dim, num_heads, head_dim), ("embed", "heads", "kv")
        query_init = initializer("query", convention, fan_in=emb_dim, head_dim=head_dim)
        init = initializer("attention", convention, fan_in=emb_dim)
        self.query = parameter(rngs, query_init, shape, axes)
        self.key = parameter(rngs, init, shape, axes)
        self.value = parameter(rngs, init, shape, axes)
        out_init = initializer("attention", convention, fan_in=num_heads * head_dim)
        self.out = parameter(rngs, out_init, (num_heads, head_dim, emb_dim), ("heads", "kv", "embed"))

    def __call__(
        self, queries: Array, memory: Array, bias: Array, *, dropout_rate: float, rng: Array | None
    ) -> Array:
        """Attends.

        Args:
          queries: ``[batch, query length, embed]``.
          memory: ``[batch, key length, embed]``; the queries themselves in self-attention.
          bias: broadcastable to ``[batch, heads, query length, key length]``, float32: positions and masks.
          dropout_rate: of the attention probabilities.
          rng: None in evaluation.

        Returns:
          ``[batch, query length, embed]``.
        """
        query = self._project(queries, self.query)
        key = self._project(memory, self.key)
        value = self._project(memory, self.value)
        logits = jnp.einsum("bhqk,bhtk->bhqt", query, key).astype(jnp.float32) + bias
        weights = dropout(jax.nn.softmax(logits).astype(query.dtype), dropout_rate, rng)
        context = jnp.einsum("bhqt,bhtk->bhqk", weights, value)
        context = constrain(context, ("batch", "heads", "length", "kv"))
        return jnp.einsum("bhqk,hkd->bqd", context, self.out[...].astype(context.dtype))

    @staticmethod
    def _project(x: Array, kernel: nnx.Param) -> Array:
        """``[B, L, D]`` to ``[B, H, L, K]``."""
        heads = jnp.einsum("bld,dhk->bhlk", x, kernel[...].astype(x.dtype))
        return constrain(heads, ("batch", "heads", "length", "kv"))


def attention_bias(
    query_mask: Array,
    key_mask: Array,
    *,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    causal: bool = False,
) -> Array:
    """Turns masks into a bias.

    Args:
      query_mask: ``[B, Q]`` bool, False for padding.
      key_mask: ``[B, T]`` bool.
      query_segments: ``[B, Q]`` int, which packed example a position is of; None where nothing is packed.
      key_segments: ``[B, T]`` int.
      causal: a query sees no later key.

    Returns:
      ``[B, 1, Q, T]`` float32: 0 where the query may see the key, else :data:`MASKED`.
    """
    visible = query_mask[:, :, None] & key_mask[:, None, :]
    if query_segments is not None and key_segments is not None:
        visible &= query_segments[:, :, None] == key_segments[:, None, :]
    if causal:
        visible &= jnp.tri(visible.shape[1], visible.shape[2], dtype=bool)
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[:, None]
