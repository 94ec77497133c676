"""The experts' feed-forward on a CPU: expert by expert, on as many rows as each was sent, in both passes.

A loop keeps an expert's activations in the cache and multiplies no empty slot. Beside its input and its hidden
activations it holds nothing larger than one block's: on the way back a block's gradients take the places of the values
that they follow from. It reads a kernel for the last time before that kernel's gradient is whole, so that the optimizer
may write its update in place. Where experts get a few rows each and their loads are even enough, each product of a
share of those rows is done for all experts before the next instead (:mod:`switch_t5.layers.even_rows`), which takes
memory for all of their hidden activations and gradients once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.layers.even_rows import EvenRows, even_choice
from switch_t5.layers.few_rows import times_transpose
from switch_t5.layers.row_blocks import Block, Load, cut, summed_outer, without_the_rest
from switch_t5.routing.data_flow import zero_after
from switch_t5.types import Array

Hidden = Callable[..., Array]

_FEW = 64
"""Rows of an expert, or of a block, up to which copying a kernel in another order takes longer than turning their
product with it."""

_FEW_WIDE = 16
"""Rows of an expert up to which turning them is faster than copying its kernel, where they are wider than their
product with it."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_loop(
    hidden: Hidden, load: Load, x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None, sizes: Array
) -> Array:
    """``hidden(keep, x wi, ...) wo`` of the first ``sizes[0]`` rows by the first expert, and so on.

    Args:
      hidden: of rows of ``keep``, and of the products of the same rows with each kernel of ``into``.
      load: what is known of ``sizes`` beforehand.
      x: ``[rows, embed]``, sorted by expert.
      into: kernels ``[expert, embed, mlp]``.
      wo: ``[expert, mlp, embed]``.
      keep: ``[rows, mlp]``, without a derivative, or None.
      sizes: ``[expert]`` int32; their sum is at most the number of rows.

    Returns:
      ``[rows, embed]``; zero in the rows past the sum of ``sizes``.
    """
    return _forward(hidden, load, x, into, wo, keep, sizes)[0]


def _forward(
    hidden: Hidden, load: Load, x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None, sizes: Array
) -> tuple[Array, Any]:
    rows = x.shape[0]
    even = even_choice(rows, sizes, load.share)
    blocks = cut(rows, sizes, load.most, skip=even.share)

    def nothing(x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None) -> tuple[Array, Array]:
        return jnp.zeros((rows, wo.shape[2]), x.dtype), jnp.zeros((len(into), rows, wo.shape[1]), x.dtype)

    def one(expert: Array, carry: Any) -> Any:
        kernels, out = tuple(kernel[expert] for kernel in into), wo[expert]

        def step(carry: Any, block: Block) -> Any:
            y, branches = carry
            products = tuple(block.read(x) @ kernel for kernel in kernels)
            branches = block.write(branches, jnp.stack(products))
            return block.write(y, hidden(_read(block, keep), *products) @ out), branches

        return blocks.loop(expert, step, carry)

    first = even.work(partial(_even_forward, hidden), nothing, x, into, wo, keep)
    y, branches = blocks.over_experts(one, first)
    return y, (x, into, wo, keep, sizes, branches)


def _backward(hidden: Hidden, load: Load, residuals: Any, dy: Array) -> tuple[Any, ...]:
    x, into, wo, keep, sizes, branches = residuals
    rows = x.shape[0]
    even = even_choice(rows, sizes, load.share)
    blocks = cut(rows, sizes, load.most, skip=even.share)

    # What no expert writes stays as it is, so zero. Each function masks it: XLA would copy an array masked before.
    def nothing(dy: Array, x: Array, into: tuple[Array, ...], wo: Array, *_: Any) -> tuple[Array, tuple[Array, ...]]:
        return without_the_rest(dy, sizes), tuple(jnp.zeros_like(kernel) for kernel in (*into, wo))

    def together(even: EvenRows, dy: Array, *others: Any) -> tuple[Array, tuple[Array, ...]]:
        dx, d_kernels = _even_backward(hidden, even, dy, *others)
        return even.put(dx, without_the_rest(dy, sizes)), d_kernels

    def one(expert: Array, carry: Any) -> Any:
        kernels, out = tuple(kernel[expert] for kernel in into), wo[expert]
        dy, branches, sums = carry

        def d_out_of(block: Block) -> Array:
            activated = hidden(_read(block, keep), *block.read(branches))
            return summed_outer(jnp.where(block.mine, activated, 0), block.read_mine(dy))

        def d_kernel_of(nth: int, d_branches: Array, block: Block) -> Array:
            return summed_outer(block.read_mine(x), block.read_mine(d_branches)[nth])

        def step(carry: Any, block: Block) -> Any:
            dy, branches = carry
            _, pull = jax.vjp(partial(hidden, _read(block, keep)), *block.read(branches))
            d_branches = pull(_transposed_product(block.read(dy), out))
            first, *others = (_transposed_product(d, kernel) for d, kernel in zip(d_branches, kernels, strict=True))
            dx = sum(others, start=first)
            # All at once: XLA would copy them, were one written before another is computed from it.
            return block.write(dy, dx), block.write(branches, jnp.stack(d_branches))

        d_out = blocks.sum(expert, d_out_of, out.shape)
        # Only then may the values that it was computed from be overwritten.
        dx, d_branches = blocks.after(zero_after(d_out[0, 0])).loop(expert, step, (dy, branches))
        d_into = tuple(
            blocks.sum(expert, partial(d_kernel_of, nth, d_branches), kernel.shape)
            for nth, kernel in enumerate(kernels)
        )
        d_kernels = (even.plus(d, stack, expert) for d, stack in zip((*d_into, d_out), sums, strict=True))
        return dx, d_branches, tuple(map(partial(_set, expert), sums, d_kernels))

    dy, d_kernels = even.work(together, nothing, dy, x, into, wo, keep, branches)
    dx, _, (*d_into, d_wo) = blocks.over_experts(one, (dy, branches, d_kernels))
    return dx, tuple(d_into), d_wo, None, np.zeros(sizes.shape, jax.dtypes.float0)


