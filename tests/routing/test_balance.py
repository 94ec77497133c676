"""Balance losses and statistics by hand."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.routing import balance, choice
from switch_t5.routing.assignment import load_of
from switch_t5.routing.balance import RouterStats, router_z_loss
from switch_t5.routing.router import Routing

top_1 = jax.jit(choice.top_k, static_argnums=1)


@functools.partial(jax.jit, static_argnames="scope")
def load_balance_loss(
    probs: jax.Array, expert: jax.Array, mask: jax.Array, scope: balance.BalanceScope = "group"
) -> jax.Array:
    """Of experts ``[G, S, K]``."""
    return balance.load_balance_loss(probs, load_of(expert, probs.shape[-1]), mask, scope=scope)


@functools.partial(jax.jit, static_argnames="capacity")
def router_stats(logits: jax.Array, probs: jax.Array, capacity: int, mask: jax.Array) -> RouterStats:
    """Of top-1 routing by ``probs``."""
    assignment = choice.top_k(probs, capacity, mask)
    routing = Routing(assignment, probs, load_of(assignment.expert, probs.shape[-1]))
    return balance.router_stats(routing, logits, mask, mask)


def test_the_load_balance_loss_is_1_when_tokens_and_probabilities_are_uniform() -> None:
    probs = jnp.full((1, 8, 4), 0.25)
    expert = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]], jnp.int32)[..., None]
    np.testing.assert_array_equal(load_balance_loss(probs, expert, jnp.ones((1, 8), bool)), [1.0])


def test_the_load_balance_loss_is_the_number_of_experts_when_one_takes_all() -> None:
    probs = jnp.zeros((1, 8, 4)).at[..., 2].set(1.0)
    expert = jnp.full((1, 8, 1), 2, jnp.int32)
    np.testing.assert_array_equal(load_balance_loss(probs, expert, jnp.ones((1, 8), bool)), [4.0])


def test_the_load_balance_loss_of_equations_4_to_6_by_hand() -> None:
    probs = jnp.asarray([[[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]])
    mask = jnp.asarray([[True, True, True, False]])
    expert = top_1(probs, 1, mask).expert
    # Of the three real tokens f = (2/3, 1/3, 0), and P = (1.5, 0.875, 0.625) / 3.
    expected = 3 * (2 / 3 * 1.5 / 3 + 1 / 3 * 0.875 / 3)
    np.testing.assert_allclose(load_balance_loss(probs, expert, mask), [expected], rtol=1e-6)


def test_the_load_balance_loss_counts_first_choices_before_capacity() -> None:
    probs = jnp.asarray([[[0.75, 0.25], [0.75, 0.25]]])
    mask = jnp.ones((1, 2), bool)
    for capacity in (1, 2):
        expert = top_1(probs, capacity, mask).expert
        np.testing.assert_allclose(load_balance_loss(probs, expert, mask), [2 * 0.75])


def test_the_load_balance_gradient_reaches_probabilities_through_their_mean_alone() -> None:
    probs = jnp.asarray([[[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]])
    mask = jnp.asarray([[True, True, True, False]])

    def loss(probs: jax.Array) -> jax.Array:
        return load_balance_loss(probs, top_1(probs, 2, mask).expert, mask)[0]

    row = 3 / 3 * np.asarray([2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(jax.grad(loss)(probs), [[row, row, row, 0 * row]], rtol=1e-6)


def test_a_group_of_padding_alone_has_no_loss_and_no_gradient() -> None:
    probs, mask = jnp.full((1, 4, 2), 0.5), jnp.zeros((1, 4), bool)
    expert = jnp.full((1, 4, 1), 2, jnp.int32)
    np.testing.assert_array_equal(load_balance_loss(probs, expert, mask), [0.0])
    gradient = jax.grad(lambda p: load_balance_loss(p, expert, mask)[0])(probs)
    np.testing.assert_array_equal(gradient, np.zeros((1, 4, 2)))


def test_the_router_z_loss_is_the_squared_log_sum_exp_and_zero_for_padding() -> None:
    logits = jnp.log(jnp.asarray([[[1.0, 2.0, 3.0], [0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]]))
    mask = jnp.asarray([[True, True, False]])
    np.testing.assert_allclose(router_z_loss(logits, mask), [[math.log(6) ** 2, 0, 0]], rtol=1e-6, atol=1e-12)


def test_the_expert_load_counts_neither_padding_nor_capacity() -> None:
    expert = jnp.asarray([[0, 2, 2, 3], [3, 3, 1, 1]], jnp.int32)
    np.testing.assert_array_equal(load_of(expert[..., None], 3), [[1, 0, 2], [0, 2, 0]])
    np.testing.assert_array_equal(load_of(expert.reshape(2, 2, 2), 3), [[1, 0, 2], [0, 2, 0]])


def example() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits and probabilities of two groups of three tokens and two experts; one token is padding."""
    probs = jnp.asarray([[[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], [[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]]])
    mask = jnp.asarray([[True, True, True], [True, True, False]])
    return jnp.log(probs) + 1, probs, mask


def test_router_statistics_by_hand() -> None:
    logits, probs, mask = example()
    stats = router_stats(logits, probs, 1, mask)
    assert float(stats.tokens) == 5
    np.testing.assert_array_equal(stats.expert_load, [4, 1])
    assert float(stats.dropped) == 2
    of_group = [2 * (2 / 3 * 1.5 / 3 + 1 / 3 * 1.5 / 3), 2 * (1 * 0.75)]
    np.testing.assert_allclose(stats.load_balance_loss, 3 * of_group[0] + 2 * of_group[1], rtol=1e-6)
    # Every log-sum-exp is 1.
    np.testing.assert_allclose(stats.router_z_loss, 5.0, rtol=1e-6)
    uneven = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    np.testing.assert_allclose(stats.router_entropy, 4 * uneven + math.log(2), rtol=1e-6)
    np.testing.assert_allclose(stats.router_confidence, 4 * 0.75 + 0.5, rtol=1e-6)


def test_router_means_divide_by_the_real_tokens() -> None:
    logits, probs, mask = example()
    stats = router_stats(logits, probs, 1, mask)
    means = stats.means()
    np.testing.assert_allclose(means["fraction_dropped"], 2 / 5)
    np.testing.assert_allclose(means["expert_load"], [4 / 5, 1 / 5])
    for name in ("load_balance_loss", "router_z_loss", "router_entropy", "router_confidence"):
        np.testing.assert_allclose(means[name], getattr(stats, name) / 5, rtol=1e-6)


def test_router_means_of_stacked_layers_stay_apart() -> None:
    logits, probs, mask = example()
    first = router_stats(logits, probs, 1, mask)
    second = router_stats(logits, probs, 3, mask)
    means = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second).means()
    np.testing.assert_allclose(means["fraction_dropped"], [2 / 5, 0])
    assert means["expert_load"].shape == (2, 2)


