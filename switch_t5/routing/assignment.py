"""Which expert, and which of its slots, each token gets.

Pure functions of router probabilities; every shape is per routing group. See :mod:`switch_t5.types` for the
letters.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from switch_t5.types import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["expert", "slot", "token", "weight"],
    meta_fields=["num_experts", "capacity"],
)
@dataclasses.dataclass(frozen=True)
class Assignment:
    """A one-to-one map between the kept tokens of a group and slots of the experts.

    Attributes:
      expert: ``[G, S]`` int32, the chosen expert before capacity; ``num_experts`` for a padding token.
      slot: ``[G, S]`` int32, ``expert * capacity + position``; ``num_experts * capacity`` where the token
        has no slot (dropped, or padding).
      token: ``[G, E * C]`` int32, the inverse of ``slot``; ``S`` where the slot is empty.
      weight: ``[G, S]`` float, the router probability that scales the expert's output (eq. 2).
      num_experts: E.
      capacity: C.
    """

    expert: Array
    slot: Array
    token: Array
    weight: Array
    num_experts: int
    capacity: int

    @property
    def kept(self) -> Array:
        """``[G, S]`` bool: the token has a slot."""
        return self.slot < self.num_experts * self.capacity


def top_1(router_probs: Array, capacity: int, mask: Array) -> Assignment:
    """Switch routing: each token goes to its most probable expert, first come first served.

    Source: Fedus et al. 2022, section 2.1. Ties go to the expert with the lower index. A token whose expert
    is full has no slot; the residual connection carries it on.

    Args:
      router_probs: ``[G, S, E]`` float.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool, False for padding, which takes no slot.
    """
    num_experts = router_probs.shape[-1]
    choice = jnp.argmax(router_probs, axis=-1).astype(jnp.int32)
    expert = jnp.where(mask, choice, num_experts)
    # A masked sum, where a maximum would share the gradient among ties and a gather would scatter it.
    weight = jnp.sum(jnp.where(expert[..., None] == jnp.arange(num_experts), router_probs, 0), axis=-1)
    slot, token = _slots_in_order(expert, num_experts, capacity)
    return Assignment(expert, slot, token, weight, num_experts, capacity)


def _slots_in_order(expert: Array, num_experts: int, capacity: int) -> tuple[Array, Array]:
    """Gives each expert's slots to its tokens in their order; returns ``slot`` and its inverse ``token``.

    Tokens are sorted by (expert, position). A token's slot is then its distance from the expert's first
    token, and a slot's token is a look-up: nothing of size tokens x experts x capacity, and no scatter.
    """
    groups, tokens = expert.shape
    position = jnp.arange(tokens, dtype=jnp.int32)
    ordered = jnp.sort(expert * tokens + position, axis=-1)
    order, ordered_expert = ordered % tokens, ordered // tokens
    count = jnp.sum(expert[..., None] == jnp.arange(num_experts + 1), axis=1, dtype=jnp.int32)
    first = jnp.cumsum(count, axis=-1) - count

    rank = position - jnp.take_along_axis(first, ordered_expert, axis=-1)
    fits = (rank < capacity) & (ordered_expert < num_experts)
    ordered_slot = jnp.where(fits, ordered_expert * capacity + rank, num_experts * capacity)
    inverse = jnp.sort(order * tokens + position, axis=-1) % tokens
    slot = jnp.take_along_axis(ordered_slot, inverse, axis=-1)

    seat = jnp.arange(capacity, dtype=jnp.int32)
    source = first[:, :num_experts, None] + seat
    taken = seat < count[:, :num_experts, None]
    source = jnp.where(taken, source, 0).reshape(groups, num_experts * capacity)
    token = jnp.where(taken.reshape(source.shape), jnp.take_along_axis(order, source, axis=-1), tokens)
    return slot, token
