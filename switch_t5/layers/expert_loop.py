"""The experts' feed-forward on one CPU device: expert by expert, in both passes.

A batched product over ``[expert, tokens, embed]`` reads and writes all experts' hidden activations before the next
begins. A loop keeps one expert's in the cache, holds no gradient of the hidden activations for more than one expert,
and reads a kernel for the last time before the optimizer, which may then write its update in place. The derivative is
written out so that the loop back keeps hidden activations alone, and never a copy of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from switch_t5.types import Array

Hidden = Callable[..., Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_loop(hidden: Hidden, x: Array, into: tuple[Array, ...], wo: Array, extra: Any) -> Array:
    """``hidden(x wi, ...) wo`` for each expert.

    Args:
      hidden: of one expert's part of ``extra``, and of the products of its tokens with its kernels of ``into``.
      x: ``[expert, tokens, embed]``.
      into: kernels ``[expert, embed, mlp]``.
      wo: ``[expert, mlp, embed]``.
      extra: arrays with a leading expert axis, which have no derivative; None for none.

    Returns:
      ``[expert, tokens, embed]``.
    """
    return _forward(hidden, x, into, wo, extra)[0]


def _forward(hidden: Hidden, x: Array, into: tuple[Array, ...], wo: Array, extra: Any) -> tuple[Array, Any]:
    def one(_: None, expert: Any) -> tuple[None, Any]:
        x, into, wo, extra = expert
        branches = tuple(x @ kernel for kernel in into)
        return None, (hidden(extra, *branches) @ wo, branches)

    y, branches = jax.lax.scan(one, None, (x, into, wo, extra))[1]
    return y, (x, into, wo, extra, branches)


def _backward(hidden: Hidden, residuals: Any, dy: Array) -> tuple[Array, tuple[Array, ...], Array, None]:
    x, *others = residuals

    def one(tokens: Array, expert: Any) -> tuple[Array, Any]:
        index, into, wo, extra, branches, dy = expert
        x = jax.lax.dynamic_index_in_dim(tokens, index, keepdims=False)
        activated, pull = jax.vjp(partial(hidden, extra), *branches)
        d_branches = pull(dy @ wo.T)
        dx = sum(d_branch @ kernel.T for d_branch, kernel in zip(d_branches, into, strict=True))
        # An expert's gradient takes the place of its tokens.
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, dx, index, axis=0)
        return tokens, (tuple(x.T @ d_branch for d_branch in d_branches), activated.T @ dy)

    dx, (d_into, d_wo) = jax.lax.scan(one, x, (jnp.arange(x.shape[0]), *others, dy))
    return dx, d_into, d_wo, None


expert_loop.defvjp(_forward, _backward)
