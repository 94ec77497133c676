"""Root-mean-square layer normalization, as in T5: no mean is subtracted and no bias added."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.parameter import parameter
from switch_t5.types import Array

EPSILON = 1e-6


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale``, computed in float32 and returned in the input's dtype."""

    def __init__(self, emb_dim: int, *, rngs: nnx.Rngs) -> None:
        self.scale = parameter(rngs, jax.nn.initializers.ones, (emb_dim,), ("embed",))

    def __call__(self, x: Array) -> Array:
        """``[batch, length, embed]`` to the same."""
        exact = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + EPSILON)
        return (exact * inverse_rms * self.scale[...]).astype(x.dtype)
