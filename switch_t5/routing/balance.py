"""Losses that keep the experts evenly loaded, and statistics of what the router did.

Everything is a **sum** over tokens (or over groups, weighted by their tokens), so that values add over
groups, microbatches and devices; :meth:`RouterStats.means` divides once, at the end. A padding token counts nowhere.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from switch_t5.routing.assignment import Assignment
from switch_t5.types import Array


def load_balance_loss(router_probs: Array, expert: Array, mask: Array) -> Array:
    """E x sum_i f_i P_i of each group: 1 when tokens and probabilities are spread evenly.

    Source: Fedus et al. 2022, eq. 4-6 (without alpha). f_i is the fraction of the group's tokens whose first
    choice is expert i, before capacity, and P_i the mean probability of expert i.

    Args:
      router_probs: ``[G, S, E]`` float32.
      expert: ``[G, S]`` int32, the first choice.
      mask: ``[G, S]`` bool, False for padding.

    Returns:
      ``[G]`` float32; 0 for a group of padding alone.
    """
    num_experts = router_probs.shape[-1]
    tokens = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(router_probs.dtype)[:, None]
    fraction = expert_load(expert, num_experts).astype(router_probs.dtype) / tokens
    # A product where a sum over the second axis would do: XLA's CPU backend is slow at the latter.
    weights = mask.astype(router_probs.dtype)
    mean_prob = jnp.einsum("gse,gs->ge", router_probs, weights, precision=jax.lax.Precision.HIGHEST) / tokens
    return num_experts * jnp.sum(fraction * mean_prob, axis=-1)


def router_z_loss(router_logits: Array, mask: Array) -> Array:
    """logsumexp(logits)^2 of each token, 0 for padding.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.

    Args:
      router_logits: ``[G, S, E]`` float32.
      mask: ``[G, S]`` bool.

    Returns:
      ``[G, S]`` float32.
    """
    return jnp.square(jax.nn.logsumexp(router_logits, axis=-1)) * mask


def expert_load(expert: Array, num_experts: int) -> Array:
    """``[G, E]`` int32: tokens of each group that chose each expert (an index of ``num_experts`` counts nowhere)."""
    return jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "load_balance_loss",
        "router_z_loss",
        "expert_load",
        "dropped",
        "router_entropy",
        "router_confidence",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """What one layer's router did, as sums over real tokens.

    Layers stack along leading axes. All float32.

    Attributes:
      tokens: real tokens.
      load_balance_loss: the groups' losses, each times the group's real tokens.
      router_z_loss: the tokens' losses.
      expert_load: ``[..., E]`` tokens that chose each expert.
      dropped: tokens that found no slot.
      router_entropy: the entropies of the tokens' distributions, in nats.
      router_confidence: the probabilities of the tokens' first choices.
    """

    tokens: Array
    load_balance_loss: Array
    router_z_loss: Array
    expert_load: Array
    dropped: Array
    router_entropy: Array
    router_confidence: Array

    def means(self) -> dict[str, Array]:
        """Means over tokens: ``fraction_dropped``, ``expert_load`` (as fractions) and the others by name."""
        tokens = self.tokens + (self.tokens == 0)  # Of host arrays too, without a trip to a device.
        return {
            "load_balance_loss": self.load_balance_loss / tokens,
            "router_z_loss": self.router_z_loss / tokens,
            "expert_load": self.expert_load / tokens[..., None],
            "fraction_dropped": self.dropped / tokens,
            "router_entropy": self.router_entropy / tokens,
            "router_confidence": self.router_confidence / tokens,
        }


def router_stats(router_logits: Array, router_probs: Array, assignment: Assignment, mask: Array) -> RouterStats:
    """Sums up one layer.

    Args:
      router_logits: ``[G, S, E]``.
      router_probs: ``[G, S, E]``.
      assignment: of the same tokens.
      mask: ``[G, S]`` bool, False for padding.
    """
    logits, probs = router_logits.astype(jnp.float32), router_probs.astype(jnp.float32)
    group_tokens = jnp.sum(mask, axis=-1).astype(jnp.float32)
    group_losses = load_balance_loss(probs, assignment.expert, mask)
    frozen = jax.lax.stop_gradient((logits, probs))
    entropy = jax.nn.logsumexp(frozen[0], axis=-1) - jnp.sum(frozen[0] * frozen[1], axis=-1)
    load = expert_load(assignment.expert, assignment.num_experts)
    return RouterStats(
        tokens=jnp.sum(group_tokens),
        load_balance_loss=jnp.sum(group_losses * group_tokens),
        router_z_loss=jnp.sum(router_z_loss(logits, mask)),
        expert_load=jnp.sum(load, axis=0).astype(jnp.float32),
        dropped=jnp.sum(mask & ~assignment.kept).astype(jnp.float32),
        router_entropy=jnp.sum(entropy * mask),
        router_confidence=jnp.sum(jnp.max(frozen[1], axis=-1) * mask),
    )
