"""Routers that tests ask at any size, and what they read of a decision."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from switch_t5.conformance import oracle
from switch_t5.conformance.routers import ROUTERS, Router, gshard_top_2, sigmoid_top_k, top_k
from switch_t5.routing.assignment import Assignment, Choices
from switch_t5.routing.router import RouterConfig, Routing, route, route_without_logits
from switch_t5.types import Array

KEY = jax.random.key(7)
"""Of GShard's second choices and of random experts."""


CASES: dict[str, Router] = {
    **ROUTERS,
    "top_3": top_k(3),
    "top_2_renormalized": top_k(2, renormalize=True),
    "gshard_top_2": gshard_top_2(lambda mask: np.asarray(jax.random.uniform(KEY, mask.shape))),
    "sigmoid_limited": sigmoid_top_k(num_expert_groups=2, num_limited_groups=1),
    "random": Router(
        RouterConfig(router="random"),
        lambda logits, mask, tokens, capacity, bias: oracle.given(
            np.asarray(jax.random.randint(KEY, mask.shape, 0, logits.shape[-1])), mask, capacity
        ),
        probs=None,
    ),
}
"""The routers of conformance with others beside them: two groups of few experts, and draws with a key."""

KNOWS_TIES = [
    *("switch", "top_2", "top_3", "top_2_renormalized", "top_3_renormalized"),
    "no_token_left_behind",
]
"""Those for which equal logits are equal in float32 wherever they are in the oracle. Which of two tokens with the same
logits in another order is the surer, rounding decides."""


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def decide(
    config: RouterConfig,
    capacity: int | None,
    logits: Any,
    mask: Any,
    tokens: Any,
    bias: Any,
    rng: Array | None = KEY,
) -> Routing:
    """What the library decides in training."""
    if not config.has_kernel:
        return route_without_logits(config, logits.shape[-1], capacity, mask, tokens, rng=rng)
    return route(config, logits, capacity, mask, bias=bias if config.has_bias else None, train=True, rng=rng)


Found = dict[tuple[int, int, int], tuple[int, int | None]]
"""(group, token, choice) to (expert, position)."""


def with_slots(choices: Choices) -> Assignment:
    """What a router returns where there is a capacity."""
    assert isinstance(choices, Assignment)
    return choices


def found_routes(assignment: Assignment) -> Found:
    """The library's."""
    expert, slot = np.asarray(assignment.expert), np.asarray(assignment.slot)
    nowhere = assignment.num_experts * assignment.capacity
    return {
        (int(g), int(s), int(k)): (
            int(expert[g, s, k]),
            int(slot[g, s, k]) % assignment.capacity if slot[g, s, k] < nowhere else None,
        )
        for g, s, k in np.argwhere(expert < assignment.num_experts)
    }


def expected_routes(routes: Sequence[oracle.Route]) -> Found:
    """The oracle's."""
    return {(r.group, r.token, r.choice): (r.expert, r.position) for r in routes}
