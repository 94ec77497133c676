"""The router that a configuration names: from logits to choices, slots and weights."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from switch_t5.errors import ConfigError, check_types
from switch_t5.routing import choice
from switch_t5.routing.assignment import Choices, load_of
from switch_t5.types import Array

RouterName = Literal[
    "top_k",
    "gshard_top_2",
    "no_token_left_behind",
    "sigmoid_top_k",
    "sinkhorn",
    "expert_choice",
    "hash",
    "random",
]
Exploration = Literal["argmax", "sample", "gaussian"]


_MOST = 2**16
"""Of anything that is counted: as many as experts at the most."""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """How tokens and experts find each other. ROUTING.md compares the routers.

    Attributes:
      router: ``top_k`` (Switch for one choice), ``gshard_top_2``, ``no_token_left_behind``, ``sigmoid_top_k``
        (DeepSeek-V3), ``sinkhorn`` (S-BASE), ``expert_choice``, or the baselines ``hash`` and ``random``, which
        have no parameters.
      num_selected_experts: experts of a token, for ``top_k``, ``sigmoid_top_k`` and ``sinkhorn``.
      renormalize_weights: divide a token's weights by their sum (``top_k``, ``sinkhorn``; ``gshard_top_2`` and
        ``sigmoid_top_k`` always do).
      weight_scale: multiplies the weights of ``sigmoid_top_k``.
      batch_prioritized: ``top_k`` serves the surest tokens first.
      exploration: in training ``top_k`` chooses the best (``argmax``), draws from the softmax (``sample``), or
        adds a normal to the logits (``gaussian``, which the load loss needs).
      noise_std: of ``gaussian``, in units of ``1 / num_experts``.
      num_rounds: experts that a token may ask, for ``no_token_left_behind``.
      sinkhorn_iterations: of ``sinkhorn``, in training; evaluation chooses by the logits.
      num_expert_groups: equal groups of experts, for ``sigmoid_top_k``.
      num_limited_groups: groups that a token may choose from; at most ``num_expert_groups``.
      bias_update_rate: of ``sigmoid_top_k``: after each step an expert's bias moves so much towards an even
        load; 0 keeps it at zero.
      allow_future_tokens: lets a decoder use a router whose choice for a token depends on later tokens.
    """

    router: RouterName = "top_k"
    num_selected_experts: int = 1
    renormalize_weights: bool = False
    weight_scale: float = 1.0
    batch_prioritized: bool = False
    exploration: Exploration = "argmax"
    noise_std: float = 1.0
    num_rounds: int = 2
    sinkhorn_iterations: int = 8
    num_expert_groups: int = 1
    num_limited_groups: int = 1
    bias_update_rate: float = 1e-3
    allow_future_tokens: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("num_selected_experts", "num_rounds", "sinkhorn_iterations", "num_expert_groups"):
            if getattr(self, field) < 1:
                raise ConfigError(f"RouterConfig.{field}", f"must be at least 1, got {getattr(self, field)}.")
            if getattr(self, field) > _MOST:
                raise ConfigError(f"RouterConfig.{field}", f"must be at most {_MOST}, got {getattr(self, field)}.")
        for field in ("weight_scale", "noise_std"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"RouterConfig.{field}", f"must be above 0, got {getattr(self, field)}.")
        if self.bias_update_rate < 0:
            raise ConfigError("RouterConfig.bias_update_rate", f"must not be negative, got {self.bias_update_rate}.")
        self._refuse_what_has_no_effect()
        if not 1 <= self.num_limited_groups <= self.num_expert_groups:
            raise ConfigError(
                "RouterConfig.num_limited_groups",
                f"must be from 1 to num_expert_groups, {self.num_expert_groups}, got {self.num_limited_groups}.",
            )
        self._refuse_a_constant_weight()

    def _refuse_a_constant_weight(self) -> None:
        always = self.router == "sigmoid_top_k"
        if self.num_selected_experts == 1 and (always or self.renormalize_weights):
            whose = f"the router {self.router!r}" if always else "renormalize_weights"
            others = "" if always else ", or renormalize_weights = False"
            raise ConfigError(
                "RouterConfig.num_selected_experts",
                f"is 1, but {whose} divides a token's weights by their sum: one alone always weighs the same, and the "
                f"output would teach the router nothing; give 2 or more{others}.",
            )

    def _refuse_what_has_no_effect(self) -> None:
        takers = {
            "num_selected_experts": ("top_k", "sigmoid_top_k", "sinkhorn"),
            "renormalize_weights": ("top_k", "sinkhorn"),
            "weight_scale": ("sigmoid_top_k",),
            "batch_prioritized": ("top_k",),
            "exploration": ("top_k",),
            "num_rounds": ("no_token_left_behind",),
            "sinkhorn_iterations": ("sinkhorn",),
            "num_expert_groups": ("sigmoid_top_k",),
            "num_limited_groups": ("sigmoid_top_k",),
            "bias_update_rate": ("sigmoid_top_k",),
        }
        for field in dataclasses.fields(self):
            routers = takers.get(field.name, (self.router,))
            if self.router not in routers and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"RouterConfig.{field.name}",
                    f"has no effect on the router {self.router!r}; it is for {' and '.join(routers)}: leave it at "
                    f"{field.default!r}, or set it back in the scope of a stack with a router of its own.",
                )
        if self.exploration != "gaussian" and self.noise_std != type(self).noise_std:
            raise ConfigError(
                "RouterConfig.noise_std",
                f"has no effect with exploration = {self.exploration!r}; it is for 'gaussian'.",
            )

    def check_experts(self, num_experts: int) -> None:
        """Checks that the choices fit ``num_experts``.

        Raises:
          ConfigError: they do not.
        """
        if self.num_expert_groups > 1 and num_experts % self.num_expert_groups:
            raise ConfigError(
                "RouterConfig.num_expert_groups",
                f"must divide num_experts, {num_experts}, got {self.num_expert_groups}.",
            )
        eligible = num_experts * self.num_limited_groups // self.num_expert_groups
        for field, asked in (("num_selected_experts", self.num_selected_experts), ("num_rounds", self._rounds)):
            if asked > eligible:
                raise ConfigError(
                    f"RouterConfig.{field}", f"must not exceed the {eligible} experts to choose from, got {asked}."
                )
        if self.router == "gshard_top_2" and num_experts < 2:
            raise ConfigError("RouterConfig.router", "'gshard_top_2' needs at least 2 experts.")

    @property
    def _rounds(self) -> int:
        return self.num_rounds if self.router == "no_token_left_behind" else 1

    @property
    def sees_future_tokens(self) -> bool:
        """Whether a token's experts depend on later tokens even where there is room for all.

        Where there is not, second choices and rounds of every router find what first choices of later tokens left.
        """
        return self.router in ("expert_choice", "sinkhorn") or self.batch_prioritized

    @property
    def needs_capacity(self) -> str:
        """What of the router means nothing where experts take all that they are sent; empty if all of it does."""
        if self.router in ("expert_choice", "no_token_left_behind"):
            return f"the router {self.router!r}"
        return "batch_prioritized" if self.batch_prioritized else ""

    @property
    def experts_per_token(self) -> int:
        """Experts that a token passes at the most; of ``expert_choice``, about as many on average."""
        return 2 if self.router == "gshard_top_2" else self.num_selected_experts

    @property
    def has_kernel(self) -> bool:
        """Whether the router multiplies its input by a learnt matrix."""
        return self.router not in ("hash", "random")

    @property
    def has_bias(self) -> bool:
        """Whether a bias, which no gradient reaches, evens the load."""
        return self.router == "sigmoid_top_k" and self.bias_update_rate > 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["assignment", "probs", "load", "load_probs"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router decided about ``[G, S]`` tokens.

    Attributes:
      assignment: experts and weights; an :class:`switch_t5.routing.assignment.Assignment`, with slots, where there is a
        capacity.
      probs: ``[G, S, E]`` float32, what losses and statistics take as the router's distribution.
      load: ``[G, E]`` int32, the choices that fell on each expert before capacity: all of them, or the first ones
        alone where the source counts so (GShard, No-Token-Left-Behind).
      load_probs: ``[G, S, E]``, the probability that noise lets each expert be chosen (Shazeer et al. 2017,
        eq. 9); None without ``gaussian`` noise.
    """

    assignment: Choices
    probs: Array
    load: Array
    load_probs: Array | None = None


