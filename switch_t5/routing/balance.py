"""Losses that keep the experts evenly loaded, and statistics of what the router did.

Everything is a **sum** over tokens (or over groups, weighted by their tokens), so that values add over
groups, microbatches and devices; :meth:`RouterStats.means` divides once, at the end. A token
outside the mask counts nowhere.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from switch_t5.routing.router import Routing
from switch_t5.types import Array

BalanceScope = Literal["group", "batch"]


def load_balance_loss(router_probs: Array, load: Array, mask: Array, *, scope: BalanceScope = "group") -> Array:
    """E x sum_i f_i P_i of each group: 1 when choices and probabilities are spread evenly.

    Source: Fedus et al. 2022, eq. 4-6 (without alpha). f_i is the fraction of the group's choices that fell on
    expert i, before capacity, and P_i the mean probability of expert i.

    Args:
      router_probs: ``[G, S, E]`` float32.
      load: ``[G, E]`` int32, the choices that fell on each expert.
      mask: ``[G, S]`` bool, False for padding.
      scope: ``group``: f and P are each group's own (Mesh TensorFlow, T5X); ``batch``: they are of all groups
        together, a weaker demand, whose value every group then has.

    Returns:
      ``[G]`` float32; 0 for a group of padding alone.
    """
    num_experts = router_probs.shape[-1]
    total_prob, tokens = _importance(router_probs, mask), jnp.sum(mask, axis=-1).astype(router_probs.dtype)
    if scope == "batch":
        load, total_prob, tokens = (
            jnp.broadcast_to(jnp.sum(x, axis=0, keepdims=True), x.shape) for x in (load, total_prob, tokens)
        )
    fraction = load.astype(router_probs.dtype) / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1)
    mean_prob = total_prob / jnp.maximum(tokens, 1)[:, None]
    return num_experts * jnp.sum(fraction * mean_prob, axis=-1)


def importance_loss(router_probs: Array, mask: Array) -> Array:
    """The squared variation of the experts' summed probabilities, ``[G]``; 0 for a group of padding alone.

    Source: Shazeer et al. 2017, eq. 6-7; of the whole softmax, as Riquelme et al. 2021.

    Args:
      router_probs: ``[G, S, E]`` float32.
      mask: ``[G, S]`` bool.
    """
    return _squared_variation(_importance(router_probs, mask))


def load_loss(load_probs: Array, mask: Array) -> Array:
    """The squared variation of the experts' expected number of tokens, ``[G]``.

    Source: Shazeer et al. 2017, eq. 8-11.

    Args:
      load_probs: ``[G, S, E]``, the probability that noise lets the token choose the expert.
      mask: ``[G, S]`` bool.
    """
    return _squared_variation(_importance(load_probs, mask))


def _importance(probs: Array, mask: Array) -> Array:
    """``[G, E]``: sums over real tokens."""
    # A product where a sum over the second axis would do: XLA's CPU backend is slow at the latter.
    return jnp.einsum("gse,gs->ge", probs, mask.astype(probs.dtype), precision=jax.lax.Precision.HIGHEST)


def _squared_variation(x: Array) -> Array:
    """Population variance over squared mean along the last axis; 0 where all is 0."""
    mean = jnp.mean(x, axis=-1)
    return jnp.var(x, axis=-1) / jnp.where(mean > 0, jnp.square(mean), 1)


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "tokens",
        "counted",
        "load_balance_loss",
        "router_z_loss",
        "importance_loss",
        "load_loss",
        "expert_load",
        "dropped",
        "router_entropy",
        "router_confidence",
        "nonfinite",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """What one layer's router did, as sums over the tokens that it routed.

    Those are the real ones, and padding where the layer routes it. Layers stack along leading axes. All float32.

    Attributes:
      tokens: routed tokens.
      counted: tokens that the load-balance loss and ``expert_load`` count: the routed ones, and padding where the
        layer counts what it does not route.
      load_balance_loss: the groups' losses, each times the group's routed tokens.
      router_z_loss: the tokens' losses.
      importance_loss: as ``load_balance_loss``.
      load_loss: as ``load_balance_loss``; 0 without gaussian noise.
      expert_load: ``[..., E]`` choices that fell on each expert, before capacity.
      dropped: tokens that found no slot.
      router_entropy: the entropies of the tokens' distributions, in nats.
      router_confidence: the probabilities of the tokens' best experts.
      nonfinite: tokens left out because a logit was infinite or not a number.
    """

    tokens: Array
    counted: Array
    load_balance_loss: Array
    router_z_loss: Array
    importance_loss: Array
    load_loss: Array
    expert_load: Array
    dropped: Array
    router_entropy: Array
    router_confidence: Array
    nonfinite: Array

    def means(self) -> dict[str, Array]:
        """Means over tokens: ``fraction_dropped``, ``expert_load`` (as fractions) and the others by name."""
        # Of host arrays too, without a trip to a device.
        tokens, counted = (count + (count == 0) for count in (self.tokens, self.counted))
        return {
            "load_balance_loss": self.load_balance_loss / counted,
            "router_z_loss": self.router_z_loss / tokens,
            "importance_loss": self.importance_loss / tokens,
            "load_loss": self.load_loss / tokens,
            "expert_load": self.expert_load / counted[..., None],
            "fraction_dropped": self.dropped / tokens,
            "router_entropy": self.router_entropy / tokens,
            "router_confidence": self.router_confidence / tokens,
        }


def router_stats(
    routing: Routing,
    router_logits: Array | None,
    mask: Array,
    asking: Array,
    *,
    counted: Array | None = None,
    scope: BalanceScope = "group",
) -> RouterStats:
    """Sums up one layer.

    Args:
      routing: what the router decided; its ``load`` is of the tokens ``counted``.
      router_logits: ``[G, S, E]``, finite; None where the router has none.
      mask: ``[G, S]`` bool, the tokens that were routed.
      asking: ``[G, S]`` bool, ``mask`` and the tokens that are not in it for want of finite logits.
      counted: ``[G, S]`` bool, the tokens of which the load-balance loss takes f and P; None for ``mask``. Where
        there are more, a group's loss still weighs as its routed tokens, and its mean is over all that are
        counted: so Mesh TensorFlow, where the mask multiplies P after f and P were averaged over the group.
      scope: of the load-balance loss.
    """
    counted = mask if counted is None else counted
    probs = routing.probs.astype(jnp.float32)
    tokens = jnp.sum(mask, axis=-1).astype(jnp.float32)
    frozen = jax.lax.stop_gradient(probs)
    zero = jnp.zeros((), jnp.float32)

    def summed(losses: Array) -> Array:
        return jnp.sum(losses * tokens)

    return RouterStats(
        tokens=jnp.sum(tokens),
        counted=jnp.sum(counted).astype(jnp.float32),
        load_balance_loss=summed(load_balance_loss(probs, routing.load, counted, scope=scope)),
        router_z_loss=(
            zero if router_logits is None else jnp.sum(router_z_loss(router_logits.astype(jnp.float32), mask))
        ),
        importance_loss=summed(importance_loss(probs, mask)),
        load_loss=zero if routing.load_probs is None else summed(load_loss(routing.load_probs, mask)),
        expert_load=jnp.sum(routing.load, axis=0).astype(jnp.float32),
        dropped=jnp.sum(mask & ~routing.assignment.kept).astype(jnp.float32),
        router_entropy=-jnp.sum(jax.scipy.special.xlogy(frozen, frozen) * mask[..., None]),
        router_confidence=jnp.sum(jnp.max(frozen, axis=-1) * mask),
        nonfinite=jnp.sum(asking & ~mask).astype(jnp.float32),
    )
