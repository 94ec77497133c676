"""How many tokens make a routing group, and how many slots an expert has for it.

Source: Fedus et al. 2022, section 2.2 (expert capacity), and Mesh TensorFlow's ``moe.py`` (groups, minimum).
"""

from __future__ import annotations

import math
from typing import Literal

Rounding = Literal["floor", "round", "ceil"]


def group_shape(batch: int, length: int, group_size: int) -> tuple[int, int]:
    """Divides ``[batch, length]`` tokens into routing groups.

    A group holds ``group_size // length`` whole sequences, or, where not even one fits, an equal part of a
    sequence: the largest divisor of ``length`` that is at most ``group_size``. So a group depends on the
    length and on ``group_size`` alone, never on the mesh or on how a batch is split into microbatches. A
    batch with fewer sequences than a group is one group.

    Returns:
      (groups, tokens in each).

    Raises:
      ValueError: the batch is not a whole number of groups.
    """
    if length > group_size:
        tokens = max(d for d in range(1, group_size + 1) if length % d == 0)
        return batch * (length // tokens), tokens
    rows = min(group_size // length, batch)
    if batch % rows:
        raise ValueError(
            f"groups of {rows} sequences ({group_size} tokens of group_size / {length} of length) do not divide "
            f"a batch of {batch} sequences"
        )
    return batch // rows, rows * length


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
      rounding: Mesh TensorFlow takes the floor, T5X rounds (half to even).

    Returns:
      The capacity; never more than the group's tokens, since none can use more.
    """
    exact = group_tokens * capacity_factor / num_experts
    slots = {"floor": math.floor, "round": round, "ceil": math.ceil}[rounding](exact)
    return min(max(slots, min_expert_capacity), group_tokens)