def _even_forward(
    hidden: Hidden, even: EvenRows, x: Array, into: tuple[Array, ...], wo: Array, keep: Array | None
) -> tuple[Array, Array]:
    """Even rows' output among zeros, ``[rows, embed]``, and their products with ``into``, ``[into, rows, mlp]``."""
    x = even.take(x)
    branches = tuple(_products(x, kernel) for kernel in into)
    y = _products(hidden(_take(even, keep), *branches), wo)
    return even.put(y), jnp.stack(tuple(map(even.put, branches)))


def _even_backward(
    hidden: Hidden,
    even: EvenRows,
    dy: Array,
    x: Array,
    into: tuple[Array, ...],
    wo: Array,
    keep: Array | None,
    branches: Array,
) -> tuple[Array, tuple[Array, ...]]:
    """``dx`` of even rows, ``[expert, room, embed]``, and what they add to the kernels' gradients."""
    dy = even.take(dy)
    activated, pull = jax.vjp(partial(hidden, _take(even, keep)), *map(even.take, branches))
    d_branches = pull(_transposed_products(dy, wo))
    d_wo = _summed_outers(activated + zero_after(d_branches[0][0, 0, 0]), dy)
    first, *others = (_transposed_products(d, kernel) for d, kernel in zip(d_branches, into, strict=True))
    dx = sum(others, start=first)
    x = even.take(x) + zero_after(dx[0, 0, 0])
    return dx, (*(_summed_outers(x, d) for d in d_branches), d_wo)


def _products(rows: Array, kernels: Array) -> Array:
    """``[expert, rows, a]`` times each expert's kernel of ``[expert, a, b]``: ``[expert, rows, b]``."""
    # With the rows turned, XLA on a CPU reads kernels where they are; else it copies all of them in another order. But
    # many wide rows, such as hidden activations, take long to turn.
    _, count, width = rows.shape
    if count > _FEW_WIDE and width > kernels.shape[2]:
        return _one_by_one(jnp.matmul, rows, kernels)
    turned = jax.lax.optimization_barrier(jnp.swapaxes(rows, 1, 2))
    return jnp.einsum("ear,eab->erb", turned, kernels)


def _transposed_products(rows: Array, kernels: Array) -> Array:
    """``[expert, rows, b]`` times each expert's kernel of ``[expert, a, b]``, transposed: ``[expert, rows, a]``."""
    if rows.shape[1] > _FEW:
        return _one_by_one(lambda rows, kernel: rows @ kernel.T, rows, kernels)
    return times_transpose(rows, kernels)


def _one_by_one(product: Callable[[Array, Array], Array], rows: Array, kernels: Array) -> Array:
    """``product`` of each expert's rows and kernel; each kernel is copied, but on its own, and stays in the cache."""
    return jax.lax.map(lambda pair: product(*pair), (rows, kernels))


def _transposed_product(rows: Array, kernel: Array) -> Array:
    """``[rows, b]`` times a kernel of ``[a, b]``, transposed: ``[rows, a]``."""
    return rows @ kernel.T if len(rows) > _FEW else times_transpose(rows, kernel)


def _summed_outers(left: Array, right: Array) -> Array:
    """For each expert ``left`` ``[expert, rows, a]``, transposed, times ``right`` ``[expert, rows, b]``."""
    return jnp.matmul(jnp.swapaxes(left, 1, 2), right, preferred_element_type=jnp.float32).astype(left.dtype)


def _set(expert: Array, stack: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), expert, axis=0)


def _take(even: EvenRows, keep: Array | None) -> Array | None:
    return None if keep is None else even.take(keep)


def _read(block: Block, keep: Array | None) -> Array | None:
    return None if keep is None else block.read(keep)


expert_loop.defvjp(_forward, _backward)
