"""Top-1 assignment against hand-written tables, a loop over tokens, and what must hold of any input."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_t5.routing import choice
from switch_t5.routing.assignment import Assignment, filled_slots

top_k = jax.jit(choice.top_k, static_argnums=1)


def top_1(probs: jax.Array, capacity: int, mask: jax.Array) -> Assignment:
    """One choice, its axis taken away; with one choice an entry is a token."""
    found = top_k(probs, capacity, mask)
    expert, slot, weight = (x[..., 0] for x in (found.expert, found.slot, found.weight))
    return dataclasses.replace(found, expert=expert, slot=slot, weight=weight)


def has_slot(assignment: Assignment) -> jax.Array:
    return assignment.slot < assignment.num_experts * assignment.capacity


def assign_in_a_loop(probs: np.ndarray, capacity: int, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Switch routing as one would do it by hand."""
    groups, tokens, experts = probs.shape
    expert = np.full((groups, tokens), experts)
    slot = np.full((groups, tokens), experts * capacity)
    token = np.full((groups, experts * capacity), tokens)
    weight = np.zeros((groups, tokens), probs.dtype)
    for g in range(groups):
        used = [0] * experts
        for s in range(tokens):
            if not mask[g, s]:
                continue
            best = max(range(experts), key=lambda e: (probs[g, s, e], -e))
            expert[g, s], weight[g, s] = best, probs[g, s, best]
            if used[best] < capacity:
                slot[g, s] = best * capacity + used[best]
                token[g, slot[g, s]] = s
                used[best] += 1
    return {"expert": expert, "slot": slot, "entry": token, "weight": weight}


def one_hot_probs(choices: list[int], experts: int) -> jax.Array:
    """``[1, S, E]``: 0.5 more for the choice."""
    return (0.5 * jax.nn.one_hot(jnp.asarray([choices]), experts) + 0.5 / experts).astype(jnp.float32)


def test_slots_are_given_in_the_tokens_order_until_the_expert_is_full() -> None:
    assignment = top_1(one_hot_probs([1, 0, 1, 1, 2], 3), 2, jnp.ones((1, 5), bool))
    np.testing.assert_array_equal(assignment.expert, [[1, 0, 1, 1, 2]])
    # Expert e has the slots 2e and 2e + 1; the third token for expert 1 finds none.
    np.testing.assert_array_equal(assignment.slot, [[2, 0, 3, 6, 4]])
    np.testing.assert_array_equal(assignment.entry, [[1, 5, 0, 2, 4, 5]])
    np.testing.assert_array_equal(has_slot(assignment), [[True, True, True, False, True]])


def test_padding_takes_no_slot_and_has_no_expert_and_no_weight() -> None:
    mask = jnp.asarray([[False, True, False, True, True]])
    assignment = top_1(one_hot_probs([1, 0, 1, 1, 1], 3), 2, mask)
    np.testing.assert_array_equal(assignment.expert, [[3, 0, 3, 1, 1]])
    np.testing.assert_array_equal(assignment.slot, [[6, 0, 6, 2, 3]])
    np.testing.assert_array_equal(assignment.entry, [[1, 5, 3, 4, 5, 5]])
    np.testing.assert_array_equal(np.asarray(assignment.weight) > 0, mask)


