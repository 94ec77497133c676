"""The experts' feed-forward on a CPU: expert by expert, on as many rows as each was sent, in both passes.

A loop keeps an expert's activations in the cache and multiplies no empty slot. Beside its input and its hidden
activations it holds nothing larger than one block's: on the way back a block's gradients take the places of the values
that they follow from. It reads a kernel for the last time before that kernel's gradient is whole, so that the optimizer
may write its update in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.layers.row_blocks import Block, cut, summed_outer
from switch_t5.routing.data_flow import zero_after
from switch_t5.types import Array

Hidden = Callable[..., Array]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_loop(
    hidden: Hidden, most: int | None, x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None, sizes: Array
) -> Array:
    """``hidden(keep, x wi, ...) wo`` of the first ``sizes[0]`` rows by the first expert, and so on.

    Args:
      hidden: of rows of ``keep``, and of the products of the same rows with each kernel of ``into``.
      most: what no expert has more rows of; None for any number.
      x: ``[rows, embed]``, sorted by expert.
      into: kernels ``[expert, embed, mlp]``.
      wo: ``[expert, mlp, embed]``.
      keep: ``[rows, mlp]``, without a derivative, or None.
      sizes: ``[expert]`` int32; their sum is at most the number of rows.

    Returns:
      ``[rows, embed]``; zero in the rows past the sum of ``sizes``.
    """
    return _forward(hidden, most, x, into, wo, keep, sizes)[0]


def _forward(
    hidden: Hidden, most: int | None, x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None, sizes: Array
) -> tuple[Array, Any]:
    blocks = cut(x.shape[0], sizes, most)

    def one(carry: Any, expert: Any) -> tuple[Any, None]:
        index, into, wo = expert

        def step(carry: Any, block: Block) -> Any:
            y, branches = carry
            products = tuple(block.read(x) @ kernel for kernel in into)
            branches = tuple(map(block.write, branches, products))
            return block.write(y, hidden(_read(block, keep), *products) @ wo), branches

        return blocks.loop(index, step, carry), None

    y = jnp.zeros((x.shape[0], wo.shape[2]), x.dtype)
    branches = tuple(jnp.zeros((x.shape[0], kernel.shape[2]), x.dtype) for kernel in into)
    (y, branches), _ = jax.lax.scan(one, (y, branches), (jnp.arange(wo.shape[0]), into, wo))
    return y, (x, into, wo, keep, sizes, branches)


def _backward(hidden: Hidden, most: int | None, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, into, wo, keep, sizes, branches = residuals
    blocks = cut(x.shape[0], sizes, most)
    dy = jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), dy, 0)  # What no expert writes stays as it is.

    def one(carry: Any, expert: Any) -> tuple[Any, Any]:
        index, into, wo = expert
        dy, branches = carry

        def d_wo_of(block: Block) -> Array:
            activated = hidden(_read(block, keep), *map(block.read, branches))
            return summed_outer(jnp.where(block.mine, activated, 0), block.read_mine(dy))

        def step(carry: Any, block: Block) -> Any:
            dy, branches = carry
            _, pull = jax.vjp(partial(hidden, _read(block, keep)), *map(block.read, branches))
            d_branches = pull(block.read(dy) @ wo.T)
            first, *others = (d_branch @ kernel.T for d_branch, kernel in zip(d_branches, into, strict=True))
            dx = sum(others, start=first)
            return block.write(dy, dx), tuple(map(block.write, branches, d_branches))

        d_wo = blocks.sum(index, d_wo_of, wo.shape)
        # Only then may the values that it was computed from be overwritten.
        dx, d_branches = blocks.after(zero_after(d_wo[0, 0])).loop(index, step, (dy, branches))
        d_into = tuple(
            blocks.sum(index, lambda block, d=d: summed_outer(block.read_mine(x), block.read_mine(d)), kernel.shape)
            for d, kernel in zip(d_branches, into, strict=True)
        )
        return (dx, d_branches), jax.tree.map(lambda gradient: gradient.astype(x.dtype), (d_into, d_wo))

    (dx, _), (d_into, d_wo) = jax.lax.scan(one, (dy, branches), (jnp.arange(wo.shape[0]), into, wo))
    return dx, d_into, d_wo, None, np.zeros(sizes.shape, jax.dtypes.float0)


def _read(block: Block, keep: Array | None) -> Array | None:
    return None if keep is None else block.read(keep)


expert_loop.defvjp(_forward, _backward)