def route(
    config: RouterConfig,
    router_logits: Array,
    capacity: int | None,
    mask: Array,
    *,
    bias: Array | None = None,
    train: bool = False,
    rng: Array | None = None,
) -> Routing:
    """Runs a router that has logits.

    Args:
      config: names it; neither ``hash`` nor ``random``.
      router_logits: ``[G, S, E]``, finite.
      capacity: slots of an expert for one group; None for any number.
      mask: ``[G, S]`` bool, False for padding.
      bias: ``[E]``, of ``sigmoid_top_k``.
      train: ``sinkhorn`` balances in training alone.
      rng: for exploration and for GShard's second choice; None draws nothing (the second is always asked).
    """
    probs = jax.nn.softmax(router_logits)
    match config.router:
        case "gshard_top_2":
            uniform = jnp.zeros(mask.shape) if rng is None else jax.random.uniform(rng, mask.shape)
            assignment = choice.gshard_top_2(probs, capacity, mask, uniform=uniform)
            return Routing(assignment, probs, load_of(assignment.expert[..., :1], probs.shape[-1]))
        case "no_token_left_behind":
            assert capacity is not None
            assignment = choice.no_token_left_behind(probs, capacity, mask, rounds=config.num_rounds)
            first = jnp.where(mask, jnp.argmax(probs, axis=-1), probs.shape[-1])
            return Routing(assignment, probs, load_of(first[..., None], probs.shape[-1]))
        case "expert_choice":
            assert capacity is not None
            assignment = choice.expert_choice(probs, capacity, mask)
            return Routing(assignment, probs, jnp.sum(assignment.expert < probs.shape[-1], axis=1, dtype=jnp.int32))
        case "sinkhorn":
            scores = choice.sinkhorn_scores(router_logits, mask, config.sinkhorn_iterations) if train else router_logits
            assignment = _top_k(config, probs, capacity, mask, scores)
        case "sigmoid_top_k":
            scores = jax.nn.sigmoid(router_logits)
            total = jnp.sum(scores, axis=-1, keepdims=True)
            probs = scores / jnp.where(total > 0, total, 1)  # All zero where every logit is far below zero.
            biased = scores if bias is None else scores + bias.astype(scores.dtype)
            limited = choice.limited_scores(
                biased, config.num_selected_experts, config.num_expert_groups, config.num_limited_groups
            )
            assignment = choice.top_k(
                scores,
                capacity,
                mask,
                k=config.num_selected_experts,
                scores=limited,
                renormalize=True,
                scale=config.weight_scale,
            )
        case _:
            return _explored_top_k(config, router_logits, probs, capacity, mask, rng)
    return Routing(assignment, probs, load_of(assignment.expert, probs.shape[-1]))


