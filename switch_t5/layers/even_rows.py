"""The rows of experts that get about as many each, as one array of the same number of rows for each expert.

A loop over blocks of any number of rows copies a kernel for every few rows that it multiplies, and its gradient into
their stack; with many experts that takes as long as the products. All experts' even rows have kernel gradients in one
product that writes the stack itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from switch_t5.types import Array

Result = TypeVar("Result")

_MOST = 128
"""Rows of an expert from which on the copies of its kernels no longer count beside its products."""

_EVEN = 4
"""One row in so many may be beyond its expert's share."""


@dataclasses.dataclass(frozen=True)
class EvenRows:
    """The first rows of each expert, the same number of each; experts that have fewer are filled up with zeros.

    Attributes:
      share: int32, how many of each expert's rows these are; 0 where none are, since the loads are not even.
      row: ``[expert, share]`` int32, where each stands among the rows sorted by expert.
      mine: ``[expert, share, 1]`` bool, which of them the expert has.
      place: ``[rows]`` int32, where a sorted row stands in ``expert * share``.
      inside: ``[rows, 1]`` bool, whether it does.
    """

    share: Array
    row: Array
    mine: Array
    place: Array
    inside: Array

    def take(self, rows: Array) -> Array:
        """``[rows, columns]`` to ``[expert, share, columns]``."""
        return jnp.where(self.mine, rows[self.row], 0)

    def put(self, even: Array, rows: Array) -> Array:
        """``[rows, columns]`` with ``even`` ``[expert, share, columns]`` in its places."""
        return jnp.where(self.inside, even.reshape(-1, even.shape[-1])[self.place], rows)

    def work(self, function: Callable[..., Result], *operands: Any) -> Result:
        """``function`` of ``operands`` where there are such rows; else zeros, which take no product."""
        shapes = jax.eval_shape(function, *operands)
        nothing = lambda *_: jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)  # noqa: E731
        return jax.lax.cond(self.share > 0, function, nothing, *operands)

    def plus(self, value: Array, stack: Array, expert: Array) -> Array:
        """``value`` and what such rows have put in ``stack`` ``[expert, ...]``, which is not read without them."""
        # A loop of one turn or none; the turn is part of where it reads, or XLA would read before the loop.
        turns = (self.share > 0).astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda turn, value: value + stack[expert + turn], value)


def even_share(rows: int, num_experts: int) -> int:
    """How many rows of each expert are worth taking evenly; 0 where the loop over blocks is as fast.

    Args:
      rows: of all experts together.
      num_experts: all of them, wherever they are.
    """
    share = -(-rows // num_experts)
    return share if share <= _MOST else 0


def even_rows(rows: int, sizes: Array, share: int) -> EvenRows:
    """The first ``share`` of each expert's rows, where the loads are even; else none of them.

    Args:
      rows: sorted by expert, and those after the last expert's.
      sizes: ``[expert]`` int32, how many rows each has.
      share: at least 1.
    """
    # Where loads are skewed, the loop multiplies fewer rows.
    beyond = jnp.sum(jnp.maximum(sizes - share, 0))
    used = beyond * _EVEN <= jnp.sum(sizes)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    offset = jnp.arange(share, dtype=jnp.int32)
    row = jnp.minimum(starts[:, None] + offset, rows - 1)
    every = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, every, side="right"), sizes.shape[0] - 1)
    nth = every - starts[expert]
    inside = used & (nth < share) & (every < ends[-1])
    place = jnp.where(inside, expert * share + nth, 0)
    mine = (offset < sizes[:, None])[..., None]
    return EvenRows(jnp.where(used, share, 0), row, mine, place, inside[:, None])
