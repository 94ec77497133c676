"""How many tokens make a routing group, and how many slots an expert has for it.

Source: Fedus et al. 2022, section 2.2 (expert capacity), and Mesh TensorFlow's ``moe.py`` (groups, minimum).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

Rounding = Literal["floor", "round", "ceil"]
GroupSize = int | Literal["sequence"]


def sequences_per_group(group_size: GroupSize, encoder_length: int) -> int:
    """Whole sequences in a routing group: as many encoder inputs as ``group_size`` tokens hold, at least one.

    ``sequence`` is one, whatever its length.

    The decoder groups the same sequences, whose targets are shorter: one number then says how a batch may be
    split over devices and microbatches.
    """
    return 1 if group_size == "sequence" else max(1, group_size // encoder_length)


def group_shape(batch: int, length: int, group_size: GroupSize, sequences: int) -> tuple[int, int]:
    """Divides ``[batch, length]`` tokens into routing groups.

    A group is a number of whole sequences, or, where one alone exceeds ``group_size``, an equal part of a
    sequence: the largest divisor of ``length`` that does not. ``sequence`` makes a group of each. So it depends
    on lengths and configuration, never on the mesh or on how a batch is split into microbatches. Only a batch
    that is smaller than a group, as in inference, is one group whatever its size. A run whose parts would be less
    than half of what it asks for is refused before it starts (:mod:`switch_t5.cli.build`).

    Args:
      batch: sequences.
      length: tokens in each.
      group_size: tokens in a group at the most, or ``sequence``.
      sequences: of :func:`sequences_per_group`.

    Returns:
      (groups, tokens in each).

    Raises:
      ValueError: the batch is not a whole number of groups.
    """
    if group_size == "sequence":
        return batch, length
    if length > group_size:
        tokens = max(divisor for divisor in range(1, group_size + 1) if length % divisor == 0)
        return batch * (length // tokens), tokens
    sequences = min(sequences, batch)
    if batch % sequences:
        raise ValueError(f"routing groups of {sequences} sequences do not divide a batch of {batch}")
    return batch // sequences, sequences * length


def expert_capacity(
    group_tokens: int,
    num_experts: int,
    capacity_factor: float,
    *,
    min_expert_capacity: int = 4,
    rounding: Rounding = "floor",
) -> int:
    """Slots an expert has for the tokens of one group: tokens / experts x capacity factor.

    Args:
      group_tokens: tokens in a group, padding included.
      num_experts: experts in the layer.
      capacity_factor: 1.0 leaves room for a perfectly balanced group and no more.
      min_expert_capacity: the least number of slots.
      rounding: Mesh TensorFlow takes the floor, T5X rounds (half to even), both of a float64, and so it is here, to the
        last bit; ``ceil`` is that of the exact quotient, the factor being the decimal number that is written.

    Returns:
      The capacity; never more than the group's tokens, since none can use more.
    """
    if rounding == "ceil":
        # 110 tokens at 1.1 for 11 experts are 11 slots; as a float64 the quotient is a hair above, and its ceiling 12.
        slots = math.ceil(group_tokens * Fraction(str(capacity_factor)) / num_experts)
    else:
        slots = {"floor": math.floor, "round": round}[rounding](group_tokens * capacity_factor / num_experts)
    return min(max(slots, min_expert_capacity), group_tokens)
