"""Dispatch and combine: two methods, one function, one gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.conformance.routers import ROUTERS
from switch_t5.routing.assignment import Assignment, sort_by_expert
from switch_t5.routing.choice import top_k
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod, combine_rows, dispatch_rows
from switch_t5.types import Array
from tests.jaxprs import looked_at
from tests.routing.routers import decide

GROUPS, TOKENS, EXPERTS, CAPACITY, FEATURES = 2, 24, 5, 4, 3


def routed(seed: int = 0) -> dict[str, Array]:
    """Tokens with padding, a router that fills some experts and leaves the last one empty."""
    random = np.random.default_rng(seed)
    router = random.normal(size=(FEATURES, EXPERTS))
    x = random.normal(size=(GROUPS, TOKENS, FEATURES)) + 1
    router[:, -1] = -5
    mask = random.random((GROUPS, TOKENS)) < 0.85
    kernel = random.normal(size=(EXPERTS, FEATURES, FEATURES))
    arrays = {"x": x, "router": router, "kernel": kernel}
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()} | {"mask": jnp.asarray(mask)}


def layer(method: DispatchMethod, x: Array, router: Array, kernel: Array, mask: Array) -> Array:
    """A Switch layer whose experts are one matrix each."""
    assignment = top_k(jax.nn.softmax(x @ router), CAPACITY, mask)
    dispatched = DISPATCHERS[method].dispatch(x, assignment)
    outputs = jnp.einsum("gecd,edf->gecf", dispatched, kernel)
    return DISPATCHERS[method].combine(outputs, assignment)


@jax.jit
def assignment_of(arrays: dict[str, Array]) -> Assignment:
    return top_k(jax.nn.softmax(arrays["x"] @ arrays["router"]), CAPACITY, arrays["mask"])


@functools.partial(jax.jit, static_argnums=0)
def gradients(method: DispatchMethod, arrays: dict[str, Array]) -> tuple[Array, tuple[Array, ...]]:
    def loss(x: Array, router: Array, kernel: Array) -> Array:
        return jnp.sum(jnp.sin(3 * layer(method, x, router, kernel, arrays["mask"])))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(arrays["x"], arrays["router"], arrays["kernel"])


def test_the_example_has_padding_drops_and_an_empty_expert() -> None:
    arrays = routed()
    assignment = assignment_of(arrays)
    assert not np.asarray(arrays["mask"]).all()
    assert (np.asarray(arrays["mask"]) & ~np.asarray(assignment.kept)).any()
    assert not (np.asarray(assignment.expert) == EXPERTS - 1).any()


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_dispatch_puts_each_token_into_its_slot_and_zeros_elsewhere(method: DispatchMethod) -> None:
    arrays = routed()
    assignment, x = assignment_of(arrays), np.asarray(arrays["x"])
    expected = np.zeros((GROUPS, EXPERTS * CAPACITY, FEATURES), np.float32)
    for g, s in np.argwhere(np.asarray(assignment.kept)):
        expected[g, np.asarray(assignment.slot)[g, s, 0]] = x[g, s]
    dispatched = DISPATCHERS[method].dispatch(arrays["x"], assignment)
    assert dispatched.shape == (GROUPS, EXPERTS, CAPACITY, FEATURES)
    np.testing.assert_array_equal(dispatched.reshape(expected.shape), expected)


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_combine_scales_by_the_weight_and_gives_zero_without_a_slot(method: DispatchMethod) -> None:
    arrays = routed()
    assignment = assignment_of(arrays)
    y = np.random.default_rng(1).normal(size=(GROUPS, EXPERTS, CAPACITY, FEATURES)).astype(np.float32)
    expected = np.zeros((GROUPS, TOKENS, FEATURES), np.float32)
    for g, s in np.argwhere(np.asarray(assignment.kept)):
        expert, position = divmod(int(assignment.slot[g, s, 0]), CAPACITY)
        expected[g, s] = y[g, expert, position] * np.asarray(assignment.weight)[g, s, 0]
    np.testing.assert_allclose(DISPATCHERS[method].combine(jnp.asarray(y), assignment), expected, rtol=1e-6)


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_combining_what_was_dispatched_with_weight_one_gives_back_the_kept_tokens(method: DispatchMethod) -> None:
    arrays = routed()
    assignment = assignment_of(arrays)
    unit = dataclasses.replace(assignment, weight=jnp.ones((GROUPS, TOKENS, 1)))
    dispatcher = DISPATCHERS[method]
    back = dispatcher.combine(dispatcher.dispatch(arrays["x"], unit), unit)
    np.testing.assert_array_equal(back, arrays["x"] * assignment.kept[..., None])


@pytest.mark.parametrize("seed", range(3))
def test_gather_and_einsum_agree_in_value_and_in_every_gradient(seed: int) -> None:
    arrays = routed(seed)
    value, (d_x, d_router, d_kernel) = gradients("gather", arrays)
    reference, (ref_x, ref_router, ref_kernel) = gradients("einsum", arrays)
    np.testing.assert_allclose(value, reference, rtol=2e-6)
    np.testing.assert_allclose(d_x, ref_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_router, ref_router, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d_kernel, ref_kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_an_empty_expert_and_tokens_without_a_slot_get_exactly_zero_gradient(method: DispatchMethod) -> None:
    arrays = routed()
    _, (d_x, d_router, d_kernel) = gradients(method, arrays)
    np.testing.assert_array_equal(d_kernel[-1], 0)
    visited = [(np.asarray(assignment_of(arrays).expert) == expert).any() for expert in range(EXPERTS)]
    np.testing.assert_array_equal(np.abs(np.asarray(d_kernel)).sum((1, 2)) > 0, visited)
    without = ~np.asarray(assignment_of(arrays).kept)
    np.testing.assert_array_equal(np.asarray(d_x)[without], 0)
    assert np.abs(np.asarray(d_router)).sum() > 0


def test_dispatch_keeps_bfloat16() -> None:
    arrays = routed()
    assignment, x = assignment_of(arrays), arrays["x"].astype(jnp.bfloat16)
    for dispatcher in DISPATCHERS.values():
        dispatched = dispatcher.dispatch(x, assignment)
        assert dispatched.dtype == jnp.bfloat16
        assert dispatcher.combine(dispatched, assignment).dtype == jnp.bfloat16


def traced(method: DispatchMethod) -> tuple[set[str], int]:
    """A Switch layer looked at."""
    groups, tokens, experts, capacity, features = 2, 64, 8, 10, 16
    mask = jnp.ones((groups, tokens), bool)

    def loss(x: Array, router: Array, kernel: Array) -> Array:
        assignment = top_k(jax.nn.softmax(x @ router), capacity, mask)
        dispatched = DISPATCHERS[method].dispatch(x, assignment)
        outputs = jnp.einsum("gecd,edf->gecf", dispatched, kernel)
        return jnp.sum(DISPATCHERS[method].combine(outputs, assignment))

    arguments = (
        jnp.ones((groups, tokens, features)),
        jnp.ones((features, experts)),
        jnp.ones((experts, features, features)),
    )
    return looked_at(loss, *arguments)


def test_gather_needs_no_scatter_and_no_mask_of_tokens_by_experts_by_capacity() -> None:
    masks = 2 * 64 * 8 * 10
    primitives, largest = traced("gather")
    assert not [name for name in primitives if "scatter" in name]
    assert "gather" in primitives
    # The largest are the dispatched slots, [2, 8, 10, 16].
    assert largest == 2 * 8 * 10 * 16 < masks
    # The same look at the reference finds the masks, so it does look everywhere.
    assert traced("einsum")[1] >= masks


SLOTS = [(name, 10) for name in ROUTERS]
NO_SLOTS = [(name, None) for name, router in ROUTERS.items() if not router.config.needs_capacity]


@pytest.mark.parametrize(("name", "capacity"), [*SLOTS, *NO_SLOTS])
def test_few_choices_need_no_scatter_and_no_mask_of_tokens_by_experts_by_capacity(
    name: str, capacity: int | None
) -> None:
    groups, tokens, experts, features = 2, 64, 8, 4
    mask, ids = jnp.ones((groups, tokens), bool), jnp.zeros((groups, tokens), jnp.int32)

    def loss(x: Array, router: Array) -> Array:
        routing = decide(ROUTERS[name].config, capacity, x @ router, mask, ids, jnp.zeros(experts))
        choices = routing.assignment
        if isinstance(choices, Assignment):
            return jnp.sum(DISPATCHERS["gather"].combine(DISPATCHERS["gather"].dispatch(x, choices), choices))
        order = sort_by_expert(choices.expert.reshape(groups * tokens, -1), experts)
        rows = dispatch_rows(x.reshape(groups * tokens, features), order)
        return jnp.sum(combine_rows(rows, choices.weight.reshape(groups * tokens, -1), order))

    primitives, largest = looked_at(loss, jnp.ones((groups, tokens, features)), jnp.ones((features, experts)))
    assert not [name for name in primitives if "scatter" in name]
    # As large as any choice's rows are [2, 64, 8, 4], where an expert may choose each token.
    assert largest <= groups * tokens * experts * features < groups * tokens * experts * 10
