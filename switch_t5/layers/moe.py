"""The Switch layer: a router and a feed-forward for each expert.

Source: Fedus et al. 2022, section 2. Tokens are grouped ``[G, S, D]``, dispatched to ``[G, E, C, D]``, and
turned so that the expert axis takes the mesh axis that the groups shared with it: that turn is the only
all-to-all, and the turn back the second.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.errors import ConfigError, check_types
from switch_t5.layers.dense import FeedForward
from switch_t5.layers.dropout import split_rng
from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain
from switch_t5.routing.assignment import top_1
from switch_t5.routing.balance import RouterStats, router_stats
from switch_t5.routing.capacity import Rounding, expert_capacity, group_shape
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod
from switch_t5.types import Array

TOKEN_AXES = ("batch", None, "embed")
DISPATCHED_AXES = ("batch", None, None, "embed")
EXPERT_AXES = ("expert", "expert_batch", None, "embed")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a sparse layer has beyond a dense one.

    Attributes:
      num_experts: experts in each sparse layer.
      group_size: encoder tokens routed together, see :func:`switch_t5.routing.capacity.group_shape`. A
        group's tokens compete for an expert's slots, so this is part of the model and never of the mesh.
      train_capacity_factor: slots per token in training.
      eval_capacity_factor: slots per token in evaluation.
      min_expert_capacity: the least slots of an expert for a group.
      capacity_rounding: ``floor`` (Mesh TensorFlow), ``round`` (T5X) or ``ceil``.
      jitter_noise: the router's input is multiplied by U(1 - jitter, 1 + jitter) in training.
      router_dtype: ``float32`` is the paper's selective precision; ``bfloat16`` reproduces its table 2.
      expert_dropout_rate: dropout inside the experts, in place of ``dropout_rate`` (table 4).
      dispatch: ``gather``, or ``einsum``, the reference.
    """

    num_experts: int
    group_size: int = 4096
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    capacity_rounding: Rounding = "floor"
    jitter_noise: float = 1e-2
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    expert_dropout_rate: float = 0.0
    dispatch: DispatchMethod = "gather"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("num_experts", "group_size", "min_expert_capacity"):
            if getattr(self, field) < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be at least 1, got {getattr(self, field)}.")
        for field in ("train_capacity_factor", "eval_capacity_factor"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"MoEConfig.{field}", f"must be above 0, got {getattr(self, field)}.")
        for field in ("jitter_noise", "expert_dropout_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be in [0, 1), got {getattr(self, field)}.")


class SwitchFeedForward(nnx.Module):
    """A sparse feed-forward: each token passes through the one expert that its router prefers."""

    def __init__(
        self,
        config: MoEConfig,
        emb_dim: int,
        mlp_dim: int,
        activations: tuple[str, ...],
        convention: Initialization,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        init = initializer("router", convention, fan_in=emb_dim)
        # Every device routes its own tokens over all experts, so the router is whole everywhere.
        self.router = parameter(rngs, init, (emb_dim, config.num_experts), ("embed", None))
        self.experts = FeedForward(emb_dim, mlp_dim, activations, convention, num_experts=config.num_experts, rngs=rngs)

    def __call__(
        self, x: Array, mask: Array, *, sequences: int, train: bool, rng: Array | None
    ) -> tuple[Array, RouterStats]:
        """Routes, dispatches, applies the experts and combines.

        Args:
          x: ``[batch, length, embed]``.
          mask: ``[batch, length]`` bool; False for padding, which takes no slot and counts nowhere.
          sequences: sequences in a routing group.
          train: chooses the capacity factor, and jitter and dropout where there is an ``rng``.
          rng: None where nothing is random.

        Returns:
          ``[batch, length, embed]`` (zero for a token without a slot) and the layer's statistics.
        """
        batch, length, emb_dim = x.shape
        groups, tokens = group_shape(batch, length, self.config.group_size, sequences)
        x = constrain(x.reshape(groups, tokens, emb_dim), TOKEN_AXES)
        mask = mask.reshape(groups, tokens)
        jitter_rng, dropout_rng = split_rng(rng, 2)

        router_logits = self._router_logits(x, jitter_rng)
        router_probs = jax.nn.softmax(router_logits)
        assignment = top_1(router_probs, self.capacity(tokens, train), mask)
        stats = router_stats(router_logits, router_probs, assignment, mask)

        dispatcher = DISPATCHERS[self.config.dispatch]
        dispatched = dispatcher.dispatch(x, assignment)
        outputs = self._apply_experts(dispatched, dropout_rng)
        combined = constrain(dispatcher.combine(outputs, assignment), TOKEN_AXES)
        return combined.reshape(batch, length, emb_dim), stats

    def capacity(self, tokens: int, train: bool) -> int:
        """Slots of an expert for a group of so many tokens."""
        config = self.config
        return expert_capacity(
            tokens,
            config.num_experts,
            config.train_capacity_factor if train else config.eval_capacity_factor,
            min_expert_capacity=config.min_expert_capacity,
            rounding=config.capacity_rounding,
        )

    def _router_logits(self, x: Array, rng: Array | None) -> Array:
        """``[G, S, E]`` in the router's dtype."""
        x = x.astype(self.config.router_dtype)
        if rng is not None and self.config.jitter_noise:
            noise = self.config.jitter_noise
            x *= jax.random.uniform(rng, x.shape, x.dtype, 1 - noise, 1 + noise)
        # Accelerators multiply float32 in fewer bits unless asked: the router is where they count.
        return jnp.matmul(x, self.router[...].astype(x.dtype), precision=jax.lax.Precision.HIGHEST)

    def _apply_experts(self, dispatched: Array, rng: Array | None) -> Array:
        """``[G, E, C, D]`` to the same, through ``[E, G, C, D]`` sharded by expert."""
        groups, experts, capacity, emb_dim = dispatched.shape
        dispatched = constrain(dispatched, DISPATCHED_AXES)
        by_expert = constrain(jnp.swapaxes(dispatched, 0, 1), EXPERT_AXES)
        outputs = self.experts(
            by_expert.reshape(experts, groups * capacity, emb_dim),
            hidden_axes=("expert", "expert_batch", "expert_mlp"),
            dropout_rate=self.config.expert_dropout_rate,
            rng=rng,
        )
        outputs = constrain(outputs.reshape(experts, groups, capacity, emb_dim), EXPERT_AXES)
        return constrain(jnp.swapaxes(outputs, 0, 1), DISPATCHED_AXES)
