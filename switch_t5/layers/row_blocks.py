"""Rows sorted by expert, worked on in blocks: how a CPU multiplies as many rows as each expert was sent.

A program has static shapes, so a loop over the experts takes an expert's rows in blocks: first the rest, in one block
of the least of a few sizes that holds it, then whole blocks of the largest size. What a block holds beyond the
expert's rows is computed and thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from switch_t5.types import Array

Carry = TypeVar("Carry")
Step = Callable[[Carry, "Block"], Carry]

_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of a block where an expert may have any number of them. One of 1024 is as fast a row as any larger one; smaller
ones waste a tenth on average."""

_FIFTHS, _MULTIPLE, _LARGEST = 5, 8, 1280
"""Where a capacity bounds an expert's rows, sizes are fifths of it: at a factor of 1.25 the even share is one."""


class Load(NamedTuple):
    """What is known of the experts' rows before they are counted.

    Attributes:
      most: what no expert has more of, where something bounds it.
      share: what each has where all have the same, if so few that they are taken evenly
        (:func:`switch_t5.layers.even_rows.even_share`); else 0.
    """

    most: int | None = None
    share: int = 0


UNKNOWN = Load()


@dataclasses.dataclass(frozen=True)
class Block:
    """Some of an expert's rows, and others that are not to be touched.

    Attributes:
      size: rows of the block.
      first: int32, where it begins.
      mine: ``[size, 1]`` bool, which of its rows are the expert's.
    """

    size: int
    first: Array
    mine: Array

    def read(self, rows: Array) -> Array:
        """``[..., rows, columns]`` to ``[..., size, columns]``, other experts' rows among them."""
        return jax.lax.dynamic_slice_in_dim(rows, self.first, self.size, axis=-2)

    def read_mine(self, rows: Array) -> Array:
        """The same, zero where a row is not the expert's."""
        return jnp.where(self.mine, self.read(rows), 0)

    def write(self, rows: Array, values: Array) -> Array:
        """``[..., rows, columns]`` with ``values`` ``[..., size, columns]`` in the expert's rows."""
        values = jnp.where(self.mine, values.astype(rows.dtype), self.read(rows))
        return jax.lax.dynamic_update_slice_in_dim(rows, values, self.first, axis=-2)


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """How each expert's rows are cut.

    Attributes:
      rows: of all experts, and those after the last expert's.
      sizes: that a block may have, ascending.
      start: ``[expert]`` int32, an expert's first row.
      rest: ``[expert]`` int32, its rows in the first block.
      choice: ``[expert]`` int32, which size that block has; -1 where the expert has no rows.
      whole: ``[expert]`` int32, how many blocks of the largest size follow.
      order: ``[expert]`` int32, the experts, those without rows last.
      busy: int32, how many have rows.
    """

    rows: int
    sizes: tuple[int, ...]
    start: Array
    rest: Array
    choice: Array
    whole: Array
    order: Array
    busy: Array

    def over_experts(self, work: Callable[[Array, Carry], Carry], carry: Carry) -> Carry:
        """Runs ``work`` on each expert that has rows."""
        return jax.lax.fori_loop(0, self.busy, lambda nth, carry: work(self.order[nth], carry), carry)

    def after(self, zero: Array) -> RowBlocks:
        """The same, in the flow of data behind a ``zero`` of :func:`switch_t5.routing.data_flow.zero_after`."""
        zero = zero.astype(jnp.int32)
        return dataclasses.replace(self, rest=self.rest + zero, choice=self.choice + zero)

    def loop(self, expert: Array, step: Step[Carry], carry: Carry) -> Carry:
        """Runs ``step`` on each of an expert's blocks; what it carries is updated in place."""
        # Loops of one turn or none, for a conditional would copy what is carried; a turn's number is part of where it
        # reads, or XLA would take the product out of its loop.
        for index, size in enumerate(self.sizes):
            turns = (self.choice[expert] == index).astype(jnp.int32)
            at = partial(self._block, size, self.start[expert], self.rest[expert])
            carry = jax.lax.fori_loop(0, turns, lambda turn, carry, at=at: step(carry, at(turn)), carry)
        first, size = self.start[expert] + self.rest[expert], self.sizes[-1]
        whole = lambda turn, carry: step(carry, self._block(size, first, size, turn))  # noqa: E731
        return jax.lax.fori_loop(0, self.whole[expert], whole, carry)

    def sum(self, expert: Array, product: Callable[[Block], Array], shape: tuple[int, ...]) -> Array:
        """The sum of ``product``, of ``shape`` and float32, over an expert's blocks; zero where it has none."""
        blocks = [lambda first, count, size=size: product(self._block(size, first, count, 0)) for size in self.sizes]
        nothing = lambda first, count: jnp.zeros(shape, jnp.float32)  # noqa: E731
        start, rest = self.start[expert], self.rest[expert]
        total = jax.lax.switch(self.choice[expert] + 1, [nothing, *blocks], start, rest)
        size = self.sizes[-1]
        add = lambda turn, total: total + product(self._block(size, start + rest, size, turn))  # noqa: E731
        return jax.lax.fori_loop(0, self.whole[expert], add, total)

    def _block(self, size: int, start: Array, count: Array | int, turn: Array | int) -> Block:
        """The ``turn``-th block of ``size`` rows from ``start`` on, of which the first ``count`` are wanted."""
        wanted = start + turn * size
        first = jnp.minimum(wanted, self.rows - size)
        row = first + jnp.arange(size)[:, None]
        return Block(size, first, (wanted <= row) & (row < wanted + count))


def cut(rows: int, counts: Array, most: int | None = None, skip: Array | int = 0) -> RowBlocks:
    """Cuts rows that are sorted by expert.

    Args:
      rows: how many there are.
      counts: ``[expert]`` int32, the rows of each; their sum is at most ``rows``.
      most: what no expert has more of, where something bounds it.
      skip: of each expert, so many first rows are left out.
    """
    start = jnp.cumsum(counts) - counts + jnp.minimum(counts, skip)
    counts = jnp.maximum(counts - skip, 0)
    if most is None:
        sizes = _SIZES
    else:
        most = min(most, _LARGEST)
        sizes = tuple(-(-most * part // (_FIFTHS * _MULTIPLE)) * _MULTIPLE for part in range(1, _FIFTHS + 1))
    # Not one of all rows, unless it is the only one: where that reads depends on no turn, and XLA would compute it for
    # every expert, used or not.
    sizes = tuple(sorted({size for size in sizes if size < rows} or {rows}))
    whole = jnp.maximum(counts - 1, 0) // sizes[-1]
    rest = counts - whole * sizes[-1]
    choice = jnp.where(rest > 0, jnp.searchsorted(jnp.asarray(sizes), rest), -1)
    order = jnp.argsort(counts == 0, stable=True)
    return RowBlocks(rows, sizes, start, rest, choice.astype(jnp.int32), whole, order, jnp.sum(counts > 0))


def summed_outer(left: Array, right: Array) -> Array:
    """``left`` ``[rows, a]`` transposed times ``right`` ``[rows, b]``, summed in float32: ``[a, b]``."""
    return jnp.matmul(left.T, right, preferred_element_type=jnp.float32)


def without_the_rest(rows: Array, sizes: Array) -> Array:
    """``[rows, columns]`` with zeros past the sum of ``sizes`` ``[expert]``."""
    return jnp.where(jnp.arange(rows.shape[0])[:, None] < jnp.sum(sizes), rows, 0)
