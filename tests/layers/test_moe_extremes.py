"""The sparse layer where its input is at its worst: logits that are no numbers, padding alone, one expert for all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.routing.balance import RouterStats
from switch_t5.routing.choice import hashed
from tests.routing.routers import CASES, decide

TOKENS, FEATURES, HIDDEN, EXPERTS, CAPACITY = 8, 4, 16, 6, 2
NAMES = [
    "switch",
    "top_3_renormalized",
    "batch_prioritized",
    "gshard_top_2",
    "no_token_left_behind",
    "sigmoid_top_k",
    "sigmoid_limited",
    "sinkhorn",
    "expert_choice",
    "hash",
    "random",
]
"""Every router; of those that differ in a number alone, one."""

WITH_LOGITS = [(name, "gather") for name in NAMES if CASES[name].config.has_kernel]
WITH_LOGITS += [("switch", "einsum"), ("expert_choice", "einsum"), ("switch", "dropless")]
LOSSES = ("load_balance_loss", "router_z_loss", "importance_loss", "load_loss")

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a layer gave, and the gradient of its output and losses; ``gradient`` has ``x`` beside the parameters."""

    output: np.ndarray
    stats: RouterStats
    gradient: Arrays


@functools.cache
def compiled(name: str, dispatch: Any) -> tuple[Arrays, Callable[..., Any]]:
    """A layer's parameters, and its forward and backward pass."""
    config = MoEConfig(
        EXPERTS,
        group_size=TOKENS,
        train_capacity_factor=1.0,
        min_expert_capacity=CAPACITY,
        router=CASES[name].config,
        dispatch=dispatch,
    )
    layer = SwitchFeedForward(config, FEATURES, HIDDEN, ("relu",), "t5x", rngs=nnx.Rngs(0))
    assert layer.config.capacity(TOKENS, train=True) == CAPACITY
    graph, params = nnx.split(layer)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(1, TOKENS, FEATURES)), jnp.float32)

    def scalar(arrays: Arrays, mask: Any, tokens: Any) -> tuple[Any, Any]:
        state = nnx.clone(params)
        nnx.replace_by_pure_dict(state, arrays["params"])
        output, stats = nnx.merge(graph, state)(arrays["x"], mask, tokens=tokens, sequences=1, train=True, rng=None)
        return jnp.sum(output * cotangent) + sum(getattr(stats, loss) for loss in LOSSES), (output, stats)

    return nnx.to_pure_dict(params), jax.jit(jax.grad(scalar, has_aux=True))


def run(name: str, x: Any, mask: Any, tokens: Any = None, *, router: Any = None, dispatch: str = "gather") -> Step:
    """A step of one sequence, by ``router`` [D, E] where the layer has logits."""
    params, step = compiled(name, dispatch)
    if router is not None and "router" in params:
        params = params | {"router": jnp.asarray(router, jnp.float32)}
    tokens = np.arange(1, TOKENS + 1)[None] if tokens is None else tokens
    gradient, (output, stats) = step({"params": params, "x": jnp.asarray(x)}, jnp.asarray(mask), jnp.asarray(tokens))
    gradient = gradient["params"] | {"x": gradient["x"]}
    return Step(np.asarray(output), stats, jax.tree.map(np.asarray, gradient))


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A sequence, and a router of it."""
    random = np.random.default_rng(seed)
    x, router = random.normal(size=(1, TOKENS, FEATURES)), random.normal(size=(FEATURES, EXPERTS))
    return x.astype(np.float32), router.astype(np.float32)


def expert_gradients(step: Step) -> np.ndarray:
    """[E]: the largest entry of each expert's gradient."""
    return np.max([np.abs(kernel).max(axis=(1, 2)) for kernel in step.gradient["experts"].values()], axis=0)


OVERFLOW = 3e38
"""Finite, but no longer so when it is multiplied by the router."""


