"""Tokens to vectors, and vectors back to logits."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.types import Array


class Embedding(nnx.Module):
    """A table ``[vocab, embed]``, read by index."""

    def __init__(self, vocab_size: int, emb_dim: int, convention: Initialization, *, rngs: nnx.Rngs) -> None:
        init = initializer("embedding", convention, fan_in=1)
        self.table = parameter(rngs, init, (vocab_size, emb_dim), ("vocab", "embed"))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """``[batch, length]`` int32 to ``[batch, length, embed]``."""
        return jnp.take(self.table[...], tokens, axis=0, mode="clip").astype(dtype)

    def output_kernel(self) -> Array:
        """The matrix ``[vocab, embed]`` of tied logits, float32; what it multiplies is scaled."""
        return self.table[...]


class LogitsDense(nnx.Module):
    """The output matrix ``[embed, vocab]`` of a model whose logits are not tied to its embedding."""

    def __init__(self, vocab_size: int, emb_dim: int, convention: Initialization, *, rngs: nnx.Rngs) -> None:
        init = initializer("logits", convention, fan_in=emb_dim)
        self.kernel = parameter(rngs, init, (emb_dim, vocab_size), ("embed", "vocab"))

    def output_kernel(self) -> Array:
        """The matrix ``[vocab, embed]``, float32."""
        return self.kernel[...].T
