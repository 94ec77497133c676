"""Products of consecutive rows with a matrix of their own: the experts' matmuls where no expert has a capacity.

``jax.lax.ragged_dot`` computes the same. Compiled for a TPU or a CPU (jax 0.10), it multiplies every row by every
matrix; so a TPU runs JAX's megablox kernels, and a CPU multiplies blocks of rows
(:mod:`switch_t5.layers.row_blocks`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.layers.row_blocks import Block, cut, summed_outer, without_the_rest
from switch_t5.partitioning.rules import target_platform
from switch_t5.routing.data_flow import zero_after
from switch_t5.types import Array

_TILE = (512, 512, 512)
"""The largest tile in a TPU's vector memory: rows, embed and mlp."""


def grouped_matmul(x: Array, kernel: Array, sizes: Array, most: int | None = None) -> Array:
    """Multiplies the first ``sizes[0]`` rows by ``kernel[0]``, the next ``sizes[1]`` by ``kernel[1]``, and so on.

    Args:
      x: ``[rows, embed]``.
      kernel: ``[expert, embed, mlp]``.
      sizes: ``[expert]`` int32; their sum is at most the number of rows.
      most: what no matrix has more rows of; None for any number.

    Returns:
      ``[rows, mlp]``; zero in the rows past the sum of ``sizes``.
    """
    return _grouped_matmul(most, x, kernel, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(most: int | None, x: Array, kernel: Array, sizes: Array) -> Array:
    return _product(x, kernel, sizes, most)


def _product(x: Array, kernel: Array, sizes: Array, most: int | None) -> Array:
    products = {"cpu": partial(_blocked, most=most), "tpu": _megablox}
    return products.get(target_platform(), jax.lax.ragged_dot)(x, kernel, sizes)


def _forward(most: int | None, x: Array, kernel: Array, sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, kernel, sizes, most), (x, kernel, sizes)


def _backward(most: int | None, residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, np.ndarray]:
    x, kernel, sizes = residuals
    if target_platform() == "cpu":
        dx = _blocked(dy, kernel, sizes, most, transposed=True)
        # XLA's CPU backend copies a donated parameter unless all that reads it comes, in the flow of data, before the
        # update that overwrites it; dx reads the kernel last.
        d_kernel = _blocked_kernel_gradient(x, dy, sizes + zero_after(dx[0, 0]).astype(sizes.dtype), most)
    else:
        dx, d_kernel = jax.vjp(lambda x, kernel: _product(x, kernel, sizes, most), x, kernel)[1](dy)
        dx = without_the_rest(dx, sizes)
    return dx, d_kernel, np.zeros(sizes.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _megablox(x: Array, kernel: Array, sizes: Array, *, interpret: bool = False) -> Array:
    """:func:`grouped_matmul` on a TPU."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # Here, for it takes long to import.

    rows = x.shape[0]
    # An expert's rows begin and end inside a tile, which is then multiplied as a whole: no more rows than its share.
    tile = min(_TILE[0], max(128, rows // kernel.shape[0] // 128 * 128)), *_TILE[1:]
    x = jnp.pad(x, ((0, -rows % tile[0]), (0, 0)))
    y = gmm(x, kernel, sizes, x.dtype, tile, interpret=interpret)[:rows]
    return without_the_rest(y, sizes)  # The kernel leaves those rows unwritten.


def _blocked(x: Array, kernel: Array, sizes: Array, most: int | None, *, transposed: bool = False) -> Array:
    """:func:`grouped_matmul` on a CPU; ``transposed`` multiplies by each matrix' transpose."""
    blocks = cut(x.shape[0], sizes, most)

    def multiply(expert: Array, y: Array) -> Array:
        matrix = jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False)

        def step(y: Array, block: Block) -> Array:
            # Transposed in here: outside of its loop it would be written out.
            return block.write(y, block.read(x) @ (matrix.T if transposed else matrix))

        return blocks.loop(expert, step, y)

    y = jnp.zeros((x.shape[0], kernel.shape[1 if transposed else 2]), x.dtype)
    return blocks.over_experts(multiply, y)


def _blocked_kernel_gradient(x: Array, dy: Array, sizes: Array, most: int | None) -> Array:
    """``[expert, embed, mlp]``: for each matrix, its rows of ``x``, transposed, times those of ``dy``."""
    blocks = cut(x.shape[0], sizes, most)

    def product(block: Block) -> Array:
        return summed_outer(block.read_mine(x), block.read_mine(dy))

    def gradient(_: None, expert: Array) -> tuple[None, Array]:
        return None, blocks.sum(expert, product, (x.shape[1], dy.shape[1])).astype(x.dtype)

    return jax.lax.scan(gradient, None, jnp.arange(sizes.shape[0]))[1]
