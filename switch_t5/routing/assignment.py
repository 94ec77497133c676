"""Which experts, and which of their slots, each token gets: the result of every router.

Shapes are per routing group; see :mod:`switch_t5.types` for the letters. K is the number of choices of a token.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from switch_t5.types import Array


@partial(jax.tree_util.register_dataclass, data_fields=["expert", "weight"], meta_fields=["num_experts"])
@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Which experts a group's tokens want; where experts have no capacity, also those that they get.

    Attributes:
      expert: ``[G, S, K]`` int32, the chosen expert; ``num_experts`` where there is no choice (padding, or an
        expert that did not take the token).
      weight: ``[G, S, K]`` float, what scales the expert's output.
      num_experts: E.
    """

    expert: Array
    weight: Array
    num_experts: int

    @property
    def kept(self) -> Array:
        """``[G, S]`` bool: an expert takes the token."""
        return jnp.any(self.expert < self.num_experts, axis=-1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["expert", "weight", "slot", "entry"],
    meta_fields=["num_experts", "capacity"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment(Choices):
    """A one-to-one map between the kept choices of a group's tokens and slots of the experts.

    Attributes:
      slot: ``[G, S, K]`` int32, ``expert * capacity + position``; ``num_experts * capacity`` where the choice
        has no slot.
      entry: ``[G, E * C]`` int32, the inverse of ``slot``: ``token * K + choice``; ``S * K`` where the slot is
        empty.
      capacity: C.
    """

    slot: Array
    entry: Array
    capacity: int

    @property
    def token(self) -> Array:
        """``[G, E * C]`` int32: the token in each slot; ``S`` where it is empty."""
        return self.entry // self.slot.shape[-1]

    @property
    def kept(self) -> Array:
        """``[G, S]`` bool: the token has a slot."""
        return jnp.any(self.slot < self.num_experts * self.capacity, axis=-1)


@partial(jax.tree_util.register_dataclass, data_fields=["row", "entry", "sizes", "number"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RowOrder:
    """N tokens' choices in R rows, sorted by expert, without slots.

    Attributes:
      row: ``[N, K]`` int32, a choice's place in the order; ``N * K`` where there is none.
      entry: ``[R]`` int32, its inverse: ``token * K + choice``; ``N * K`` in the rows past the last choice.
      sizes: ``[E]`` int32, the rows of each expert.
      number: ``[R]`` int32, what a row is known by on every mesh: its entry, or the slot that it stands for.
    """

    row: Array
    entry: Array
    sizes: Array
    number: Array


def sort_by_expert(expert: Array, num_experts: int) -> RowOrder:
    """Puts choices in the order of their experts, and for one expert in that of the tokens.

    Args:
      expert: ``[N, K]`` int32; outside of 0 to ``num_experts`` - 1 there is no choice.
      num_experts: E.
    """
    is_choice = (expert >= 0) & (expert < num_experts)
    expert = jnp.where(is_choice, expert, num_experts)
    order, _ = _sorted(expert.reshape(1, -1), num_experts)
    row = _inverse(order).reshape(expert.shape)
    sizes = load_of(expert[None], num_experts)[0]
    entry = jnp.where(jnp.arange(expert.size) < jnp.sum(sizes), order[0], expert.size)
    return RowOrder(jnp.where(is_choice, row, expert.size), entry, sizes, number=entry)


def filled_slots(assignment: Assignment) -> RowOrder:
    """The slots that tokens have, without the empty ones, expert by expert and for one expert group by group.

    There are at most as many rows as choices, and as slots. A row's number is its place in ``[E, G, C]``.
    """
    groups, tokens, choices = assignment.slot.shape
    experts, capacity = assignment.num_experts, assignment.capacity
    slots, entries = groups * experts * capacity, groups * tokens * choices
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    entry = assignment.entry.reshape(groups, experts, capacity)
    entry = jnp.where(entry < tokens * choices, entry + group * tokens * choices, entries)
    entry = jnp.swapaxes(entry, 0, 1).reshape(slots)
    filled = entry < entries
    number = jnp.sort(jnp.where(filled, jnp.arange(slots, dtype=jnp.int32), slots))[: min(slots, entries)]
    place = (assignment.slot // capacity * groups + group) * capacity + assignment.slot % capacity
    has_slot = assignment.slot < experts * capacity
    row = jnp.take(jnp.cumsum(filled, dtype=jnp.int32) - 1, jnp.where(has_slot, place, 0))
    return RowOrder(
        row=jnp.where(has_slot, row, entries).reshape(groups * tokens, choices),
        entry=jnp.take(entry, number, mode="fill", fill_value=entries),
        sizes=jnp.sum(filled.reshape(experts, groups * capacity), axis=1, dtype=jnp.int32),
        number=number,
    )


def assign_slots(
    expert: Array, weight: Array, num_experts: int, capacity: int | None, *, order: Array | None = None
) -> Choices:
    """Gives slots for all first choices in the tokens' order, then for all second choices, and so on.

    Source of the order: Lepikhin et al. 2020 (GShard), algorithm 1.

    Args:
      expert: ``[G, S, K]`` int32; ``num_experts`` for no choice.
      weight: ``[G, S, K]`` float.
      num_experts: E.
      capacity: slots of an expert for one group; None for as many as are asked for.
      order: ``[G, S]`` int32, the tokens in the order in which they are served; None for their own.

    Returns:
      An :class:`Assignment`; without capacity the choices as they are.
    """
    if capacity is None:
        return Choices(expert=expert, weight=weight, num_experts=num_experts)
    groups, tokens, choices = expert.shape
    in_order = expert if order is None else jnp.take_along_axis(expert, order[..., None], axis=1)
    queue = jnp.swapaxes(in_order, 1, 2).reshape(groups, choices * tokens)
    slot, place = _slots_of_queue(queue, num_experts, capacity)
    slot = jnp.swapaxes(slot.reshape(groups, choices, tokens), 1, 2)
    token, choice = place % tokens, place // tokens
    if order is not None:
        slot = jnp.take_along_axis(slot, _inverse(order)[..., None], axis=1)
        token = jnp.take_along_axis(order, token, axis=1)
    empty = place == choices * tokens
    entry = jnp.where(empty, tokens * choices, token * choices + choice)
    return Assignment(expert=expert, weight=weight, num_experts=num_experts, slot=slot, entry=entry, capacity=capacity)


def _inverse(permutation: Array) -> Array:
    """The inverse of each row ``[G, N]``; sorted, since a scatter is slow everywhere."""
    return _sorted(permutation, permutation.shape[-1] - 1)[0]


def assignment_of_slots(expert: Array, slot: Array, weight: Array, num_experts: int, capacity: int) -> Assignment:
    """The assignment of slots that were given already, each expert's first ones first.

    Args:
      expert: ``[G, S, K]`` int32.
      slot: ``[G, S, K]`` int32; ``num_experts * capacity`` for no slot.
      weight: ``[G, S, K]`` float.
      num_experts: E.
      capacity: C.
    """
    places = slot.shape[1] * slot.shape[2]
    flat = slot.reshape(slot.shape[0], places)
    order = jnp.argsort(flat, axis=-1).astype(jnp.int32)
    entry = _holders(order, *_counts(flat // capacity, num_experts), num_experts, capacity)
    return Assignment(expert=expert, weight=weight, num_experts=num_experts, slot=slot, entry=entry, capacity=capacity)


def load_of(expert: Array, num_experts: int) -> Array:
    """``[G, E]`` int32: the choices ``[G, S, K]`` that fell on each expert (an index of ``num_experts`` is none)."""
    index = jnp.arange(num_experts)
    choices = [jnp.sum(expert[..., k, None] == index, axis=1, dtype=jnp.int32) for k in range(expert.shape[-1])]
    return sum(choices[1:], start=choices[0])


def position_in_expert(expert: Array, num_experts: int) -> Array:
    """``[G, N]`` int32: how many entries before this one name the same expert; ``expert`` ``[G, N]`` int32."""
    order, ordered_expert = _sorted(expert, num_experts)
    rank = _ranks(ordered_expert, _counts(expert, num_experts)[0])
    return jnp.take_along_axis(rank, _inverse(order), axis=-1)


def _slots_of_queue(expert: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Gives each expert's slots to those who ask, ``[G, N]``, in their order; returns slots and who has each slot.

    Entries are sorted by (expert, place in the queue). A slot is then the distance from the expert's first
    entry, and who has it is a look-up: nothing of size tokens x experts x capacity, and no scatter.
    """
    order, ordered_expert = _sorted(expert, num_experts)
    first, count = _counts(expert, num_experts)
    rank = _ranks(ordered_expert, first)
    fits = (rank < capacity) & (ordered_expert < num_experts)
    ordered_slot = jnp.where(fits, ordered_expert * capacity + rank, num_experts * capacity)
    slot = jnp.take_along_axis(ordered_slot, _inverse(order), axis=-1)
    return slot, _holders(order, first, count, num_experts, capacity)


def _sorted(key: Array, largest: int) -> tuple[Array, Array]:
    """The entries ``[G, N]``, of 0 to ``largest``, sorted by (key, place): their places, and their keys.

    Where a key and its place fit one int32, that is what is sorted: several times as fast as pairs on a CPU.
    """
    places = key.shape[-1]
    place = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), key.shape)
    if (largest + 1) * places <= 2**31:
        ordered = jnp.sort(key * places + place, axis=-1)
        return ordered % places, ordered // places
    ordered, order = jax.lax.sort((key, place), num_keys=1, is_stable=True)
    return order, ordered


def _ranks(ordered_expert: Array, first: Array) -> Array:
    """``[G, N]``: how far each sorted entry stands behind its expert's first."""
    place = jnp.arange(ordered_expert.shape[-1], dtype=jnp.int32)
    return place - jnp.take_along_axis(first, ordered_expert, axis=-1)


def _counts(expert: Array, num_experts: int) -> tuple[Array, Array]:
    """``[G, E + 1]``: the entries before each expert's first among the sorted ones, and the entries of each."""
    count = load_of(expert[..., None], num_experts + 1)
    return jnp.cumsum(count, axis=-1) - count, count


def _holders(order: Array, first: Array, count: Array, num_experts: int, capacity: int) -> Array:
    """``[G, E * C]``: who has each slot, of the entries in ``order`` ``[G, N]``; N where nobody has."""
    groups, places = order.shape
    seat = jnp.arange(capacity, dtype=jnp.int32)
    taken = (seat < count[:, :num_experts, None]).reshape(groups, num_experts * capacity)
    source = (first[:, :num_experts, None] + seat).reshape(groups, num_experts * capacity)
    return jnp.where(taken, jnp.take_along_axis(order, jnp.where(taken, source, 0), axis=-1), places)
