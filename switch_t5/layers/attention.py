"""Multi-head attention as in T5: no biases and no scale, which the query's initialisation carries instead."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.dropout import dropout
from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.layers.rematerialization import kept
from switch_t5.partitioning.rules import constrain, is_partitioned, num_shards, target_platform
from switch_t5.types import Array

Projection = Literal["query", "key", "value", "out"]
PROJECTIONS: tuple[Projection, ...] = ("query", "key", "value", "out")

HEADS_AXES = ("batch", "heads", "length", "kv")

MASKED = -1e10
"""Added to the logits of positions that must not be seen; exp of it is exactly 0 in float32."""

_LARGE_LOGITS = 1 << 20
"""Of one sequence, in entries: from here on a CPU computes those of one sequence at a time, which stay in its cache."""


class SelfAttend(Protocol):
    """How heads attend to one another: :func:`attend_with_dropout`, or what reads a cache in its place."""

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array,
        positions: Array | None,
        *,
        dropout_rate: float,
        rng: Array | None,
    ) -> Array:
        """``[batch, heads, length, kv]`` each to the same."""
        ...


class Attention(nnx.Module):
    """Attention of queries ``[B, Q, D]`` over keys and values ``[B, T, D]``."""

    # One kernel for each of PROJECTIONS.
    query: nnx.Param
    key: nnx.Param
    value: nnx.Param
    out: nnx.Param

    def __init__(
        self, emb_dim: int, num_heads: int, head_dim: int, convention: Initialization, *, rngs: nnx.Rngs
    ) -> None:
        for name in PROJECTIONS:
            setattr(self, name, projection_kernel(name, emb_dim, num_heads, head_dim, convention, rngs=rngs))

    def __call__(
        self,
        queries: Array,
        memory: Array,
        mask: Array,
        positions: Array | None,
        *,
        dropout_rate: float,
        rng: Array | None,
        attend_to_self: SelfAttend | None = None,
    ) -> Array:
        """Attends.

        Args:
          queries: ``[batch, query length, embed]``.
          memory: ``[batch, key length, embed]``, or of :func:`for_each_part_of_heads`; the queries themselves in
            self-attention.
          mask: ``[batch, 1, query length, key length]`` float32, of :func:`mask_bias`; one query's may stand for all.
          positions: ``[batch shards, heads, query length, key length]`` float32; None in cross-attention.
          dropout_rate: of the attention probabilities.
          rng: None in evaluation.
          attend_to_self: in place of :func:`attend_with_dropout`.

        Returns:
          ``[batch, query length, embed]``.
        """
        query = into_heads(queries, self.query)
        key = into_heads(memory, self.key)
        value = into_heads(memory, self.value)
        attending = attend_to_self or attend_with_dropout
        context = attending(query, key, value, mask, positions, dropout_rate=dropout_rate, rng=rng)
        return out_of_heads(context, self.out)


def projection_kernel(
    name: Projection,
    emb_dim: int,
    num_heads: int,
    head_dim: int,
    convention: Initialization,
    *,
    num_experts: int | None = None,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """A projection's parameter: ``[embed, heads, kv]``, or ``[heads, kv, embed]`` for ``out``; experts' lead."""
    expert_dims, expert_axes = ((), ()) if num_experts is None else ((num_experts,), ("expert",))
    if name == "out":
        init = initializer("attention", convention, fan_in=num_heads * head_dim)
        shape, axes = (num_heads, head_dim, emb_dim), ("heads", "kv", "embed")
    else:
        kind = "query" if name == "query" else "attention"
        init = initializer(kind, convention, fan_in=emb_dim, head_dim=head_dim)
        shape, axes = (emb_dim, num_heads, head_dim), ("embed", "heads", "kv")
    return parameter(rngs, init, (*expert_dims, *shape), (*expert_axes, *axes))


def into_heads(x: Array, kernel: nnx.Param) -> Array:
    """``[B, L, D]``, or what :func:`for_each_part_of_heads` makes of it, to ``[B, H, L, K]``."""
    matrix = kernel[...].astype(x.dtype)
    if x.ndim == 3:
        # Of "bld,dhk->bhlk" XLA:CPU makes a product with the kernel on its left, which takes half as long again.
        heads = jnp.swapaxes(jnp.einsum("bld,dhk->blhk", x, matrix), 1, 2)
    else:
        parts = matrix.reshape(matrix.shape[0], len(x), -1, matrix.shape[-1])
        heads = jnp.einsum("pbld,dphk->bphlk", x, parts)
        heads = heads.reshape(heads.shape[0], -1, *heads.shape[3:])
    return kept(constrain(heads, HEADS_AXES))


def for_each_part_of_heads(x: Array) -> Array:
    """``[B, L, D]`` to ``[parts of heads, B, L, D]``: a copy for each device that heads are split over, if any are.

    Where many layers read ``x``, gradients of copies add up where they are, and are summed over devices once for all
    layers. Of one array they would be summed for each of its uses.
    """
    parts = num_shards("heads")
    if parts == 1:
        return x
    return constrain(jnp.broadcast_to(x, (parts, *x.shape)), ("heads", "batch", "length", None))


def out_of_heads(context: Array, kernel: nnx.Param) -> Array:
    """``[B, H, L, K]`` to ``[B, L, D]``."""
    return jnp.einsum("bhqk,hkd->bqd", context, kernel[...].astype(context.dtype))


def attend_with_dropout(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    positions: Array | None,
    *,
    dropout_rate: float,
    rng: Array | None,
) -> Array:
    """:func:`attend` with dropout of the probabilities, as T5 has it."""
    # T5 drops a key for all queries at once, which is to drop its value.
    value = dropout(value, dropout_rate, rng, broadcast_dim=-1)
    return constrain(attend(query, key, value, mask, positions), HEADS_AXES)


@jax.custom_vjp
def attend(query: Array, key: Array, value: Array, mask: Array, positions: Array | None) -> Array:
    """``softmax(query key^T + mask + positions) value``, with the softmax in float32.

    The probabilities are never divided by their sum: the output is, which has ``kv`` entries a query
    instead of a key length. So too in the derivative, where the sum over keys of probability times its
    gradient is the product of output and output gradient (Dao et al. 2022, section 3.1).

    Args:
      query: ``[batch, heads, query length, kv]``.
      key: ``[batch, heads, key length, kv]``.
      value: ``[batch, heads, key length, kv]``.
      mask: ``[batch, 1, query length, key length]`` float32; one query's may stand for all, and where there is one
        query one sequence's for all. It has no derivative.
      positions: ``[shards, heads, query length, key length]`` float32, a copy for each of so many equal parts of the
        batch; or None. One query's may stand for all where no derivative is taken.

    Returns:
      ``[batch, heads, query length, kv]``.
    """
    # Without a derivative, that is; for one the probabilities of all are kept.
    entries = math.prod(query.shape[1:3]) * key.shape[2]
    small = entries < _LARGE_LOGITS or query.shape[2] == 1
    if small or target_platform() != "cpu" or is_partitioned():
        return _attend_forward(query, key, value, mask, positions)[0]

    def one(sequence: tuple[Array, ...]) -> Array:
        query, key, value, mask = (array[None] for array in sequence)
        return _attend_forward(query, key, value, mask, positions)[0][0]

    return jax.lax.map(one, (query, key, value, mask))


def _attend_forward(
    query: Array, key: Array, value: Array, mask: Array, positions: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    bias = mask if positions is None else _plus_positions(mask, positions)
    logits = jnp.einsum("bhqk,bhtk->bhqt", query, key).astype(jnp.float32) + bias
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(query.dtype)
    context = kept((jnp.einsum("bhqt,bhtk->bhqk", weights, value) / total).astype(query.dtype))
    return context, (query, key, value, mask, positions, weights, total, context)


def _attend_backward(residuals: tuple[Any, ...], d_context: Array) -> tuple[Array | None, ...]:
    query, key, value, mask, positions, weights, total, context = residuals
    d_context = (d_context / total).astype(query.dtype)
    d_value = jnp.einsum("bhqt,bhqk->bhtk", weights, d_context)
    d_weights = jnp.einsum("bhqk,bhtk->bhqt", d_context, value)
    shared = jnp.sum((d_context * context).astype(jnp.float32), axis=-1, keepdims=True)
    d_logits = weights * (d_weights - shared)
    narrow = d_logits.astype(query.dtype)
    d_query = jnp.einsum("bhqt,bhtk->bhqk", narrow, key)
    d_key = jnp.einsum("bhqt,bhqk->bhtk", narrow, query)
    d_positions = None
    if positions is not None:
        # A product with ones: XLA:CPU's own sum over a leading axis takes sixty times as long (jax 0.10).
        by_shard = d_logits.astype(jnp.float32).reshape(len(positions), -1, *d_logits.shape[1:])
        d_positions = jnp.einsum("b,sbhqt->shqt", jnp.ones(by_shard.shape[1]), by_shard)
    return d_query, d_key, d_value, jnp.zeros_like(mask), d_positions


attend.defvjp(_attend_forward, _attend_backward)


def _plus_positions(mask: Array, positions: Array) -> Array:
    """``[B, 1, Q, T]`` and ``[S, H, Q, T]`` to ``[B, H, Q, T]``: to each part of the batch its own copy."""
    if len(positions) == 1:
        return mask + positions
    by_shard = mask.reshape(len(positions), -1, *mask.shape[1:]) + positions[:, None]
    return by_shard.reshape(-1, *by_shard.shape[2:])


def mask_bias(
    query_mask: Array,
    key_mask: Array,
    *,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    causal: bool = False,
) -> Array:
    """Turns masks into what is added to attention logits.

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
