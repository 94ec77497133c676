"""The routers of the literature: pure functions from logits to an :class:`Assignment`.

Each takes ``mask`` ``[G, S]`` bool, False for padding, which takes no slot, and returns for every token its
choices, their slots and their weights. Where ``capacity`` may be None it stands for slots without end: every
choice is kept, and none has a slot. Among equals the expert of lower index and the earlier token win.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from switch_t5.routing.assignment import (
    Assignment,
    Choices,
    assign_slots,
    assignment_of_slots,
    load_of,
    position_in_expert,
)
from switch_t5.types import Array


def top_k(
    router_probs: Array,
    capacity: int | None,
    mask: Array,
    *,
    k: int = 1,
    scores: Array | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    batch_prioritized: bool = False,
) -> Choices:
    """Each token goes to its k best experts.

    Source: Fedus et al. 2022, section 2.1, for k = 1; Shazeer et al. 2017 and Lepikhin et al. 2020 for more;
    Riquelme et al. 2021, section 4 (batch-prioritized routing).

    Args:
      router_probs: ``[G, S, E]`` float; the chosen ones are the weights.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool.
      k: choices of a token.
      scores: ``[G, S, E]``, what experts are chosen by in place of ``router_probs``: with noise, a bias or
        potentials. They take no gradient.
      renormalize: divide a token's weights by their sum.
      scale: of the weights.
      batch_prioritized: serve tokens by descending largest probability, so that an overflow drops the least
        sure; a token's slot then depends on later tokens.
    """
    num_experts = router_probs.shape[-1]
    chosen = _best(jax.lax.stop_gradient(router_probs if scores is None else scores), k)
    expert = jnp.where(mask[..., None], chosen, num_experts)
    weight = _probs_of(router_probs, expert)
    if renormalize:
        weight = _renormalized(weight)
    if scale != 1:
        weight = weight * scale
    order = None
    if batch_prioritized:
        confidence = jax.lax.stop_gradient(jnp.max(router_probs, axis=-1))
        order = jnp.argsort(-confidence, axis=-1, stable=True).astype(jnp.int32)
    return assign_slots(expert, weight, num_experts, capacity, order=order)


def gshard_top_2(router_probs: Array, capacity: int | None, mask: Array, *, uniform: Array) -> Choices:
    """The best expert, and the second best with a probability of twice its share.

    Source: Lepikhin et al. 2020, algorithm 1. The two weights are divided by their sum.

    Args:
      router_probs: ``[G, S, E]`` float.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool.
      uniform: ``[G, S]`` in [0, 1): a token asks for its second expert where twice the weight exceeds it.
    """
    num_experts = router_probs.shape[-1]
    chosen = jnp.where(mask[..., None], _best(jax.lax.stop_gradient(router_probs), 2), num_experts)
    weight = _renormalized(_probs_of(router_probs, chosen))
    asks = jnp.stack([mask, mask & (2 * weight[..., 1] > uniform)], axis=-1)
    expert = jnp.where(asks, chosen, num_experts)
    return assign_slots(expert, jnp.where(asks, weight, 0), num_experts, capacity)


def given(expert: Array, capacity: int | None, mask: Array, num_experts: int) -> Choices:
    """Experts that no router chose, with weight 1: baselines.

    Source: Roller et al. 2021 (hash layers).

    Args:
      expert: ``[G, S]`` int32.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool.
      num_experts: E.
    """
    expert = jnp.where(mask, expert, num_experts)[..., None]
    return assign_slots(expert, mask[..., None].astype(jnp.float32), num_experts, capacity)


def no_token_left_behind(router_probs: Array, capacity: int, mask: Array, *, rounds: int) -> Assignment:
    """Tokens that found no slot ask their next best expert, in rounds.

    Source: Fedus et al. 2022, appendix B. ``expert`` is the one that took the token, or its first choice where
    none did.

    Args:
      router_probs: ``[G, S, E]`` float.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool.
      rounds: experts that a token may ask.
    """
    num_experts = router_probs.shape[-1]
    none = num_experts * capacity
    ranking = _best(jax.lax.stop_gradient(router_probs), rounds)
    expert = jnp.where(mask, ranking[..., 0], num_experts)
    slot = jnp.full(mask.shape, none, jnp.int32)
    used = jnp.zeros((mask.shape[0], num_experts), jnp.int32)
    for asked in range(rounds):
        asks = jnp.where(mask & (slot == none), ranking[..., asked], num_experts)
        position = position_in_expert(asks, num_experts) + _look_up(used, asks)
        gets = (asks < num_experts) & (position < capacity)
        slot = jnp.where(gets, asks * capacity + position, slot)
        expert = jnp.where(gets, asks, expert)
        used = used + load_of(jnp.where(gets, asks, num_experts)[..., None], num_experts)
    expert = expert[..., None]
    return assignment_of_slots(expert, slot[..., None], _probs_of(router_probs, expert), num_experts, capacity)


def expert_choice(router_probs: Array, capacity: int, mask: Array) -> Assignment:
    """Each expert takes its ``capacity`` most probable tokens; a token may have any number of experts.

    Source: Zhou et al. 2022, section 3.2. The load is even by construction and a token's experts depend on later
    tokens. K is E: a token's choice e is expert e.

    Args:
      router_probs: ``[G, S, E]`` float.
      capacity: slots of an expert for one group.
      mask: ``[G, S]`` bool.
    """
    num_experts = router_probs.shape[-1]
    # Padding comes last in every expert's list, and takes nothing.
    wanted = jnp.where(mask[..., None], jax.lax.stop_gradient(router_probs), -1)
    order = jnp.argsort(-wanted, axis=1, stable=True)
    position = jnp.argsort(order, axis=1).astype(jnp.int32)
    taken = (position < capacity) & mask[..., None]
    index = jnp.arange(num_experts, dtype=jnp.int32)
    expert = jnp.where(taken, index, num_experts)
    slot = jnp.where(taken, index * capacity + position, num_experts * capacity)
    weight = jnp.where(taken, router_probs, 0)

    tokens = mask.shape[-1]
    token = jnp.swapaxes(order[:, :capacity], 1, 2).astype(jnp.int32)
    is_full = jnp.arange(capacity) < jnp.sum(mask, axis=-1)[:, None, None]
    entry = jnp.where(is_full, token * num_experts + index[:, None], tokens * num_experts)
    entry = entry.reshape(mask.shape[0], num_experts * capacity)
    return Assignment(expert=expert, weight=weight, num_experts=num_experts, slot=slot, entry=entry, capacity=capacity)


def sinkhorn_scores(router_logits: Array, mask: Array, iterations: int) -> Array:
    """Logits plus the potentials that spread a group's tokens evenly over the experts, ``[G, S, E]``.

    Source: Clark et al. 2022, section 3.1 (S-BASE), after Lewis et al. 2021. The largest entry of a token is its
    choice in the balanced plan; it depends on later tokens.

    Args:
      router_logits: ``[G, S, E]`` float32.
      mask: ``[G, S]`` bool; padding has no part in the plan.
      iterations: of Sinkhorn's algorithm.
    """
    logits = jax.lax.stop_gradient(router_logits)
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1)[:, None]
    share = jnp.log(tokens / logits.shape[-1])
    hidden = jnp.where(mask, 0, -jnp.inf)[..., None]
    potential = jnp.zeros((logits.shape[0], logits.shape[-1]), logits.dtype)

    def iterate(_: Array, potential: Array) -> Array:
        of_token = -jax.nn.logsumexp(logits + potential[:, None], axis=-1, keepdims=True)
        total = jax.nn.logsumexp(logits + of_token + hidden, axis=1)
        return jnp.where(jnp.any(mask, axis=-1)[:, None], share - total, 0)

    potential = jax.lax.fori_loop(0, iterations, iterate, potential)
    return logits + potential[:, None]


def limited_scores(scores: Array, k: int, num_expert_groups: int, num_limited_groups: int) -> Array:
    """Scores with all but the best groups of experts excluded, ``[..., E]``.

    Source: DeepSeek-V3 (2024), section 2.1.2 (node-limited routing). A group's score is the sum of its best
    ``k / num_limited_groups``. The released code takes two, which is the same for its 8 experts of 4 groups.

    Args:
      scores: ``[..., E]``.
      k: experts that a token is to have.
      num_expert_groups: equal groups of consecutive experts.
      num_limited_groups: groups that a token may choose from.
    """
    if num_limited_groups == num_expert_groups:
        return scores
    grouped = scores.reshape(*scores.shape[:-1], num_expert_groups, -1)
    best = jax.lax.top_k(grouped, min(max(1, k // num_limited_groups), grouped.shape[-1]))[0]
    kept = _best(jnp.sum(best, axis=-1), num_limited_groups)
    is_kept = jnp.any(kept[..., None] == jnp.arange(num_expert_groups), axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(scores.shape)


def load_probabilities(router_logits: Array, noisy_logits: Array, k: int, noise_std: float) -> Array:
    """The probability that each expert would be among the best k, had its noise been drawn anew, ``[G, S, E]``.

    Source: Shazeer et al. 2017, eq. 8-9, with one deviation for all experts (Riquelme et al. 2021).

    Args:
      router_logits: ``[G, S, E]``.
      noisy_logits: ``[G, S, E]``, what the choice was made by.
      k: choices of a token.
      noise_std: deviation of the noise.
    """
    num_experts = router_logits.shape[-1]
    if k >= num_experts:
        return jnp.ones_like(router_logits)
    best = jax.lax.top_k(noisy_logits, k + 1)[0]
    # Without itself, an expert among the best k has to beat the next one, any other the last of the k.
    is_chosen = noisy_logits > best[..., -1:]
    threshold = jnp.where(is_chosen, best[..., -1:], best[..., -2:-1])
    return jax.scipy.stats.norm.cdf((router_logits - threshold) / noise_std)


def hashed(tokens: Array, num_experts: int) -> Array:
    """An expert for each vocabulary entry, ``[...]`` int32, fixed for ever: a multiplicative hash of the token."""
    mixed = tokens.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
    return ((mixed ^ (mixed >> 13)) % jnp.uint32(num_experts)).astype(jnp.int32)


def _best(scores: Array, k: int) -> Array:
    """``[..., k]`` int32: the k best in descending order; the lower index first among equals."""
    if k == 1:  # Much the faster on CPU.
        return jnp.argmax(scores, axis=-1, keepdims=True).astype(jnp.int32)
    return jax.lax.top_k(scores, k)[1].astype(jnp.int32)


def _probs_of(router_probs: Array, expert: Array) -> Array:
    """``[G, S, K]``: the probabilities of ``expert`` ``[G, S, K]``, zero for no expert.

    A masked sum for each choice, where a gather would scatter its gradient.
    """
    index = jnp.arange(router_probs.shape[-1])
    weights = [
        jnp.sum(jnp.where(expert[..., choice, None] == index, router_probs, 0), axis=-1)
        for choice in range(expert.shape[-1])
    ]
    return jnp.stack(weights, axis=-1)


def _renormalized(weight: Array) -> Array:
    """``[..., K]`` divided by its sum; zeros, of padding, stay."""
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def _look_up(table: Array, expert: Array) -> Array:
    """``table[g, expert[g, s]]``; 0 past its end."""
    return jnp.take_along_axis(table, expert, axis=-1, mode="fill", fill_value=0)