def test_ties_go_to_the_expert_of_lower_index() -> None:
    probs = jnp.asarray([[[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]])
    np.testing.assert_array_equal(top_1(probs, 2, jnp.ones((1, 2), bool)).expert, [[0, 1]])


def test_the_weight_of_a_dropped_token_is_still_its_probability() -> None:
    probs = jnp.asarray([[[0.75, 0.25], [0.625, 0.375]]])
    assignment = top_1(probs, 1, jnp.ones((1, 2), bool))
    np.testing.assert_array_equal(assignment.weight, [[0.75, 0.625]])
    np.testing.assert_array_equal(has_slot(assignment), [[True, False]])


def test_the_weights_gradient_reaches_the_chosen_probability_alone() -> None:
    probs = jnp.asarray([[[0.4, 0.4, 0.2], [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]])
    mask = jnp.asarray([[True, True, False]])
    gradient = jax.grad(lambda p: jnp.sum(top_1(p, 2, mask).weight))(probs)
    np.testing.assert_array_equal(gradient, [[[1, 0, 0], [0, 0, 1], [0, 0, 0]]])


def test_groups_do_not_compete_for_slots() -> None:
    probs = jnp.concatenate([one_hot_probs([0, 0], 2), one_hot_probs([0, 1], 2)])
    assignment = top_1(probs, 1, jnp.ones((2, 2), bool))
    np.testing.assert_array_equal(assignment.slot, [[0, 2], [0, 1]])


@pytest.mark.parametrize("capacity", [1, 3, 40])
def test_assignment_equals_the_loop_over_tokens(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    # Few distinct values, so that ties abound.
    probs = (random.integers(1, 5, (3, 40, 6)) / 8).astype(np.float32)
    mask = random.random((3, 40)) < 0.8
    mask[2] = False
    assignment = top_1(jnp.asarray(probs), capacity, jnp.asarray(mask))
    for name, expected in assign_in_a_loop(probs, capacity, mask).items():
        np.testing.assert_array_equal(getattr(assignment, name), expected, err_msg=name)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    choices=st.lists(st.integers(0, 3), min_size=7, max_size=7),
    real=st.lists(st.booleans(), min_size=7, max_size=7),
    capacity=st.sampled_from([1, 2, 5]),
)
def test_slots_and_tokens_are_one_to_one_and_no_expert_exceeds_its_capacity(
    choices: list[int], real: list[bool], capacity: int
) -> None:
    experts, tokens = 4, 7
    assignment = top_1(one_hot_probs(choices, experts), capacity, jnp.asarray([real]))
    slot, token = np.asarray(assignment.slot)[0], np.asarray(assignment.entry)[0]
    kept = np.flatnonzero(slot < experts * capacity)
    np.testing.assert_array_equal(token[slot[kept]], kept)
    taken = np.flatnonzero(token < tokens)
    np.testing.assert_array_equal(slot[token[taken]], taken)
    assert len(taken) == len(kept)
    for expert in range(experts):
        wanted = [s for s in range(tokens) if real[s] and choices[s] == expert]
        # The first come are served, in their order, from the expert's first slot on.
        served = [t for t in token[expert * capacity : (expert + 1) * capacity] if t < tokens]
        assert served == wanted[:capacity]


def test_filled_slots_are_rows_by_expert_then_group_without_the_empty_ones() -> None:
    # Experts 1 0 1 1 | 0 and padding; two slots each, so the first group's last token has none.
    probs = jnp.concatenate([one_hot_probs([1, 0, 1, 1], 2), one_hot_probs([0, 0, 0, 0], 2)])
    mask = jnp.asarray([[True] * 4, [True, False, False, False]])
    order = filled_slots(top_k(probs, 2, mask))
    # Of eight tokens: expert 0 has 1 and 4, expert 1 has 0 and 2.
    np.testing.assert_array_equal(order.sizes, [2, 2])
    np.testing.assert_array_equal(order.entry, [1, 4, 0, 2, 8, 8, 8, 8])
    np.testing.assert_array_equal(order.row[:, 0], [2, 0, 3, 8, 1, 8, 8, 8])
    # A place in [E, G, C]; past the last row there is none.
    np.testing.assert_array_equal(order.number, [0, 2, 4, 5, 8, 8, 8, 8])


def test_filled_slots_of_expert_choice_hold_a_token_once_for_each_of_its_experts() -> None:
    probs = jnp.asarray([[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]])
    order = filled_slots(choice.expert_choice(probs, 2, jnp.ones((1, 3), bool)))
    np.testing.assert_array_equal(order.sizes, [2, 2])
    # Expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 1; an entry is token * 2 + expert.
    np.testing.assert_array_equal(order.entry, [0, 2, 5, 3])
    np.testing.assert_array_equal(order.row, [[0, 6], [1, 3], [6, 2]])
