"""Forms that a sparse layer can have around its router, and what the oracle says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from switch_t5.conformance import oracle
from switch_t5.conformance.routers import Router
from switch_t5.layers.moe_config import Exchange, MoEConfig, Padding
from switch_t5.routing.assignment import Assignment, Choices
from switch_t5.routing.balance import BalanceScope
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod
from switch_t5.routing.router import Exploration

NOISE_STD = 0.5
"""Of gaussian logits: enough to move many tokens to another expert."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """The numbers that a layer draws, for the oracle to be given.

    Attributes:
      normal: ``[G, S, E]``, of deviation 1.
      gumbel: ``[G, S, E]``.
      uniform: ``[G, S]``, in [0, 1).
      expert: ``[G, S]``, one expert or another.
      jitter: ``[G, S, D]``, in [-1, 1).
    """

    normal: np.ndarray
    gumbel: np.ndarray
    uniform: np.ndarray
    expert: np.ndarray
    jitter: np.ndarray


DrawnRoutes = Callable[[np.ndarray, np.ndarray, int | None, Draws], list[oracle.Route]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A form of the layer.

    Attributes:
      padding: as :class:`switch_t5.layers.moe_config.MoEConfig` has it.
      activations: of the experts; two gate.
      num_shared_experts: beside the routed ones.
      exploration: of ``top_k``; ``gaussian`` has a load loss too.
      jitter_noise: of the router's input.
      drawn: logits ``[G, S, E]``, mask ``[G, S]``, the capacity and the draws to the oracle's routes; None where
        nothing is drawn.
      train: False for evaluation, whose capacity is another.
      scope: of the load-balance loss.
      sequences: that a group's tokens are of.
      exchange: of slots between devices.
      in_bfloat16: whether it is tried in bfloat16 too; not where all that it changes is the router's float32.
      router: the name of the only router that the form is tried with; None for every one.
    """

    padding: Padding = "ignored"
    activations: tuple[str, ...] = ("relu",)
    num_shared_experts: int = 0
    exploration: Exploration = "argmax"
    jitter_noise: float = 0.0
    drawn: DrawnRoutes | None = None
    train: bool = True
    scope: BalanceScope = "group"
    sequences: int = 1
    exchange: Exchange = "constraints"
    in_bfloat16: bool = True
    router: str | None = "top_2"

    def adapt(self, config: MoEConfig) -> MoEConfig:
        """``config`` in this form."""
        router = config.router
        if self.exploration != "argmax":
            std = NOISE_STD * config.num_experts if self.exploration == "gaussian" else router.noise_std
            router = dataclasses.replace(router, exploration=self.exploration, noise_std=std)
        return dataclasses.replace(
            config,
            router=router,
            padding=self.padding,
            num_shared_experts=self.num_shared_experts,
            jitter_noise=self.jitter_noise,
            balance_scope=self.scope,
            exchange=self.exchange,
        )

    def dispatches(self, router: Router) -> tuple[DispatchMethod, ...]:
        """The methods that the form and a router can do with."""
        has_slots = router.config.needs_capacity or self.exchange == "all_to_all"
        return tuple(DISPATCHERS) if has_slots else (*DISPATCHERS, "dropless")

    @property
    def into(self) -> tuple[str, ...]:
        """The names of the kernels that an expert's tokens are first multiplied by."""
        return ("wi",) if len(self.activations) == 1 else ("wi_0", "wi_1")


