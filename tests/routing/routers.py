"""Every router beside its oracle, at any size, and what a test reads of a decision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.conformance import oracle
from switch_t5.routing.assignment import Assignment, Choices
from switch_t5.routing.choice import hashed
from switch_t5.routing.router import RouterConfig, Routing, route, route_without_logits
from switch_t5.types import Array

KEY = jax.random.key(7)
"""Of GShard's second choices and of random experts."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A router and its oracle.

    Attributes:
      config: of the library.
      routes: logits, mask and the vocabulary's entries of tokens, a capacity, and the experts' bias, to routes.
      probs: logits to the distribution that losses see; None where there are no logits.
      first_choice_only: the load counts only first choices.
      knows_ties: whether equal logits are equal in float32 wherever they are in the oracle.
    """

    config: RouterConfig
    routes: Callable[..., list[oracle.Route]]
    probs: Callable[[np.ndarray], np.ndarray] | None = oracle.softmax
    first_choice_only: bool = False
    knows_ties: bool = False


def _top_k(k: int, *, renormalize: bool = False, prioritized: bool = False) -> Case:
    return Case(
        RouterConfig(num_selected_experts=k, renormalize_weights=renormalize, batch_prioritized=prioritized),
        lambda logits, mask, tokens, capacity, bias: oracle.top_k(
            logits, mask, capacity, k=k, renormalize=renormalize, batch_prioritized=prioritized
        ),
        # Which of two tokens with the same logits in another order is the surer, rounding decides.
        knows_ties=not prioritized,
    )


def _sigmoid_top_k(config: RouterConfig) -> Case:
    return Case(
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


def _given(config: RouterConfig, experts: Callable[[Any, tuple[int, ...], int], Array]) -> Case:
    return Case(
        config,
        lambda logits, mask, tokens, capacity, bias: oracle.given(
            np.asarray(experts(tokens, mask.shape, logits.shape[-1])), mask, capacity
        ),
        probs=None,
    )


CASES: dict[str, Case] = {
    "switch": _top_k(1),
    "top_2": _top_k(2),
    "top_3": _top_k(3),
    "switch_renormalized": _top_k(1, renormalize=True),
    "top_2_renormalized": _top_k(2, renormalize=True),
    "top_3_renormalized": _top_k(3, renormalize=True),
    "batch_prioritized": _top_k(2, prioritized=True),
    "gshard_top_2": Case(
        RouterConfig(router="gshard_top_2"),
        lambda logits, mask, tokens, capacity, bias: oracle.gshard_top_2(
            logits, mask, capacity, uniform=np.asarray(jax.random.uniform(KEY, mask.shape))
        ),
        first_choice_only=True,
    ),
    "no_token_left_behind": Case(
        RouterConfig(router="no_token_left_behind", num_rounds=3),
        lambda logits, mask, tokens, capacity, bias: oracle.no_token_left_behind(logits, mask, capacity, rounds=3),
        first_choice_only=True,
        knows_ties=True,
    ),
    "sigmoid_top_k": _sigmoid_top_k(RouterConfig(router="sigmoid_top_k", num_selected_experts=2, weight_scale=1.5)),
    "sigmoid_limited": _sigmoid_top_k(
        RouterConfig(router="sigmoid_top_k", num_selected_experts=2, num_expert_groups=2, num_limited_groups=1)
    ),
    "sinkhorn": Case(
        RouterConfig(router="sinkhorn", sinkhorn_iterations=4),
        lambda logits, mask, tokens, capacity, bias: oracle.sinkhorn(logits, mask, capacity, iterations=4),
    ),
    "expert_choice": Case(
        RouterConfig(router="expert_choice"),
        lambda logits, mask, tokens, capacity, bias: oracle.expert_choice(logits, mask, capacity),
    ),
    "hash": _given(RouterConfig(router="hash"), lambda tokens, shape, experts: hashed(jnp.asarray(tokens), experts)),
    "random": _given(
        RouterConfig(router="random"), lambda tokens, shape, experts: jax.random.randint(KEY, shape, 0, experts)
    ),
}


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def decide(
    config: RouterConfig,
    capacity: int,
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