def test_router_statistics_add_over_groups() -> None:
    logits, probs, mask = example()
    whole = router_stats(logits, probs, 1, mask)
    parts = [router_stats(logits[g : g + 1], probs[g : g + 1], 1, mask[g : g + 1]) for g in range(2)]
    for field in dataclasses.fields(whole):
        total = getattr(parts[0], field.name) + getattr(parts[1], field.name)
        np.testing.assert_allclose(getattr(whole, field.name), total, rtol=1e-6, err_msg=field.name)


def test_padding_alone_gives_zeros_and_no_division_by_zero() -> None:
    logits, probs, mask = example()
    nobody = jnp.zeros_like(mask)
    stats = router_stats(logits, probs, 1, nobody)
    for name, value in (*dataclasses.asdict(stats).items(), *stats.means().items()):
        np.testing.assert_array_equal(value, np.zeros_like(value), err_msg=name)


@pytest.mark.parametrize("name", ["router_entropy", "router_confidence", "dropped", "expert_load"])
def test_what_is_only_watched_has_no_gradient(name: str) -> None:
    logits, _, mask = example()

    def value(logits: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(logits)
        return jnp.sum(getattr(router_stats(logits, probs, 1, mask), name))

    np.testing.assert_array_equal(jax.jit(jax.grad(value))(logits), np.zeros_like(logits))


def test_over_the_batch_groups_may_balance_each_other() -> None:
    probs = jnp.zeros((2, 4, 2)).at[0, :, 0].set(1.0).at[1, :, 1].set(1.0)
    expert = jnp.asarray([[0] * 4, [1] * 4], jnp.int32)[..., None]
    mask = jnp.ones((2, 4), bool)
    np.testing.assert_array_equal(load_balance_loss(probs, expert, mask), [2.0, 2.0])
    np.testing.assert_array_equal(load_balance_loss(probs, expert, mask, "batch"), [1.0, 1.0])


def test_the_importance_loss_by_hand() -> None:
    probs = jnp.asarray([[[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    # Importances (0.75, 1.25) and (2, 1).
    expected = [0.25**2 / 1, 0.5**2 / 1.5**2]
    np.testing.assert_allclose(jax.jit(balance.importance_loss)(probs, mask), expected, rtol=1e-6)


def test_an_even_expected_load_costs_nothing_and_padding_alone_neither() -> None:
    load_probs = jnp.full((2, 3, 4), 0.25)
    mask = jnp.asarray([[True, True, True], [False, False, False]])
    np.testing.assert_array_equal(jax.jit(balance.load_loss)(load_probs, mask), [0.0, 0.0])
