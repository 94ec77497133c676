"""Products of consecutive rows with a matrix of their own: the experts' matmuls where no expert has a capacity.

``jax.lax.ragged_dot`` computes the same. Compiled for a TPU or a CPU (jax 0.10), it multiplies every row by every
matrix; so a TPU runs JAX's megablox kernels, and on a CPU the rows are multiplied in blocks: a loop over the matrices
reads one where it lies, takes the rest of its rows in one block of the least of a few sizes that holds them, then
whole blocks of the largest. What a block holds beyond its matrix' rows is computed and thrown away.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.partitioning.rules import target_platform
from switch_t5.routing.data_flow import zero_after
from switch_t5.types import Array

_BLOCKS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a block. A block of 1024 is as fast a row as any larger one; the smaller ones waste an eighth on average."""

_TILE = (512, 512, 512)
"""The largest tile in a TPU's vector memory: rows, embed and mlp."""


@jax.custom_vjp
def grouped_matmul(x: Array, kernel: Array, sizes: Array) -> Array:
    """Multiplies the first ``sizes[0]`` rows by ``kernel[0]``, the next ``sizes[1]`` by ``kernel[1]``, and so on.

    Args:
      x: ``[rows, embed]``.
      kernel: ``[expert, embed, mlp]``.
      sizes: ``[expert]`` int32; their sum is at most the number of rows.

    Returns:
      ``[rows, mlp]``; zero in the rows past the sum of ``sizes``.
    """
    return _product(x, kernel, sizes)


def _product(x: Array, kernel: Array, sizes: Array) -> Array:
    products = {"cpu": _blocked, "tpu": _megablox}
    return products.get(target_platform(), jax.lax.ragged_dot)(x, kernel, sizes)


def _forward(x: Array, kernel: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, kernel, sizes), (x, kernel, sizes)


def _backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, np.ndarray]:
    x, kernel, sizes = residuals
    if target_platform() == "cpu":
        dx = _blocked(dy, kernel, sizes, transposed=True)
        # XLA's CPU backend copies a donated parameter unless all that reads it comes, in the flow of data, before the
        # update that overwrites it; dx reads the kernel last.
        d_kernel = _blocked_kernel_gradient(x, dy, sizes + zero_after(dx[0, 0]).astype(sizes.dtype))
    else:
        dx, d_kernel = jax.vjp(lambda x, kernel: _product(x, kernel, sizes), x, kernel)[1](dy)
        dx = _without_the_rest(dx, sizes)
    return dx, d_kernel, np.zeros(sizes.shape, jax.dtypes.float0)


grouped_matmul.defvjp(_forward, _backward)


def _megablox(x: Array, kernel: Array, sizes: Array, *, interpret: bool = False) -> Array:
    """:func:`grouped_matmul` on a TPU."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # Here, for it takes long to import.

    rows = x.shape[0]
    # An expert's rows begin and end inside a tile, which is then multiplied as a whole: no more rows than its share.
    tile = min(_TILE[0], max(128, rows // kernel.shape[0] // 128 * 128)), *_TILE[1:]
    x = jnp.pad(x, ((0, -rows % tile[0]), (0, 0)))
    y = gmm(x, kernel, sizes, x.dtype, tile, interpret=interpret)[:rows]
    return _without_the_rest(y, sizes)


def _without_the_rest(y: Array, sizes: Array) -> Array:
    """Zero in the rows past the sum of ``sizes``, which a TPU's kernel leaves unwritten."""
    return jnp.where(jnp.arange(y.shape[0])[:, None] < jnp.sum(sizes), y, 0)


def _blocked(x: Array, kernel: Array, sizes: Array, *, transposed: bool = False) -> Array:
    """:func:`grouped_matmul` on a CPU; ``transposed`` multiplies by each matrix' transpose."""
    blocks, start, rest, choice, whole = _plan(x.shape[0], sizes)
    # Loops of one turn or none, for a conditional would copy all of y; a turn's number is part of where it reads, or
    # XLA would take the product out of its loop.
    turns = (choice[:, None] == jnp.arange(len(blocks))).astype(jnp.int32)

    def multiply(expert: Array, y: Array) -> Array:
        matrix = jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)

        def write(turn: Array, y: Array, size: int, first: Array, count: Array | int) -> Array:
            at, mine = _place(size, first + turn * size, count, x.shape[0])
            # Transposed in here: outside of its loop it would be written out.
            block = jax.lax.dynamic_slice_in_dim(x, at, size) @ (matrix.T if transposed else matrix)
            block = jnp.where(mine, block, jax.lax.dynamic_slice_in_dim(y, at, size))
            return jax.lax.dynamic_update_slice_in_dim(y, block, at, axis=0)

        for index, size in enumerate(blocks):
            part = partial(write, size=size, first=start[expert], count=rest[expert])
            y = jax.lax.fori_loop(0, turns[expert, index], part, y)
        size = blocks[-1]
        part = partial(write, size=size, first=start[expert] + rest[expert], count=size)
        return jax.lax.fori_loop(0, whole[expert], part, y)

    y = jnp.zeros((x.shape[0], kernel.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.fori_loop(0, kernel.shape[0], multiply, y)


def _blocked_kernel_gradient(x: Array, dy: Array, sizes: Array) -> Array:
    """``[expert, embed, mlp]``: for each matrix, its rows of ``x``, transposed, times those of ``dy``."""
    blocks, start, rest, choice, whole = _plan(x.shape[0], sizes)

    def product(size: int, first: Array, count: Array | int) -> Array:
        at, mine = _place(size, first, count, x.shape[0])
        left, right = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(rows, at, size), 0) for rows in (x, dy))
        return jnp.matmul(left.T, right, preferred_element_type=jnp.float32)

    def gradient(_: None, expert: Array) -> tuple[None, Array]:
        branches = [partial(product, size) for size in blocks]
        nothing = lambda first, count: jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)  # noqa: E731
        total = jax.lax.switch(choice[expert] + 1, [nothing, *branches], start[expert], rest[expert])
        size, first = blocks[-1], start[expert] + rest[expert]
        add = lambda turn, total: total + product(size, first + turn * size, size)  # noqa: E731
        return None, jax.lax.fori_loop(0, whole[expert], add, total).astype(x.dtype)

    return jax.lax.scan(gradient, None, jnp.arange(sizes.shape[0]))[1]


def _plan(rows: int, sizes: Array) -> tuple[tuple[int, ...], Array, Array, Array, Array]:
    """How each matrix' rows are cut into blocks.

    Returns:
      The sizes of blocks; and for each matrix, ``[expert]`` int32: its first row, its rows in the first block, which
      size that block has (-1 where it has no rows), and how many blocks of the largest size follow.
    """
    blocks = tuple(sorted({min(size, rows) for size in _BLOCKS}))
    whole = jnp.maximum(sizes - 1, 0) // blocks[-1]
    rest = sizes - whole * blocks[-1]
    choice = jnp.where(rest > 0, jnp.searchsorted(jnp.asarray(blocks), rest), -1)
    return blocks, jnp.cumsum(sizes) - sizes, rest, choice.astype(jnp.int32), whole


def _place(size: int, first: Array, count: Array | int, rows: int) -> tuple[Array, Array]:
    """Where a block with the ``count`` rows from ``first`` on is read, and ``[size, 1]`` which rows those are."""
    at = jnp.minimum(first, rows - size)
    row = at + jnp.arange(size)[:, None]
    return at, (first <= row) & (row < first + count)
