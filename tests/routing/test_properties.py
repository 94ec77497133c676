"""What holds of every router whatever its input, and the oracle's word on random input."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switch_t5.conformance.routers import Router
from switch_t5.routing.assignment import Assignment
from switch_t5.routing.balance import RouterStats, router_stats
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod
from switch_t5.routing.router import Routing
from switch_t5.types import Array
from tests.routing.routers import CASES, KEY, KNOWS_TIES, decide, expected_routes, found_routes, with_slots

GROUPS, TOKENS, EXPERTS, CAPACITY, FEATURES = 2, 9, 6, 2, 3
MANY_EXPERTS = 10
"""More choices than the dispatch by index adds up one by one."""

# Few shapes, since each is compiled for each router.
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)
every_router = pytest.mark.parametrize("name", CASES)


@dataclasses.dataclass(frozen=True)
class Example:
    """What a router is asked; NumPy arrays, [G, S, E], [G, S], [G, S] and [E]."""

    logits: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray
    bias: np.ndarray

    def decision(self, case: Router, capacity: int = CAPACITY, rng: Array | None = KEY) -> Routing:
        """The library's."""
        return decide(case.config, capacity, self.logits, self.mask, self.tokens, self.bias, rng)

    def statistics(self, case: Router, routing: Routing) -> RouterStats:
        """The library's, of its decision."""
        return statistics(routing, None if case.probs is None else self.logits, self.mask)


@jax.jit
def statistics(routing: Routing, logits: Any, mask: Any) -> RouterStats:
    return router_stats(routing, logits, mask, mask, scope="group")


def drawn(seed: int, real: float, scale: float, tied: bool, experts: int) -> Example:
    random = np.random.default_rng(seed)
    shape = (GROUPS, TOKENS, experts)
    logits = random.integers(0, 3, shape) / 2 if tied else scale * random.normal(size=shape)
    return Example(
        logits.astype(np.float32),
        random.random(shape[:2]) < real,
        random.integers(1, 100, shape[:2]).astype(np.int32),
        (random.normal(size=experts) / 10).astype(np.float32),
    )


def examples(*, ties: bool = False, experts: int = EXPERTS) -> st.SearchStrategy[Example]:
    """Logits that are all different but for ``ties``, and any part of the tokens, or all or none, real."""
    seeds, scales = st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1.0])
    tied = st.booleans() if ties else st.just(False)
    return st.builds(drawn, seeds, st.sampled_from([1.0, 0.8, 0.4, 0.0]), scales, tied, st.just(experts))


def rng_by_token(name: str) -> Array | None:
    """None for GShard, whose second choices are drawn by the token's place; then each is asked."""
    return None if name == "gshard_top_2" else KEY


@every_router
@few
@given(data=st.data())
def test_the_oracle_agrees(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    example = data.draw(examples(ties=name in KNOWS_TIES))
    routing, mask = example.decision(case), example.mask
    logits = example.logits.astype(np.float64)
    routes = case.routes(logits, mask, example.tokens, CAPACITY, example.bias.astype(np.float64))
    assert found_routes(routing.assignment) == expected_routes(routes)
    weights = np.zeros(routing.assignment.weight.shape)
    for route in routes:
        weights[route.group, route.token, route.choice] = route.weight
    np.testing.assert_allclose(routing.assignment.weight, weights, rtol=1e-5, atol=1e-7)

    expected = {**case.losses(logits, mask, routes, "group"), **case.statistics(logits, mask, routes)}
    found = example.statistics(case, routing)
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(found, field), value, rtol=1e-4, atol=1e-5, err_msg=field)


