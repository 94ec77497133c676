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
        return _normalize(x, self.scale[...])


@jax.custom_vjp
def _normalize(x: Array, scale: Array) -> Array:
    """``x / rms(x) * scale``. For its derivative ``x`` is kept as it is, and not in float32 three times."""
    return _normalize_forward(x, scale)[0]


def _normalize_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    exact = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(exact), axis=-1, keepdims=True) + EPSILON)
    return (exact * inverse_rms * scale).astype(x.dtype), (x, scale, inverse_rms)


def _normalize_backward(residuals: tuple[Array, Array, Array], d_output: Array) -> tuple[Array, Array]:
    x, scale, inverse_rms = residuals
    d_output = d_output.astype(jnp.float32)
    normalized = x.astype(jnp.float32) * inverse_rms
    d_scale = jnp.sum(d_output * normalized, axis=tuple(range(x.ndim - 1)))
    d_normalized = d_output * scale
    along = jnp.mean(d_normalized * normalized, axis=-1, keepdims=True)
    return (inverse_rms * (d_normalized - along * normalized)).astype(x.dtype), d_scale


_normalize.defvjp(_normalize_forward, _normalize_backward)
