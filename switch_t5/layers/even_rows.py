"""The rows of experts that get about as many each, as one array of the same number of rows for each expert.

A loop over blocks of any number of rows copies a kernel for every few rows that it multiplies, and its gradient into
their stack; with many experts that takes as long as the products. All experts' even rows have kernel gradients in one
product that writes the stack itself.

Experts that get less than their share are filled up, and those are products for nothing: where loads are skewed, all
rows are left to the loop. Where a share is few rows, half of it is tried before that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from switch_t5.types import Array

Result = TypeVar("Result")

_MOST = 128
"""Rows of an expert up to which the copies of its kernels count beside its products."""

_HALVED = 64
"""The largest share of which half is worth taking too: copying kernels counts beside multiplying by so few rows."""

_FILLED = 0.65
"""The part of their places that rows must fill. Else the loop multiplies so many fewer that it is faster with its
copies."""


@dataclasses.dataclass(frozen=True)
class EvenRows:
    """The first rows of each expert, the same number of each; experts that have fewer are filled up with zeros.

    Attributes:
      share: int32, how many of each expert's rows these are: as many as there is room for, or 0.
      row: ``[expert, room]`` int32, where each stands among the rows sorted by expert.
      mine: ``[expert, room, 1]`` bool, which of them the expert has.
      nth: ``[rows]`` int32, which of its expert's rows a sorted row is.
      expert: ``[rows]`` int32, whose it is.
      inside: ``[rows, 1]`` bool, whether it is one of these.
    """

    share: Array
    row: Array
    mine: Array
    nth: Array
    expert: Array
    inside: Array

    def take(self, rows: Array) -> Array:
        """``[rows, columns]`` to ``[expert, room, columns]``."""
        return jnp.where(self.mine, rows[self.row], jnp.zeros((), rows.dtype))  # Masks stay masks.

    def put(self, even: Array, rows: Array | float = 0.0) -> Array:
        """``[rows, columns]``, or zeros, with ``even`` ``[expert, room, columns]`` in its places."""
        place = jnp.where(self.inside[:, 0], self.expert * even.shape[1] + self.nth, 0)
        return jnp.where(self.inside, even.reshape(-1, even.shape[-1])[place], rows)


@dataclasses.dataclass(frozen=True)
class EvenChoice:
    """Even rows of some numbers, of which at most one has any.

    Attributes:
      choices: for each number, those rows.
    """

    choices: tuple[EvenRows, ...] = ()

    @property
    def share(self) -> Array | int:
        """int32, the share of those that are there; 0 where none are."""
        return sum(even.share for even in self.choices)

    def work(self, function: Callable[..., Result], nothing: Callable[..., Result], *operands: Any) -> Result:
        """``function`` of such rows and of ``operands``, or ``nothing`` of those where there are no such rows."""
        branch = sum(nth * (even.share > 0) for nth, even in enumerate(self.choices, 1))
        return jax.lax.switch(branch, [nothing, *(partial(function, even) for even in self.choices)], *operands)

    def plus(self, value: Array, stack: Array, expert: Array) -> Array:
        """``value`` and what such rows have put in ``stack`` ``[expert, ...]``, which is not read without them."""
        if not self.choices:
            return value
        # A loop of one turn or none; the turn is part of where it reads, or XLA would read before the loop.
        turns = jnp.asarray(self.share > 0, jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda turn, value: value + stack[expert + turn], value)


def even_share(rows: int, num_experts: int) -> int:
    """How many rows of each expert are worth taking evenly; 0 where the loop over blocks is as fast.

    Args:
      rows: of all experts together.
      num_experts: all of them, wherever they are.
    """
    share = -(-rows // num_experts)
    return share if share <= _MOST else 0


def even_choice(rows: int, sizes: Array, share: int) -> EvenChoice:
    """The first ``share`` rows of each expert where they fill enough places; else half of a small share; else none.

    Args:
      rows: sorted by expert, and those after the last expert's.
      sizes: ``[expert]`` int32, how many rows each has.
      share: of an expert; 0 for none of any.
    """
    choice = EvenChoice()
    for some in (share, share // 2 if share <= _HALVED else 0):
        if some:
            choice = EvenChoice((*choice.choices, even_rows(rows, sizes, some, choice.share == 0)))
    return choice


def even_rows(rows: int, sizes: Array, share: int, wanted: Array | bool = True) -> EvenRows:
    """The first ``share`` rows of each expert where they are ``wanted`` and fill enough places, else none.

    Args:
      rows: as those of :func:`even_choice`.
      sizes: the same.
      share: at least 1.
      wanted: bool.
    """
    filled = jnp.sum(jnp.minimum(sizes, share)) >= _FILLED * share * sizes.shape[0]
    taken = jnp.where(filled & wanted, share, 0)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    offset = jnp.arange(share, dtype=jnp.int32)
    row = jnp.minimum(starts[:, None] + offset, rows - 1)
    every = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, every, side="right"), sizes.shape[0] - 1)
    nth = every - starts[expert]
    inside = (nth < taken) & (every < ends[-1])
    mine = offset < sizes[:, None]
    return EvenRows(taken, row, mine[..., None], nth, expert, inside[:, None])