def beside_padding(name: str, dispatch: str, bad: float) -> tuple[Step, Step]:
    """A step in which a token's features are ``bad``, and one in which it is padding."""
    x, router = inputs()
    router *= 10
    others = np.arange(TOKENS)[None] != 3
    as_padding = run(name, x, others, router=router, dispatch=dispatch)
    x[0, 3] = bad
    return run(name, x, np.ones((1, TOKENS), bool), router=router, dispatch=dispatch), as_padding


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, OVERFLOW])
@pytest.mark.parametrize(("name", "dispatch"), WITH_LOGITS)
def test_a_token_without_finite_logits_fares_as_padding_and_is_counted(name: str, dispatch: str, bad: float) -> None:
    found, expected = beside_padding(name, dispatch, bad)
    assert float(found.stats.nonfinite) == 1 and float(expected.stats.nonfinite) == 0
    stats = [dataclasses.replace(step.stats, nonfinite=jnp.zeros(())) for step in (found, expected)]
    for one, another in zip(
        jax.tree.leaves((found.output, stats[0], found.gradient)),
        jax.tree.leaves((expected.output, stats[1], expected.gradient)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
@pytest.mark.parametrize("name", ["hash", "random"])
def test_features_that_are_not_finite_stay_with_their_token_where_there_are_no_logits(
    name: str, dispatch: str, bad: float
) -> None:
    found, expected = beside_padding(name, dispatch, bad)
    assert float(found.stats.nonfinite) == 1 and float(expected.stats.nonfinite) == 0
    np.testing.assert_array_equal(found.output, expected.output)
    for one, another in zip(jax.tree.leaves(found.gradient), jax.tree.leaves(expected.gradient), strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("name", NAMES)
def test_padding_alone_has_no_output_no_loss_and_no_gradient(name: str) -> None:
    x, router = inputs()
    step = run(name, x, np.zeros((1, TOKENS), bool), router=router)
    for leaf in jax.tree.leaves((step.output, step.stats, step.gradient)):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_without_a_token_has_exactly_no_gradient(name: str) -> None:
    x, router = inputs()
    # The last are real: an empty slot's index, past the end, must not be taken for the nearest.
    mask, tokens = np.arange(TOKENS)[None] >= TOKENS - 2, np.full((1, TOKENS), 5)
    step = run(name, x, mask, tokens, router=router)
    routing = decide(CASES[name].config, CAPACITY, x @ router, mask, tokens, np.zeros(EXPERTS, np.float32), None)
    visited = np.asarray(routing.assignment.entry).reshape(EXPERTS, CAPACITY) < routing.assignment.slot[0].size
    np.testing.assert_array_equal(expert_gradients(step) > 0, visited.any(axis=1))
    # Expert choice leaves none out while there are tokens.
    assert visited.any(axis=1).all() == (name == "expert_choice")


FALLING = np.linspace(0, -3, EXPERTS)
"""Logits of every token, times its own first feature: all prefer the first expert, then the second."""

CROWDS = {
    # The experts that are asked, in the order in which a token asks them.
    "switch": 1,
    "top_3_renormalized": 3,
    "batch_prioritized": 2,
    "gshard_top_2": 2,
    "sigmoid_top_k": 2,
    "sigmoid_limited": 2,
    "hash": 1,
}


def crowd() -> tuple[np.ndarray, np.ndarray]:
    """Tokens that all prefer the same experts, some more than others, and a router by their first feature alone."""
    x, router = inputs()
    x[0, :, 0] = [1.0, 1.5, 1.25, 2.0, 1.125, 1.75, 1.875, 1.0625]
    router[:] = 0
    router[0] = FALLING
    return x, router


@pytest.mark.parametrize("name", CROWDS)
def test_of_a_crowd_the_first_are_served_and_experts_that_nobody_asked_have_exactly_no_gradient(name: str) -> None:
    x, router = crowd()
    mask = np.arange(TOKENS)[None] != 1
    step = run(name, x, mask, np.full((1, TOKENS), 5), router=router)
    served = np.flatnonzero(np.abs(step.output[0]).max(axis=-1))
    # Token 1 would be among the first. The surest are those with the largest first feature.
    assert served.tolist() == ([3, 6] if name == "batch_prioritized" else [0, 2])
    assert float(step.stats.dropped) == TOKENS - 1 - CAPACITY
    first = int(hashed(jnp.asarray(5), EXPERTS)) if name == "hash" else 0
    asked = np.arange(first, first + CROWDS[name])
    np.testing.assert_array_equal(np.flatnonzero(expert_gradients(step)), asked)
    d_x = np.abs(step.gradient["x"][0]).max(axis=-1)
    assert (d_x[served] > 0).all()
    if name == "hash":
        np.testing.assert_array_equal(np.delete(d_x, served), 0)


def test_where_no_token_is_left_behind_a_crowd_is_served_by_the_next_experts_in_its_order() -> None:
    x, router = crowd()
    step = run("no_token_left_behind", x, np.ones((1, TOKENS), bool), router=router)
    # Two rounds of two slots each; the last four of eight tokens find none.
    assert np.flatnonzero(np.abs(step.output[0]).max(axis=-1)).tolist() == [0, 1, 2, 3]
    assert float(step.stats.dropped) == 4
    np.testing.assert_array_equal(np.flatnonzero(expert_gradients(step)), [0, 1])
