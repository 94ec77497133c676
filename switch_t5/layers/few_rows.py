"""A few rows times a kernel's transpose, in the form in which XLA on a CPU reads the kernel as it lies."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from switch_t5.types import Array


def times_transpose(rows: Array, kernel: Array) -> Array:
    """``[..., rows, b]`` times a kernel of ``[..., a, b]``, transposed: ``[..., rows, a]``.

    The kernel stands on the left, and the product is turned: with few rows that takes less than to turn the kernel,
    with many more.
    """
    # Without the barrier XLA would fold the turn into the product, and copy the kernel in another order for it.
    turned = jax.lax.optimization_barrier(jnp.einsum("...ab,...rb->...ar", kernel, rows))
    return jnp.swapaxes(turned, -1, -2)