def check_one_to_one(assignment: Assignment, mask: np.ndarray) -> None:
    """Entries invert slots, slots are the chosen experts', and each expert's first ones are taken first."""
    groups, tokens, choices = assignment.slot.shape
    nowhere, nobody = assignment.num_experts * assignment.capacity, tokens * choices
    expert = np.asarray(assignment.expert).reshape(groups, nobody)
    slot = np.asarray(assignment.slot).reshape(groups, nobody)
    entry = np.asarray(assignment.entry)
    assert entry.shape == (groups, nowhere)
    for g in range(groups):
        places, taken = np.flatnonzero(slot[g] < nowhere), np.flatnonzero(entry[g] < nobody)
        np.testing.assert_array_equal(entry[g, slot[g, places]], places)
        np.testing.assert_array_equal(slot[g, entry[g, taken]], taken)
        np.testing.assert_array_equal(slot[g, places] // assignment.capacity, expert[g, places])
        assert (slot[g] <= nowhere).all() and (entry[g] <= nobody).all()
        full = entry[g].reshape(assignment.num_experts, assignment.capacity) < nobody
        np.testing.assert_array_equal(full, np.sort(full, axis=1)[:, ::-1])
    padding = ~mask
    assert (np.asarray(assignment.slot)[padding] == nowhere).all()
    assert (np.asarray(assignment.expert)[padding] == assignment.num_experts).all()
    np.testing.assert_array_equal(np.asarray(assignment.weight)[padding], 0)


@every_router
@few
@given(data=st.data())
def test_slots_are_one_to_one_within_the_capacity_and_padding_takes_none(name: str, data: st.DataObject) -> None:
    example = data.draw(examples(ties=True))
    check_one_to_one(example.decision(CASES[name]).assignment, example.mask)


@pytest.mark.parametrize("name", ["top_3", "batch_prioritized", "no_token_left_behind", "expert_choice", "hash"])
def test_without_a_slot_every_token_is_dropped(name: str) -> None:
    example = drawn(0, 0.8, 1.0, False, EXPERTS)
    routing = example.decision(CASES[name], 0)
    assert not np.asarray(routing.assignment.kept).any()
    assert float(example.statistics(CASES[name], routing).dropped) == example.mask.sum() > 0


@every_router
@few
@given(example=examples(), other=examples())
def test_what_padding_holds_changes_nothing(name: str, example: Example, other: Example) -> None:
    case, mask = CASES[name], example.mask
    changed = dataclasses.replace(
        example,
        logits=np.where(mask[..., None], example.logits, 5 * other.logits),
        tokens=np.where(mask, example.tokens, other.tokens),
    )
    before, after = (each.decision(case) for each in (example, changed))
    for one, another in zip(
        jax.tree.leaves((before.assignment, before.load, example.statistics(case, before))),
        jax.tree.leaves((after.assignment, after.load, changed.statistics(case, after))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, another)


@st.composite
def expert_permutations(draw: st.DrawFn, groups: int) -> np.ndarray:
    """Permutations of the experts that keep ``groups`` of neighbours together, whose best a token chooses from."""
    size = EXPERTS // groups
    order = draw(st.permutations(range(groups)))
    return np.concatenate([group * size + np.asarray(draw(st.permutations(range(size)))) for group in order])


# A hash and a draw name an expert by its index; they see no logits that could be permuted.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("hash", "random")])
@few
@given(data=st.data())
def test_permuted_experts_are_chosen_as_they_were(name: str, data: st.DataObject) -> None:
    case, example = CASES[name], data.draw(examples())
    permutation = data.draw(expert_permutations(case.config.num_expert_groups))
    permuted = dataclasses.replace(
        example, logits=example.logits[..., permutation], bias=example.bias[permutation]
    ).decision(case)
    before = example.decision(case)
    # Of the permuted experts and slots the former ones; the last is none.
    expert = np.append(permutation, EXPERTS)
    slot = np.append(permutation[:, None] * CAPACITY + np.arange(CAPACITY), EXPERTS * CAPACITY)
    # The choices of expert choice are the experts.
    choices = permutation if name == "expert_choice" else slice(None)
    found, expected = with_slots(permuted.assignment), with_slots(before.assignment)
    np.testing.assert_array_equal(expert[found.expert], np.asarray(expected.expert)[..., choices])
    np.testing.assert_array_equal(slot[found.slot], np.asarray(expected.slot)[..., choices])
    np.testing.assert_allclose(found.weight, np.asarray(expected.weight)[..., choices], rtol=1e-5)
    np.testing.assert_array_equal(permuted.load, np.asarray(before.load)[..., permutation])


def permuted_tokens(example: Example, order: list[int]) -> Example:
    return dataclasses.replace(
        example, logits=example.logits[:, order], mask=example.mask[:, order], tokens=example.tokens[:, order]
    )


# A random expert is drawn by the token's place.
@pytest.mark.parametrize("name", [name for name in CASES if name != "random"])
@few
@given(example=examples(), order=st.permutations(range(TOKENS)))
def test_permuted_tokens_choose_as_they_did_where_none_is_dropped(
    name: str, example: Example, order: list[int]
) -> None:
    before, after = (
        each.decision(CASES[name], TOKENS, rng_by_token(name)).assignment
        for each in (example, permuted_tokens(example, order))
    )
    np.testing.assert_array_equal(after.kept, example.mask[:, order])
    np.testing.assert_array_equal(after.expert, np.asarray(before.expert)[:, order])
    np.testing.assert_allclose(after.weight, np.asarray(before.weight)[:, order], rtol=1e-5)


@pytest.mark.parametrize("name", ["batch_prioritized", "expert_choice"])
@few
@given(example=examples(), order=st.permutations(range(TOKENS)))
def test_where_the_surest_come_first_permuted_tokens_have_the_slots_that_they_had(
    name: str, example: Example, order: list[int]
) -> None:
    before, after = (
        with_slots(each.decision(CASES[name]).assignment) for each in (example, permuted_tokens(example, order))
    )
    np.testing.assert_array_equal(after.slot, np.asarray(before.slot)[:, order])
    np.testing.assert_array_equal(after.expert, np.asarray(before.expert)[:, order])


# In evaluation, too, a random expert is drawn by the sequence's place in its microbatch.
@pytest.mark.parametrize("name", [name for name in CASES if name != "random"])
@few
@given(example=examples())
def test_losses_and_statistics_of_a_batch_are_the_sums_of_its_microbatches(name: str, example: Example) -> None:
    case = CASES[name]
    parts = [
        dataclasses.replace(example, logits=example.logits[[g]], mask=example.mask[[g]], tokens=example.tokens[[g]])
        for g in range(GROUPS)
    ]
    whole, *of_parts = (each.decision(case, rng=rng_by_token(name)) for each in (example, *parts))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_parts)
    for field in ("expert", "slot", "entry"):
        np.testing.assert_array_equal(getattr(whole.assignment, field), getattr(joined.assignment, field))
    sums = jax.tree.map(
        lambda *leaves: sum(leaves),
        *(part.statistics(case, routing) for part, routing in zip(parts, of_parts, strict=True)),
    )
    found = example.statistics(case, whole)
    for field in dataclasses.fields(found):
        np.testing.assert_allclose(
            getattr(found, field.name), getattr(sums, field.name), rtol=1e-5, atol=1e-6, err_msg=field.name
        )


@functools.partial(jax.jit, static_argnums=0)
def passed(
    method: DispatchMethod, assignment: Assignment, x: Any, scale: Any, d_output: Any
) -> tuple[Array, Array, Any]:
    """Dispatched tokens, what comes back of them from experts that multiply by ``scale`` [E], and all gradients."""
    dispatcher = DISPATCHERS[method]

    def forward(x: Array, weight: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
        given = dataclasses.replace(assignment, weight=weight)
        dispatched = dispatcher.dispatch(x, given)
        output = dispatcher.combine(dispatched * scale[:, None, None], given)
        return jnp.sum(output * d_output), (dispatched, output)

    gradients, (dispatched, output) = jax.grad(forward, argnums=(0, 1, 2), has_aux=True)(x, assignment.weight, scale)
    return dispatched, output, gradients


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


ROUTED = [(name, EXPERTS) for name in CASES] + [("expert_choice", MANY_EXPERTS)]


@pytest.mark.parametrize(("name", "experts"), ROUTED)
@few
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_unit_experts_and_weights_give_back_kept_tokens_once_a_choice_and_nothing_of_dropped_ones(
    name: str, experts: int, data: st.DataObject, seed: int
) -> None:
    assignment = with_slots(data.draw(examples(experts=experts)).decision(CASES[name]).assignment)
    x, d_output = arrays(seed, (GROUPS, TOKENS, FEATURES), (GROUPS, TOKENS, FEATURES))
    unit = dataclasses.replace(assignment, weight=jnp.ones_like(assignment.weight))
    taken = np.sum(np.asarray(assignment.slot) < experts * CAPACITY, axis=-1)[..., None]
    for method in DISPATCHERS:
        _, output, (d_x, _, _) = passed(method, unit, x, np.ones(experts, np.float32), d_output)
        for found, of_one in ((output, x), (d_x, d_output)):
            np.testing.assert_allclose(found, taken * of_one, rtol=1e-6, err_msg=method)
            # For a token of one choice nothing is rounded.
            once = np.broadcast_to(taken == 1, of_one.shape)
            np.testing.assert_array_equal(np.asarray(found)[once], of_one[once], err_msg=method)


@pytest.mark.parametrize(("name", "experts"), ROUTED)
@few
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_both_dispatchers_agree_in_value_and_gradient(name: str, experts: int, data: st.DataObject, seed: int) -> None:
    assignment = with_slots(data.draw(examples(experts=experts)).decision(CASES[name]).assignment)
    x, d_output, scale = arrays(seed, (GROUPS, TOKENS, FEATURES), (GROUPS, TOKENS, FEATURES), (experts,))
    found, expected = (
        jax.tree.leaves(passed(method, assignment, x, scale, d_output)) for method in ("gather", "einsum")
    )
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-5, atol=1e-6)
