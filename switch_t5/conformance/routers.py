"""Every router of the library beside the oracle's, and what the oracle says of its losses and statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from switch_t5.conformance import oracle
from switch_t5.routing.balance import BalanceScope
from switch_t5.routing.router import RouterConfig

Routes = Callable[[np.ndarray, np.ndarray, np.ndarray, int | None, np.ndarray], list[oracle.Route]]


@dataclasses.dataclass(frozen=True)
class Router:
    """A router, and the same in the oracle.

    Attributes:
      config: of the library.
      routes: logits ``[G, S, E]``, mask ``[G, S]``, tokens ``[G, S]``, the capacity and the experts' bias ``[E]`` to
        the oracle's routes.
      probs: logits to the distribution that losses see; None where experts are given and there are no logits.
      first_choice_only: the load counts only first choices.
      evaluation_routes: as ``routes``, in evaluation; None for the same.
    """

    config: RouterConfig
    routes: Routes
    probs: Callable[[np.ndarray], np.ndarray] | None = oracle.softmax
    first_choice_only: bool = False
    evaluation_routes: Routes | None = None

    def distribution(self, logits: np.ndarray, routes: list[oracle.Route]) -> np.ndarray:
        """``[G, S, E]``, what losses and statistics see."""
        if self.probs is not None:
            return self.probs(logits)
        probs = np.zeros(logits.shape)
        for route in routes:
            probs[route.group, route.token, route.expert] = 1
        return probs

    def losses(
        self, logits: np.ndarray, mask: np.ndarray, routes: list[oracle.Route], scope: BalanceScope
    ) -> dict[str, Any]:
        """As :class:`switch_t5.routing.balance.RouterStats` names and sums them; of complex logits too."""
        probs, real = self.distribution(logits, routes), mask.sum(axis=1)
        balance = oracle.load_balance_loss(probs, routes, mask, scope=scope, first_choice_only=self.first_choice_only)
        return {
            "load_balance_loss": (balance * real).sum(),
            "router_z_loss": 0.0 if self.probs is None else oracle.router_z_loss(logits, mask).sum(),
            "importance_loss": (oracle.importance_loss(probs, mask) * real).sum(),
        }

    def statistics(self, logits: np.ndarray, mask: np.ndarray, routes: list[oracle.Route]) -> dict[str, Any]:
        """As :class:`switch_t5.routing.balance.RouterStats` names them."""
        probs = self.distribution(logits, routes)
        counts = oracle.statistics(probs, routes, mask, logits.shape[-1], first_choice_only=self.first_choice_only)
        return {
            "tokens": counts["tokens"],
            "expert_load": counts["expert_load"],
            "dropped": counts["dropped"],
            "router_entropy": counts["entropy"],
            "router_confidence": counts["confidence"],
        }


def top_k(k: int = 1, *, renormalize: bool = False, batch_prioritized: bool = False) -> Router:
    """A token's k best, of a softmax."""
    return Router(
        RouterConfig(num_selected_experts=k, renormalize_weights=renormalize, batch_prioritized=batch_prioritized),
        lambda logits, mask, tokens, capacity, bias: oracle.top_k(
            logits, mask, capacity, k=k, renormalize=renormalize, batch_prioritized=batch_prioritized
        ),
    )


def gshard_top_2(uniform: Callable[[np.ndarray], np.ndarray]) -> Router:
    """GShard's two, where ``uniform`` gives the numbers of a mask's tokens that the second choice is asked by."""
    return Router(
        RouterConfig(router="gshard_top_2"),
        lambda logits, mask, tokens, capacity, bias: oracle.gshard_top_2(logits, mask, capacity, uniform=uniform(mask)),
        first_choice_only=True,
    )


def sigmoid_top_k(**settings: Any) -> Router:
    """Two choices by sigmoid scores and a bias, with more settings of ``RouterConfig``."""
    config = RouterConfig(router="sigmoid_top_k", num_selected_experts=2, **settings)
    return Router(
        config,
        lambda logits, mask, tokens, capacity, bias: oracle.sigmoid_top_k(
            logits,
            mask,
            capacity,
            k=config.num_selected_experts,
            bias=bias,
            num_expert_groups=config.num_expert_groups,
            num_limited_groups=config.num_limited_groups,
            scale=config.weight_scale,
        ),
        probs=oracle.normalized_sigmoid,
    )


def hashed(config: RouterConfig) -> Router:
    """Experts by the token alone."""
    return Router(
        config,
        lambda logits, mask, tokens, capacity, bias: oracle.given(
            oracle.hashed(tokens, logits.shape[-1]), mask, capacity
        ),
        probs=None,
    )


ROUTERS: dict[str, Router] = {
    "switch": top_k(),
    "top_2": top_k(2),
    "top_3_renormalized": top_k(3, renormalize=True),
    "batch_prioritized": top_k(2, batch_prioritized=True),
    "gshard_top_2": gshard_top_2(lambda mask: np.zeros(mask.shape)),
    "no_token_left_behind": Router(
        RouterConfig(router="no_token_left_behind"),
        lambda logits, mask, tokens, capacity, bias: oracle.no_token_left_behind(logits, mask, capacity, rounds=2),
        first_choice_only=True,
    ),
    "sinkhorn": Router(
        RouterConfig(router="sinkhorn", sinkhorn_iterations=4),
        lambda logits, mask, tokens, capacity, bias: oracle.sinkhorn(logits, mask, capacity, iterations=4),
        evaluation_routes=lambda logits, mask, tokens, capacity, bias: oracle.top_k(logits, mask, capacity),
    ),
    "sigmoid_top_k": sigmoid_top_k(weight_scale=1.5),
    "sigmoid_limited": sigmoid_top_k(num_expert_groups=4, num_limited_groups=1),
    "expert_choice": Router(
        RouterConfig(router="expert_choice"),
        lambda logits, mask, tokens, capacity, bias: oracle.expert_choice(logits, mask, capacity),
    ),
    "hash": hashed(RouterConfig(router="hash")),
    "random": hashed(RouterConfig(router="random")),  # Which draws only where it has a key.
}
