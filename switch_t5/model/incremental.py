"""The decoder a token at a time, beside a cache of keys and values.

Several hypotheses of one input (beams, samples) decode side by side: activations are ``[batch, hypotheses, embed]``.
They read the same input, so that its keys and values stand in the cache once, and cross-attention takes hypotheses as
it takes query positions. In self-attention a sample has a past of its own. Beams go on from one another, and share
one that is never moved: all beams of an input look at all that any of them said, and a mask leaves each its ancestors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.attention import HEADS_AXES, MASKED, attend, into_heads, mask_bias, out_of_heads
from switch_t5.layers.few_rows import times_transpose
from switch_t5.layers.parameter import gather_parameters
from switch_t5.model.blocks import RESIDUAL_AXES, Block, BlockInputs
from switch_t5.model.stack import Stack
from switch_t5.model.transformer import SwitchTransformer, logits
from switch_t5.partitioning.rules import constrain, is_partitioned, target_platform
from switch_t5.types import Array

_FEW = 16
"""Rows up to which the output kernel stands on the left of its product: with twice as many that takes as long."""


@partial(jax.tree_util.register_dataclass, data_fields=["key", "value", "cross_key", "cross_value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """What one block remembers; of scanned blocks, with a leading axis over repetitions.

    Attributes:
      key: ``[batch x hypotheses, heads, max length, kv]``, of the tokens so far; zero past them. Of beams
        ``[batch, heads, max length x hypotheses, kv]``. Of the shape that products take: XLA:CPU would write any other
        twice, once as the loop carries it and once as they want it.
      value: the same.
      cross_key: ``[batch, heads, encoder length, kv]``, of the input.
      cross_value: the same.
    """

    key: Array
    value: Array
    cross_key: Array
    cross_value: Array


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "cross_mask", "positions", "origins"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """What the decoder remembers of an input and of what it has said.

    Attributes:
      blocks: a cache for each block of the stack's period.
      cross_mask: ``[batch, 1, 1, encoder length]`` float32, what cross-attention must not see.
      positions: ``[1, heads, max length, max length]`` float32, the relative position bias; None where each block has
        its own.
      origins: ``[batch, hypotheses, max length]`` int32, of beams: in whose place the key and value of a hypothesis's
        token lie, for each position so far; None where each has its own past.
    """

    blocks: tuple[BlockCache, ...]
    cross_mask: Array
    positions: Array | None
    origins: Array | None


def new_cache(
    module: SwitchTransformer, encoded: Array, encoder_tokens: Array, hypotheses: int, max_length: int, *, beams: bool
) -> DecoderCache:
    """The cache before the first token.

    Args:
      module: the model.
      encoded: ``[batch, encoder length, embed]``, the encoder's output.
      encoder_tokens: ``[batch, encoder length]`` int32; 0 is padding.
      hypotheses: of each input.
      max_length: tokens to decode at the most.
      beams: whether they go on from one another, see :func:`reorder`.
    """
    config, batch = module.config, encoder_tokens.shape[0]
    rows, length = (batch, max_length * hypotheses) if beams else (batch * hypotheses, max_length)

    def start(block: Block, x: None, cache: None) -> tuple[None, BlockCache]:
        del cache
        past = jnp.zeros((rows, config.num_heads, length, config.head_dim), config.activation_dtype)
        past = constrain(past, HEADS_AXES)
        attention = block.cross_attention
        return x, BlockCache(past, past, into_heads(encoded, attention.key), into_heads(encoded, attention.value))

    stack = module.decoder.stack
    _, blocks = _through(stack, start, None, (None,) * stack.period)
    real = encoder_tokens > 0
    cross_mask = mask_bias(jnp.ones((batch, 1), bool), real)
    positions = None if config.relpos_per_layer else _positions(module.decoder, max_length)
    origins = jnp.zeros((batch, hypotheses, max_length), jnp.int32) if beams else None
    return DecoderCache(blocks, cross_mask, positions, origins)


def decode_token(
    module: SwitchTransformer, tokens: Array, real: Array, position: Array, cache: DecoderCache
) -> tuple[Array, DecoderCache]:
    """The decoder's output after one more token, as :meth:`SwitchTransformer.decode` has it at that position.

    Args:
      module: the model.
      tokens: ``[batch, hypotheses]`` int32, the decoder's input at this position; 0 at the first.
      real: ``[batch, hypotheses]`` bool, False for what has ended; its output means nothing.
      position: int32 scalar, the same for all.
      cache: of the positions before.

    Returns:
      ``[batch, hypotheses, embed]`` float32, to be multiplied by ``output_kernel``, and the cache with this position.
    """
    # Every hypothesis is a token of its input's group, none of which competes with another: see `independent`.
    inputs = BlockInputs(tokens, real, cache.cross_mask, None, None, None, 1, False)
    beams = 1 if cache.origins is None else tokens.shape[1]
    origins = None if cache.origins is None else cache.origins.at[:, :, position].set(jnp.arange(beams))

    max_length = cache.blocks[0].key.shape[-2] // beams
    seen = _seen(origins, position, max_length)

    def step(block: Block, x: Array, memory: BlockCache) -> tuple[Array, BlockCache]:
        positions = _positions(block, max_length) if cache.positions is None else cache.positions
        positions = jax.lax.dynamic_slice_in_dim(positions, position, 1, axis=2)
        attending = _SelfAttention(memory, seen, jnp.repeat(positions, beams, axis=-1), position)
        y, _ = block.attend_to_self(block.self_attention_norm(x), inputs, None, attending)
        x = constrain(x + y, RESIDUAL_AXES)
        attention = block.cross_attention
        query = into_heads(block.cross_attention_norm(x), attention.query)
        context = attend(query, memory.cross_key, memory.cross_value, cache.cross_mask, None)
        x = constrain(x + out_of_heads(constrain(context, HEADS_AXES), attention.out), RESIDUAL_AXES)
        y, _ = block.feed_forward(block.mlp_norm(x), inputs, None)
        return constrain(x + y, RESIDUAL_AXES), attending.memory

    x = module.embedding(tokens, module.config.activation_dtype)
    x, blocks = _through(module.decoder.stack, step, constrain(x, RESIDUAL_AXES), cache.blocks)
    return module.before_logits(module.decoder.norm(x)), dataclasses.replace(cache, blocks=blocks, origins=origins)


def next_logits(hidden: Array, output_kernel: Array) -> Array:
    """``[batch, hypotheses, embed]`` of :func:`decode_token` and ``[vocab, embed]`` to ``[..., vocab]``, float32."""
    rows = math.prod(hidden.shape[:-1])
    if rows > _FEW or target_platform() != "cpu" or is_partitioned():
        return logits(hidden, output_kernel)
    values = times_transpose(hidden.reshape(rows, hidden.shape[-1]).astype(jnp.float32), output_kernel)
    return values.reshape(*hidden.shape[:-1], len(output_kernel))


def _positions(owner: Any, max_length: int) -> Array:
    """The relative position bias of a stack or a block."""
    return owner.relative_position(max_length, max_length, jnp.dtype(jnp.float32))


def reorder(cache: DecoderCache, parents: Array) -> DecoderCache:
    """The cache of beams that go on from ``parents`` ``[batch, hypotheses]`` int32: only ``origins`` change."""
    assert cache.origins is not None
    return dataclasses.replace(cache, origins=jnp.take_along_axis(cache.origins, parents[..., None], axis=1))


def _seen(origins: Array | None, position: Array, max_length: int) -> Array:
    """What is added to the logits of self-attention so that a hypothesis sees what it said, this position included.

    Args:
      origins: as the cache has them.
      position: int32 scalar.
      max_length: positions of the past.

    Returns:
      ``[1, 1, 1, max length]`` float32, or of beams ``[batch, 1, hypotheses, max length x hypotheses]``.
    """
    said = jnp.arange(max_length) <= position
    if origins is not None:
        said = said[:, None] & (origins[..., None] == jnp.arange(origins.shape[1]))
        said = said.reshape(*origins.shape[:2], -1)
    seen = jnp.where(said, 0.0, MASKED)
    return seen[:, None] if origins is not None else seen[None, None, None]


class _SelfAttention:
    """Writes one position's key and value into a block's past and attends to what is seen of it."""

    def __init__(self, memory: BlockCache, seen: Array, positions: Array, position: Array) -> None:
        self.memory, self._seen, self._positions, self._position = memory, seen, positions, position

    def __call__(self, query: Array, key: Array, value: Array, *unused: Any, **also_unused: Any) -> Array:
        """``[batch, heads, hypotheses, kv]`` each, at one position, to the same."""
        del unused, also_unused
        batch, heads, hypotheses, kv = query.shape
        apart = len(self.memory.key) > batch
        if apart:
            query, key, value = (_by_hypothesis(x) for x in (query, key, value))
        key, value = (self._written(*pair) for pair in ((self.memory.key, key), (self.memory.value, value)))
        self.memory = dataclasses.replace(self.memory, key=key, value=value)
        context = attend(query, key, value, self._seen, self._positions)
        if apart:
            context = jnp.swapaxes(context.reshape(batch, hypotheses, heads, kv), 1, 2)
        return context

    def _written(self, past: Array, new: Array) -> Array:
        place = self._position * new.shape[2]
        return constrain(jax.lax.dynamic_update_slice_in_dim(past, new.astype(past.dtype), place, axis=2), HEADS_AXES)


def _by_hypothesis(x: Array) -> Array:
    """``[batch, heads, hypotheses, kv]`` to ``[batch x hypotheses, heads, 1, kv]``."""
    batch, heads, hypotheses, kv = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch * hypotheses, heads, 1, kv)


def _through(
    stack: Stack, body: Callable[[Block, Any, Any], tuple[Any, Any]], x: Any, caches: tuple[Any, ...]
) -> tuple[Any, tuple[BlockCache, ...]]:
    """Takes ``x`` through a stack's blocks, each with its cache; returns what comes out and the new caches."""

    def period(blocks: Any, x: Any, caches: tuple[Any, ...]) -> tuple[Any, tuple[BlockCache, ...]]:
        new = []
        for index, cache in enumerate(caches):
            x, cache = body(gather_parameters(getattr(blocks, f"layers_{index}")), x, cache)
            new.append(cache)
        return x, tuple(new)

    if stack.period == stack.num_layers:
        return period(stack.blocks, x, caches)
    graph, params = nnx.split(stack.blocks)

    def repetition(x: Any, scanned: tuple[nnx.State, tuple[Any, ...]]) -> tuple[Any, tuple[BlockCache, ...]]:
        layer_params, caches = scanned
        return period(nnx.merge(graph, layer_params), x, caches)

    return jax.lax.scan(repetition, x, (params, caches))
