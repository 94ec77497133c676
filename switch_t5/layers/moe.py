"""The sparse layer: a router and a feed-forward for each expert.

Source: Fedus et al. 2022, section 2; the routers are those of :mod:`switch_t5.routing.router`. Tokens are grouped
``[G, S, D]``, dispatched to ``[G, E, C, D]``, and turned so that the expert axis takes the mesh axis that the groups
shared with it: that turn is the only all-to-all, and the turn back the second.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.errors import ConfigError, check_types
from switch_t5.layers.dense import FeedForward
from switch_t5.layers.dropout import dropout, split_rng
from switch_t5.layers.initializers import Initialization, initializer
from switch_t5.layers.parameter import parameter
from switch_t5.partitioning.rules import constrain
from switch_t5.routing.balance import BalanceScope, RouterStats, router_stats
from switch_t5.routing.capacity import GroupSize, Rounding, expert_capacity, group_shape
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod
from switch_t5.routing.router import RouterConfig, Routing, route, route_without_logits
from switch_t5.types import Array

TOKEN_AXES = ("batch", None, "embed")
DISPATCHED_AXES = ("batch", None, None, "embed")
EXPERT_AXES = ("expert", "expert_batch", None, "embed")

Padding = Literal["ignored", "counted", "zeroed", "routed"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a sparse layer has beyond a dense one.

    Attributes:
      num_experts: experts in each sparse layer.
      group_size: encoder tokens routed together, or ``sequence`` for each sequence on its own, see
        :func:`switch_t5.routing.capacity.group_shape`. A group's tokens compete for an expert's slots, so this
        is part of the model and never of the mesh.
      train_capacity_factor: slots per token in training.
      eval_capacity_factor: slots per token in evaluation.
      min_expert_capacity: the least slots of an expert for a group.
      capacity_rounding: ``floor`` (Mesh TensorFlow), ``round`` (T5X) or ``ceil``.
      expert_capacity: slots of an expert for a group, in training and evaluation, in place of factors, rounding
        and least (Hugging Face); None computes them.
      padding: ``ignored`` takes no slot and counts nowhere; ``counted`` takes no slot, but is among the tokens
        of the load-balance loss (Mesh TensorFlow); ``routed`` is a token as any other (Hugging Face);
        ``zeroed`` too, but its input is zero, so that it chooses the first expert (T5X).
      router: which router, and its own numbers.
      jitter_noise: the router's input is multiplied by U(1 - jitter, 1 + jitter) in training.
      router_input_dropout_rate: dropout of the router's input, another exploration of the paper's appendix C.
      router_dtype: ``float32`` is the paper's selective precision; ``bfloat16`` reproduces its table 2.
      balance_scope: whether the load-balance loss wants each ``group`` balanced, or the ``batch`` as a whole.
      num_shared_experts: experts beside the routed ones that every token passes (DeepSeekMoE, Dai et al. 2024).
      expert_dropout_rate: dropout inside the experts, in place of ``dropout_rate`` (table 4).
      dispatch: ``gather``, or ``einsum``, the reference.
    """

    num_experts: int
    group_size: GroupSize = 4096
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    capacity_rounding: Rounding = "floor"
    expert_capacity: int | None = None
    padding: Padding = "ignored"
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    jitter_noise: float = 1e-2
    router_input_dropout_rate: float = 0.0
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    balance_scope: BalanceScope = "group"
    num_shared_experts: int = 0
    expert_dropout_rate: float = 0.0
    dispatch: DispatchMethod = "gather"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("num_experts", "group_size", "min_expert_capacity", "expert_capacity"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be at least 1, got {value}.")
        for field in ("train_capacity_factor", "eval_capacity_factor"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"MoEConfig.{field}", f"must be above 0, got {getattr(self, field)}.")
        for field in ("jitter_noise", "router_input_dropout_rate", "expert_dropout_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be in [0, 1), got {getattr(self, field)}.")
        if self.num_shared_experts < 0:
            raise ConfigError("MoEConfig.num_shared_experts", f"must not be negative, got {self.num_shared_experts}.")
        if self.padding == "counted" and self.router.router in ("expert_choice", "sinkhorn"):
            raise ConfigError(
                "MoEConfig.padding",
                f"'counted' has no meaning for the router {self.router.router!r}, whose choices depend on all tokens "
                "that are routed; give 'ignored' or 'routed'.",
            )
        self.router.check_experts(self.num_experts)

    def capacity(self, tokens: int, train: bool) -> int:
        """Slots of an expert for a group of so many tokens."""
        if self.expert_capacity is not None:
            return min(self.expert_capacity, tokens)
        return expert_capacity(
            tokens,
            self.num_experts,
            self.train_capacity_factor if train else self.eval_capacity_factor,
            min_expert_capacity=self.min_expert_capacity,
            rounding=self.capacity_rounding,
        )


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
        num_experts = config.num_experts
        if config.router.has_kernel:
            init = initializer("router", convention, fan_in=emb_dim)
            # Every device routes its own tokens over all experts, so the router is whole everywhere.
            self.router = parameter(rngs, init, (emb_dim, num_experts), ("embed", None))
        if config.router.has_bias:
            self.router_bias = parameter(rngs, jax.nn.initializers.zeros, (num_experts,), (None,))
        self.experts = FeedForward(emb_dim, mlp_dim, activations, convention, num_experts=num_experts, rngs=rngs)
        if config.num_shared_experts:
            shared_dim = config.num_shared_experts * mlp_dim
            self.shared_experts = FeedForward(emb_dim, shared_dim, activations, convention, rngs=rngs)

    def __call__(
        self, x: Array, mask: Array, *, tokens: Array, sequences: int, train: bool, rng: Array | None
    ) -> tuple[Array, RouterStats]:
        """Routes, dispatches, applies the experts and combines.

        A token with a logit that is infinite or not a number takes no slot and counts nowhere but in the
        statistics' ``nonfinite``, so that it cannot reach another token's output, whatever padding does.

        Args:
          x: ``[batch, length, embed]``.
          mask: ``[batch, length]`` bool; False for padding, see :class:`MoEConfig`.
          tokens: ``[batch, length]`` int32, entries of the vocabulary, for hash routing.
          sequences: sequences in a routing group.
          train: chooses the capacity factor, and noise and dropout where there is an ``rng``.
          rng: None where nothing is random.

        Returns:
          ``[batch, length, embed]`` (zero for a token without a slot, but for shared experts) and the layer's
          statistics.
        """
        padding = self.config.padding
        batch, length, emb_dim = x.shape
        groups, size = group_shape(batch, length, self.config.group_size, sequences)
        input_rng, choice_rng, dropout_rng, shared_rng = self._rngs(rng)
        x = constrain(x.reshape(groups, size, emb_dim), TOKEN_AXES)
        real, tokens = mask.reshape(groups, size), tokens.reshape(groups, size)
        if padding == "zeroed":
            x = jnp.where(real[..., None], x, 0)
        everyone = jnp.ones_like(real)
        asking = everyone if padding in ("zeroed", "routed") else real

        router_logits, counted = self._router_logits(x, everyone if padding == "counted" else asking, input_rng)
        mask = counted & real if padding == "counted" else counted
        routing = self._route(router_logits, mask, tokens, train, choice_rng)
        if padding == "counted":
            load = self._route(router_logits, counted, tokens, train, choice_rng).load
            routing = dataclasses.replace(routing, load=load)
        stats = router_stats(routing, router_logits, mask, asking, counted=counted, scope=self.config.balance_scope)

        dispatcher = DISPATCHERS[self.config.dispatch]
        outputs = self._apply_experts(dispatcher.dispatch(x, routing.assignment), dropout_rng)
        combined = constrain(dispatcher.combine(outputs, routing.assignment), TOKEN_AXES)
        if self.config.num_shared_experts:
            combined += self._apply_shared(x, shared_rng)
        return combined.reshape(batch, length, emb_dim), stats

    def _rngs(self, rng: Array | None) -> list[Array | None]:
        """Keys for the router's input, its choice, the experts and the shared experts."""
        # The first two of four keys would differ from the two that a plain Switch layer has always drawn.
        first, second = split_rng(rng, 2)
        third, fourth = split_rng(None if rng is None else jax.random.fold_in(rng, 1), 2)
        return [first, third, second, fourth]

    def _route(
        self, router_logits: Array | None, mask: Array, tokens: Array, train: bool, rng: Array | None
    ) -> Routing:
        config, capacity = self.config.router, self.capacity(mask.shape[-1], train)
        if router_logits is None:
            return route_without_logits(config, self.config.num_experts, capacity, mask, tokens, rng=rng)
        bias = jax.lax.stop_gradient(self.router_bias[...]) if config.has_bias else None
        return route(config, router_logits, capacity, mask, bias=bias, train=train, rng=rng)

    def capacity(self, tokens: int, train: bool) -> int:
        """Slots of an expert for a group of so many tokens."""
        return self.config.capacity(tokens, train)

    def _router_logits(self, x: Array, mask: Array, rng: Array | None) -> tuple[Array | None, Array]:
        """``[G, S, E]`` in the router's dtype, and the mask without the tokens whose logits are not finite."""
        if not self.config.router.has_kernel:
            return None, mask
        x = x.astype(self.config.router_dtype)
        if rng is not None and self.config.jitter_noise:
            noise = self.config.jitter_noise
            x *= jax.random.uniform(rng, x.shape, x.dtype, 1 - noise, 1 + noise)
        dropout_rng = None if rng is None else jax.random.fold_in(rng, 1)
        x = dropout(x, self.config.router_input_dropout_rate, dropout_rng, broadcast_dim=None)
        # Accelerators multiply float32 in fewer bits unless asked: the router is where they count.
        logits = jnp.matmul(x, self.router[...].astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
        finite = jnp.all(jnp.isfinite(logits), axis=-1)
        return jnp.where(finite[..., None], logits, 0), mask & finite

    def _apply_shared(self, x: Array, rng: Array | None) -> Array:
        rate = self.config.expert_dropout_rate
        return self.shared_experts(x, hidden_axes=("batch", None, "mlp"), dropout_rate=rate, rng=rng)

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