def route_without_logits(
    config: RouterConfig,
    num_experts: int,
    capacity: int | None,
    mask: Array,
    tokens: Array,
    *,
    rng: Array | None = None,
) -> Routing:
    """Runs ``hash`` or ``random``.

    Args:
      config: names it.
      num_experts: E.
      capacity: slots of an expert for one group; None for any number.
      mask: ``[G, S]`` bool.
      tokens: ``[G, S]`` int32, entries of the vocabulary.
      rng: of ``random``; without one, in evaluation, its experts are those of ``hash``.
    """
    if config.router == "hash" or rng is None:
        # By the token alone: what is decoded must not depend on where it stands in a batch.
        expert = choice.hashed(tokens, num_experts)
    else:
        expert = jax.random.randint(rng, mask.shape, 0, num_experts)
    assignment = choice.given(expert, capacity, mask, num_experts)
    return Routing(assignment, jax.nn.one_hot(expert, num_experts), load_of(assignment.expert, num_experts))


def _top_k(
    config: RouterConfig, probs: Array, capacity: int | None, mask: Array, scores: Array | None = None
) -> Choices:
    return choice.top_k(
        probs,
        capacity,
        mask,
        k=config.num_selected_experts,
        scores=scores,
        renormalize=config.renormalize_weights,
        batch_prioritized=config.batch_prioritized,
    )


def _explored_top_k(
    config: RouterConfig, router_logits: Array, probs: Array, capacity: int | None, mask: Array, rng: Array | None
) -> Routing:
    """``top_k`` with the noise of its exploration."""
    load_probs, scores = None, None
    if rng is not None and config.exploration == "sample":
        # The largest of logits and Gumbel noise is a draw from the softmax; the k largest are draws without return.
        scores = router_logits + jax.random.gumbel(rng, router_logits.shape, router_logits.dtype)
    elif rng is not None and config.exploration == "gaussian":
        std = config.noise_std / router_logits.shape[-1]
        scores = router_logits + std * jax.random.normal(rng, router_logits.shape, router_logits.dtype)
        load_probs = choice.load_probabilities(router_logits, scores, config.num_selected_experts, std)
    assignment = _top_k(config, probs, capacity, mask, scores)
    return Routing(assignment, probs, load_of(assignment.expert, probs.shape[-1]), load_probs)