PLAIN = "plain"
SEVERAL = "two sequences a group, balance over the batch"
EXPLICIT = "an explicit all-to-all"
LAYERS: dict[str, Layer] = {
    PLAIN: Layer(router=None),
    "gated": Layer(activations=("gelu", "linear")),
    "shared expert": Layer(num_shared_experts=1),
    "gaussian noise": Layer(
        exploration="gaussian",
        drawn=lambda logits, mask, capacity, draws: oracle.top_k(
            logits, mask, capacity, k=2, gumbel=NOISE_STD * draws.normal
        ),
    ),
    "sampled": Layer(
        exploration="sample",
        in_bfloat16=False,
        drawn=lambda logits, mask, capacity, draws: oracle.top_k(logits, mask, capacity, k=2, gumbel=draws.gumbel),
    ),
    "jitter": Layer(
        jitter_noise=0.25,
        in_bfloat16=False,
        drawn=lambda logits, mask, capacity, draws: oracle.top_k(logits, mask, capacity, k=2),
    ),
    "second choice drawn": Layer(
        router="gshard_top_2",
        in_bfloat16=False,
        drawn=lambda logits, mask, capacity, draws: oracle.gshard_top_2(logits, mask, capacity, uniform=draws.uniform),
    ),
    "experts drawn": Layer(
        router="random",
        in_bfloat16=False,
        drawn=lambda logits, mask, capacity, draws: oracle.given(draws.expert, mask, capacity),
    ),
    "padding counted": Layer(padding="counted", router="switch"),
    "padding routed": Layer(padding="routed"),
    "even loads": Layer(padding="routed", router="sinkhorn"),
    "padding zeroed": Layer(padding="zeroed"),
    "evaluation": Layer(train=False, router="sinkhorn", in_bfloat16=False),
    EXPLICIT: Layer(exchange="all_to_all"),
    SEVERAL: Layer(scope="batch", sequences=2, in_bfloat16=False),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """What does not vary where derivatives are taken.

    Attributes:
      mask: ``[G, S]`` bool, False at padding.
      tokens: ``[G, S]``, entries of the vocabulary.
      capacity: slots of an expert for a group; None for any number.
      bias: ``[E]``, of the routers that have one.
      draws: what the layer drew.
    """

    mask: np.ndarray
    tokens: np.ndarray
    capacity: int | None
    bias: np.ndarray
    draws: Draws


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the oracle says of one input.

    Attributes:
      output: ``[G, S, D]``.
      losses: as :class:`switch_t5.routing.balance.RouterStats` names and sums them.
      statistics: the same.
      routes: of every choice.
    """

    output: np.ndarray
    losses: dict[str, Any]
    statistics: dict[str, Any]
    routes: list[oracle.Route]


def evaluate(layer: Layer, router: Router, arrays: Mapping[str, np.ndarray], example: Example) -> Evaluation:
    """The layer by the oracle.

    Args:
      layer: its form.
      router: how it chooses.
      arrays: ``x`` ``[G, S, D]``, ``router`` ``[D, E]``, ``wo`` ``[E, F, D]`` and the kernels of ``layer.into``
        ``[E, D, F]``; for a shared expert ``shared/...`` without E. They may be complex.
      example: the rest.
    """
    x, real = arrays["x"], example.mask
    if layer.padding == "zeroed":
        x = np.where(real[..., None], x, 0)
    routed = np.ones_like(real) if layer.padding in ("routed", "zeroed") else real
    logits = (x * (1 + layer.jitter_noise * example.draws.jitter)) @ arrays["router"]
    if layer.drawn is not None:
        routes = layer.drawn(logits, routed, example.capacity, example.draws)
    else:
        choose = router.routes if layer.train else router.evaluation_routes or router.routes
        routes = choose(logits, routed, example.tokens, example.capacity, example.bias)
    output = oracle.combine(x, routes, [arrays[name] for name in layer.into], arrays["wo"], layer.activations)
    if layer.num_shared_experts:
        kernels = [arrays[f"shared/{name}"][None] for name in layer.into]
        output = output + oracle.experts_forward(x, kernels, arrays["shared/wo"][None], layer.activations)[0]
    losses = router.losses(logits, routed, routes, layer.scope)
    statistics = router.statistics(logits, routed, routes)
    if layer.exploration == "gaussian":
        noise = NOISE_STD * example.draws.normal
        load = oracle.load_loss(logits, logits + noise, routed, k=2, noise_std=NOISE_STD)
        losses["load_loss"] = (load * routed.sum(axis=1)).sum()
    if layer.padding == "counted":
        losses["load_balance_loss"], statistics["expert_load"] = _counting_padding(logits, real, layer.scope)
    return Evaluation(output, losses, statistics, routes)


def _counting_padding(logits: np.ndarray, mask: np.ndarray, scope: BalanceScope) -> tuple[Any, np.ndarray]:
    """The load-balance loss, summed over tokens, and the load, where padding counts as any token: k = 1."""
    everyone = np.ones_like(mask)
    experts = np.argmax(np.real(logits), axis=-1)
    mean = oracle.padding_counted_load_balance_loss(oracle.softmax(logits), experts, mask, everyone, scope=scope)
    return mean * mask.size, np.bincount(experts.ravel(), minlength=logits.shape[-1])


def expected_places(routes: list[oracle.Route], shape: tuple[int, ...], *, has_slots: bool) -> dict[str, np.ndarray]:
    """Who goes where, by token and expert.

    Args:
      routes: of every choice.
      shape: G, S, E.
      has_slots: whether there is a capacity.

    Returns:
      ``routes`` ``[G, S, E]``, 1 where a token chooses the expert and 0 elsewhere; and ``slots`` ``[G, S, E]``, where
      there are any: 1 plus the slot's place in its expert, 0 for none.
    """
    places = {"routes": np.zeros(shape)} | ({"slots": np.zeros(shape)} if has_slots else {})
    for route in routes:
        index = route.group, route.token, route.expert
        places["routes"][index] = 1
        if has_slots and route.position is not None:
            places["slots"][index] = 1 + route.position
    return places


def found_places(choices: Choices) -> dict[str, np.ndarray]:
    """:func:`expected_places` of what the library decided."""
    expert = np.asarray(choices.expert)
    places = {"routes": np.zeros((*expert.shape[:2], choices.num_experts))}
    for group, token, choice in np.argwhere(expert < choices.num_experts):
        places["routes"][group, token, expert[group, token, choice]] = 1
    if isinstance(choices, Assignment):
        slot, places["slots"] = np.asarray(choices.slot), np.zeros_like(places["routes"])
        for group, token, choice in np.argwhere(slot < choices.num_experts * choices.capacity):
            owner, position = divmod(slot[group, token, choice], choices.capacity)
            places["slots"][group, token, owner] = 1 + position
    return places
