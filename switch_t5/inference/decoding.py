"""Text out of a model: the most probable token, one after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.types import Array, Params


def greedy_decode(model: Model, params: Params, encoder_tokens: Array, *, max_length: int, eos_id: int) -> Array:
    """Decodes greedily.

    The encoder runs once. The decoder runs over all positions at each step, which costs more than a cache of
    keys and values would and routes each token as the training forward pass does.

    Args:
      model: the structure.
      params: the parameters.
      encoder_tokens: ``[batch, length]`` int32; 0 is padding.
      max_length: positions to decode.
      eos_id: the token that ends a sequence.

    Returns:
      ``[batch, max_length]`` int32; 0 after the end.
    """
    module = model.bind(params)
    encoded, _ = module.encode(encoder_tokens)
    kernel = module.output_kernel()
    batch = encoder_tokens.shape[0]

    def step(carry: tuple[Array, Array], position: Array) -> tuple[tuple[Array, Array], Array]:
        inputs, ended = carry
        # Past its end a row is padding, which must not take an expert's slot from the others.
        mask = (jnp.arange(max_length) <= position) & ~ended[:, None]
        hidden, _ = module.decode(encoded, encoder_tokens, inputs, mask)
        here = jax.lax.dynamic_index_in_dim(hidden, position, axis=1, keepdims=False)
        token = jnp.where(ended, 0, jnp.argmax(logits(here, kernel), axis=-1)).astype(jnp.int32)
        # What a position decodes is the next position's input; the last one's falls off the end.
        inputs = inputs.at[:, position + 1].set(token, mode="drop")
        return (inputs, ended | (token == eos_id)), token

    nothing_to_read = jnp.all(encoder_tokens == 0, axis=-1)
    start = jnp.zeros((batch, max_length), jnp.int32), nothing_to_read
    _, tokens = jax.lax.scan(step, start, jnp.arange(max_length))
    return tokens.T
