"""The reference of routing against tables worked out by hand."""

from __future__ import annotations

import ast
import math
from typing import Any

import numpy as np
import pytest

from switch_t5.conformance import oracle
from switch_t5.conformance.oracle import Route, top_k

# Router probabilities of six tokens and three experts; the third token is padding, with the strongest wish of all.
TABLE = np.array([[[10, 5, 5], [12, 6, 2], [18, 1, 1], [4, 14, 2], [8, 8, 4], [16, 2, 2]]]) / 20
LOGITS = np.log(TABLE)
MASK = np.array([[True, True, False, True, True, True]])
ONE, TWO, THREE, FOUR = (np.ones((1, tokens), bool) for tokens in (1, 2, 3, 4))


def logit(probability: Any) -> np.ndarray:
    return np.log(np.asarray(probability)) - np.log(1 - np.asarray(probability))


def check(routes: list[Route], expected: list[tuple[int, int, int, int | None, float]], group: int = 0) -> None:
    """Compares with rows of token, choice, expert, position and weight."""
    rows = [(route.group, route.token, route.choice, route.expert, route.position) for route in routes]
    assert rows == [(group, *row[:4]) for row in expected]
    assert [route.weight for route in routes] == pytest.approx([row[4] for row in expected], rel=1e-12)


def test_reference_imports_nothing_of_what_it_judges():
    with open(oracle.__file__) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names == {"__future__", "collections.abc", "dataclasses", "math", "numpy", "typing"}


def test_softmax_and_normalized_sigmoid():
    assert oracle.softmax(np.log([[1.0, 2.0, 5.0]])) == pytest.approx(np.array([[0.125, 0.25, 0.625]]))
    assert oracle.softmax(np.array([1000.0, 1000.0, -1000.0])).tolist() == [0.5, 0.5, 0.0]
    permuted = oracle.softmax(np.array([[0.1, 0.7, -1.3, 2.9], [2.9, -1.3, 0.7, 0.1]]))
    assert permuted[0].tolist() == permuted[1, ::-1].tolist()
    assert oracle.normalized_sigmoid(logit([0.5, 0.6, 0.8, 0.1])) == pytest.approx(np.array([0.25, 0.3, 0.4, 0.05]))
    assert oracle.normalized_sigmoid(np.array([1000.0, -1000.0])).tolist() == [1.0, 0.0]


SWITCH = [(0, 0, 0, 0, 0.5), (1, 0, 0, 1, 0.6), (3, 0, 1, 0, 0.7), (4, 0, 0, None, 0.4), (5, 0, 0, None, 0.8)]
PRIORITIZED = [(5, 0, 0, 0, 0.8), (3, 0, 1, 0, 0.7), (1, 0, 0, 1, 0.6), (0, 0, 0, None, 0.5), (4, 0, 0, None, 0.4)]


def test_switch_gives_slots_in_token_order_and_drops_at_capacity():
    check(top_k(LOGITS, MASK, 2), SWITCH)
    check(top_k(LOGITS, MASK, None), [*SWITCH[:3], (4, 0, 0, 2, 0.4), (5, 0, 0, 3, 0.8)])
    assert [route.position for route in top_k(LOGITS, MASK, 0)] == [None] * 5


def test_batch_priority_visits_the_most_confident_token_first():
    check(top_k(LOGITS, MASK, 2, batch_prioritized=True), PRIORITIZED)
    tied = top_k(np.array([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]]), FOUR, 1, batch_prioritized=True)
    assert [(r.token, r.expert, r.position) for r in tied] == [(3, 1, 0), (0, 1, None), (1, 0, 0), (2, 1, None)]


def test_top_2_gives_second_choices_what_first_choices_left():
    # The first token's experts 1 and 2 tie.
    second = [
        (0, 1, 1, 1, 0.25),
        (1, 1, 1, None, 0.3),
        (3, 1, 0, None, 0.2),
        (4, 1, 1, None, 0.4),
        (5, 1, 1, None, 0.1),
    ]
    check(top_k(LOGITS, MASK, 2, k=2), SWITCH + second)
    routes = top_k(LOGITS, MASK, 2, k=2, batch_prioritized=True)
    assert [route.token for route in routes] == [5, 3, 1, 0, 4] * 2
    assert [route.position for route in routes] == [0, 0, 1, None, None, 1, None, None, None, None]
    # Renormalised weights count dropped choices too.
    routes = top_k(LOGITS, MASK, 2, k=2, renormalize=True)
    first, second = [2 / 3, 2 / 3, 7 / 9, 1 / 2, 8 / 9], [1 / 3, 1 / 3, 2 / 9, 1 / 2, 1 / 9]
    assert [route.weight for route in routes] == pytest.approx(first + second)
    assert [route.position for route in routes] == [0, 1, 0, None, None, 1, None, None, None, None]


def test_groups_do_not_compete():
    logits, mask = np.concatenate([LOGITS, LOGITS[:, ::-1]]), np.concatenate([MASK, MASK[:, ::-1]])
    routes = top_k(logits, mask, 2, batch_prioritized=True)
    check(routes[:5], PRIORITIZED)
    check(routes[5:], [(5 - token, *row) for token, *row in PRIORITIZED], group=1)


def test_gumbel_noise_moves_choices_and_neither_weights_nor_priority():
    gumbel = np.zeros((1, 6, 3))
    gumbel[0, 0, 2] = 1.0  # Odds of e against 2: the expert 2 wins.
    gumbel[0, 5, 1] = 2.0  # Odds of e^2 = 7.39 against 8: the expert 0 stays.
    expected = [*PRIORITIZED[:3], (0, 0, 2, 0, 0.25), (4, 0, 0, 2, 0.4)]
    check(top_k(LOGITS, MASK, 3, batch_prioritized=True, gumbel=gumbel), expected)


def test_choices_are_made_in_float64_and_are_no_more_than_experts():
    gumbel = np.array([[[-1e-9, 0.0]]], np.float32)
    check(top_k(np.array([[[1.0, 1.0]]], np.float32), ONE, 1, gumbel=gumbel), [(0, 0, 1, 0, 0.5)])
    with pytest.raises(ValueError, match="4 choices asked of 3 candidates"):
        top_k(LOGITS, MASK, 2, k=4)


def test_gshard_second_choice_asks_where_twice_its_weight_exceeds_chance():
    # Twice the second weights: 2/3, 2/3, padding, 4/9, 1, 2/9.
    routes = oracle.gshard_top_2(LOGITS, MASK, 3, uniform=np.array([[0.7, 0.6, 0.0, 0.5, 0.99, 0.2]]))
    first = [(0, 0, 0, 0, 2 / 3), (1, 0, 0, 1, 2 / 3), (3, 0, 1, 0, 7 / 9), (4, 0, 0, 2, 0.5), (5, 0, 0, None, 8 / 9)]
    check(routes, [*first, (1, 1, 1, 1, 1 / 3), (4, 1, 1, 2, 0.5), (5, 1, 1, None, 1 / 9)])
    equal = oracle.gshard_top_2(np.zeros((1, 2, 2)), TWO, None, uniform=np.array([[1.0, np.nextafter(1.0, 0.0)]]))
    check(equal, [(0, 0, 0, 0, 0.5), (1, 0, 0, 1, 0.5), (1, 1, 1, 0, 0.5)])


def test_expert_choice_takes_the_best_real_tokens_of_each_expert():
    rows = [(5, 0, 0, 0, 0.8), (1, 0, 0, 1, 0.6), (3, 1, 1, 0, 0.7), (4, 1, 1, 1, 0.4), (0, 2, 2, 0, 0.25)]
    check(oracle.expert_choice(LOGITS, MASK, 2), [*rows, (4, 2, 2, 1, 0.2)])
    # By probabilities: the logits of the first token are larger, for both experts.
    routes = oracle.expert_choice(np.array([[[5.0, 5.0], [1.0, 0.0]]]), TWO, 1)
    assert [(r.token, r.expert) for r in routes] == [(1, 0), (0, 1)]
    # Ties go to the earlier token; slots are left empty.
    logits, mask = np.zeros((1, 4, 2)), np.array([[False, True, True, False]])
    expected = [(1, 0, 0, 0, 0.5), (2, 0, 0, 1, 0.5), (1, 1, 1, 0, 0.5), (2, 1, 1, 1, 0.5)]
    check(oracle.expert_choice(logits, mask, 3), expected)
    check(oracle.expert_choice(logits, mask, None), expected)
    check(oracle.expert_choice(logits, mask, 1), [expected[0], expected[2]])


def test_given_experts_weigh_one_and_are_full_at_capacity():
    expected = [(0, 0, 1, 0, 1.0), (1, 0, 1, 1, 1.0), (3, 0, 1, None, 1.0), (4, 0, 0, 0, 1.0), (5, 0, 1, None, 1.0)]
    check(oracle.given(np.array([[1, 1, 1, 1, 0, 1]]), MASK, 2), expected)


def test_no_token_left_behind_asks_the_next_expert_each_round_after_all_of_earlier_rounds():
    check(oracle.no_token_left_behind(LOGITS, MASK, 2, rounds=1), SWITCH)
    second = [*SWITCH[:3], (4, 0, 1, 1, 0.4)]
    check(oracle.no_token_left_behind(LOGITS, MASK, 2, rounds=2), [*second, (5, 0, 0, None, 0.8)])
    check(oracle.no_token_left_behind(LOGITS, MASK, 2, rounds=3), [*second, (5, 0, 2, 0, 0.1)])
    # The second token is refused by expert 0 and finds expert 1 taken by a later token's first choice.
    logits = np.log([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]])
    expected = [(0, 0, 0, 0, 0.9), (2, 0, 1, 0, 0.7), (1, 0, 0, None, 0.8), (3, 0, 1, None, 0.6)]
    check(oracle.no_token_left_behind(logits, FOUR, 1, rounds=2), expected)


def test_one_sinkhorn_iteration_divides_by_each_experts_share():
    # Sums over tokens 3.0 and 1.0: odds of expert 0 must exceed 3. Padding has no part in them.
    logits = np.log([[[0.9, 0.1], [0.8, 0.2], [0.01, 0.99], [0.7, 0.3], [0.6, 0.4]]])
    mask = np.array([[True, True, False, True, True]])
    expected = [(0, 0, 0, 0, 0.9), (1, 0, 0, 1, 0.8), (3, 0, 1, 0, 0.3), (4, 0, 1, 1, 0.4)]
    check(oracle.sinkhorn(logits, mask, 2, iterations=1), expected)
    # Rows are normalised first: what a token adds to all its logits changes nothing.
    shifted = logits + np.array([7.0, -5.0, 0.0, 3.0, 0.0])[None, :, None]
    check(oracle.sinkhorn(shifted, mask, 2, iterations=1), expected)
    check(oracle.sinkhorn(LOGITS, MASK, 2, iterations=0), SWITCH)


def test_two_sinkhorn_iterations_and_two_choices():
    # First: sums 2.35 and 0.65, so expert 0 needs odds above 3.615; it loses 0.6. Second: rows of p / (2.35, 0.65),
    # normalised, give the potentials' ratio 2.5985 / 0.58126 = 4.470, above the odds 4 of the first token.
    logits = np.log([[[0.8, 0.2], [0.6, 0.4], [0.95, 0.05]]])
    once = [(0, 0, 0, 0, 0.8), (1, 0, 1, 0, 0.4), (2, 0, 0, None, 0.95)]
    twice = [(0, 0, 1, 0, 0.2), (1, 0, 1, None, 0.4), (2, 0, 0, 0, 0.95)]
    check(oracle.sinkhorn(logits, THREE, 1, iterations=1), once)
    check(oracle.sinkhorn(logits, THREE, 1, iterations=2), twice)
    # Second choices come last; a group of padding alone has no plan.
    logits = np.log([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.9, 0.1]]])
    routes = oracle.sinkhorn(logits, np.array([[True, True], [False, False]]), 1, iterations=1, k=2)
    check(routes, [(0, 0, 0, 0, 0.9), (1, 0, 1, 0, 0.4), (0, 1, 1, None, 0.1), (1, 1, 0, None, 0.6)])


SCORES = logit([[[0.5, 0.6, 0.8, 0.2]]])
BIAS = np.array([0.0, 0.0, -0.5, 0.5])  # Selection scores 0.5, 0.6, 0.3, 0.7.


def test_sigmoid_bias_chooses_and_does_not_weigh():
    check(oracle.sigmoid_top_k(SCORES, ONE, 1, k=2, bias=BIAS), [(0, 0, 3, 0, 0.25), (0, 1, 1, 0, 0.75)])
    doubled = oracle.sigmoid_top_k(SCORES, ONE, 1, k=2, bias=BIAS, scale=2.0)
    check(doubled, [(0, 0, 3, 0, 0.5), (0, 1, 1, 0, 1.5)])


def test_sigmoid_excludes_experts_of_weaker_groups():
    # The groups score 1.1 and 1.0, although the best expert is in the second.
    routes = oracle.sigmoid_top_k(SCORES, ONE, 1, k=2, bias=BIAS, num_expert_groups=2, num_limited_groups=1)
    check(routes, [(0, 0, 1, 0, 6 / 11), (0, 1, 0, 0, 5 / 11)])
    single = oracle.sigmoid_top_k(SCORES, ONE, 1, k=2, bias=BIAS, num_expert_groups=4, num_limited_groups=2)
    check(single, [(0, 0, 3, 0, 0.25), (0, 1, 1, 0, 0.75)])
    # Of two choices the two best of three experts count: 0.5 + 0.5 (+ 0.5) against 0.7 + 0.6 (+ 0.1).
    logits, bias = logit([[[0.5, 0.5, 0.5, 0.7, 0.6, 0.1]]]), np.zeros(6)
    routes = oracle.sigmoid_top_k(logits, ONE, 1, k=2, bias=bias, num_expert_groups=2, num_limited_groups=1)
    check(routes, [(0, 0, 3, 0, 7 / 13), (0, 1, 4, 0, 6 / 13)])
    # Of one choice the best counts: 0.5 (+ 0.5) against 0.7 (+ 0.1).
    logits, bias = logit([[[0.5, 0.5, 0.7, 0.1]]]), np.zeros(4)
    routes = oracle.sigmoid_top_k(logits, ONE, 1, k=1, bias=bias, num_expert_groups=2, num_limited_groups=1)
    check(routes, [(0, 0, 2, 0, 1.0)])


def test_sigmoid_ties_and_slots():
    logits, bias = np.zeros((1, 1, 4)), np.zeros(4)
    routes = oracle.sigmoid_top_k(logits, ONE, 1, k=2, bias=bias, num_expert_groups=2, num_limited_groups=1)
    check(routes, [(0, 0, 0, 0, 0.5), (0, 1, 1, 0, 0.5)])
    # Second choices come last; padding takes no slot.
    logits = logit([[[0.6, 0.2], [0.9, 0.1], [0.6, 0.3]]])
    routes = oracle.sigmoid_top_k(logits, np.array([[True, False, True]]), 1, k=2, bias=np.zeros(2))
    check(routes, [(0, 0, 0, 0, 0.75), (2, 0, 0, None, 2 / 3), (0, 1, 1, 0, 0.25), (2, 1, 1, None, 1 / 3)])


UNIT = np.ones((1, 1, 1))
X = np.array([[[1.0, 2.0], [3.0, -1.0], [1.0, 1.0]]])
WI_0, WI_1 = np.array([[[1.0], [1.0]], [[2.0], [-1.0]]]), np.array([[[1.0], [0.0]], [[0.0], [1.0]]])
WO = np.array([[[1.0, 10.0]], [[2.0, -2.0]]])


def test_activations():
    expected = {"relu": (0, 2), "linear": (-1, 2), "silu": (-0.2689414, 1.7615942), "gelu": (-0.1588080, 1.9545977)}
    for name, values in expected.items():
        output = oracle.experts_forward(np.array([[-1.0], [2.0]]), (UNIT,), UNIT, (name,))
        assert output[0, :, 0] == pytest.approx(values, rel=1e-6)


def test_every_expert_on_every_token():
    first, second = [[3.0, 30.0], [2.0, 20.0], [2.0, 20.0]], [[0.0, 0.0], [14.0, -14.0], [2.0, -2.0]]
    assert oracle.experts_forward(X, (WI_0,), WO, ("relu",)).tolist() == [[first], [second]]


def test_combine_weighs_kept_routes_and_ignores_dropped_ones():
    rows = [(0, 0, 0, 0, 0.5), (1, 0, 1, 0, 0.75), (2, 0, 1, None, 0.9), (1, 1, 0, 1, 0.25)]
    routes = [Route(0, *row) for row in rows]
    y = oracle.combine(X, routes, (WI_0,), WO, ("relu",))
    assert y.tolist() == [[[1.5, 15.0], [11.0, -5.5], [0.0, 0.0]]]
    gated = oracle.combine(X, routes, (WI_0, WI_1), WO, ("relu", "linear"))
    assert gated.tolist() == [[[1.5, 15.0], [-9.0, 25.5], [0.0, 0.0]]]
    assert not oracle.combine(X, [], (WI_0,), WO, ("relu",)).any()


# Means of the table over its five real tokens: 0.5, 0.35, 0.15.


def test_load_balance_counts_selections_or_first_choices():
    # Selections 4, 1, 0: 3 (0.8 0.5 + 0.2 0.35).
    assert oracle.load_balance_loss(TABLE, top_k(LOGITS, MASK, 2), MASK) == pytest.approx([1.41])
    # Selections 5, 5, 0: 3 (0.5 0.5 + 0.5 0.35).
    routes = top_k(LOGITS, MASK, 2, k=2)
    assert oracle.load_balance_loss(TABLE, routes, MASK) == pytest.approx([1.275])
    assert oracle.load_balance_loss(TABLE, routes, MASK, first_choice_only=True) == pytest.approx([1.41])
    # The first choice, where a later round's expert took the token.
    routes = oracle.no_token_left_behind(LOGITS, MASK, 2, rounds=3)
    assert oracle.load_balance_loss(TABLE, routes, MASK, first_choice_only=True) == pytest.approx([1.41])
    # Two of each expert.
    taken = oracle.expert_choice(LOGITS, MASK, 2)
    assert oracle.load_balance_loss(TABLE, taken, MASK) == pytest.approx([1.0])


def test_counted_padding_is_in_f_and_p_and_in_the_mean():
    probs = np.array([[[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.25]], [[0.25, 0.75]] * 4])
    experts, everyone = probs.argmax(-1), np.ones((2, 4), bool)
    mask = np.array([[True, True, True, False], [True, False, False, False]])
    # First group: f 3/4, 1/4 and P 5/8, 3/8: 1.125, three times; second: f 0, 1 and P 1/4, 3/4: 1.5, once; of eight.
    loss = oracle.padding_counted_load_balance_loss(probs, experts, mask, everyone)
    assert loss == pytest.approx((3 * 1.125 + 1.5) / 8)
    # Together: f 3/8, 5/8 and P 7/16, 9/16, four times.
    loss = oracle.padding_counted_load_balance_loss(probs, experts, mask, everyone, scope="batch")
    assert loss == pytest.approx(4 * 2 * (3 * 7 + 5 * 9) / 128 / 8)
    # Where all are real it is the mean of the groups' losses.
    loss = oracle.padding_counted_load_balance_loss(probs, experts, everyone, everyone)
    assert loss == pytest.approx((1.125 + 1.5) / 2)


def test_load_balance_over_the_batch_and_over_groups():
    second = np.full((6, 3), 1 / 3)
    second[0], second[5] = (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)
    probs = np.stack([TABLE[0], second, second])
    mask = np.array([MASK[0], [True] + [False] * 4 + [True], [False] * 6])
    routes = top_k(np.log(probs), mask, None)
    # Second group: f 0, 0.5, 0.5 and P 0.1, 0.45, 0.45. The third is padding alone.
    assert oracle.load_balance_loss(probs, routes, mask) == pytest.approx([1.41, 1.35, 0.0])
    # Together: selections 4, 2, 1 of 7, sums of probabilities 2.7, 2.65, 1.65 of 7: 3 (10.8 + 5.3 + 1.65) / 49.
    assert oracle.load_balance_loss(probs, routes, mask, scope="batch") == pytest.approx(53.25 / 49)


def test_router_z_loss_squares_the_logsumexp():
    logits = np.array([[[0.0, 0.0], [np.log(3.0), np.log(5.0)], [9.0, 9.0], [1000.0, 1000.0]]])
    loss = oracle.router_z_loss(logits, np.array([[True, True, False, True]]))
    assert loss == pytest.approx(np.array([[0.4804530, 4.3240771, 0.0, 1001386.7748]]), rel=1e-7)


def test_importance_loss_is_the_squared_variation():
    # Sums 2.5, 1.75, 0.75, mean 5/3, deviations 5/6, 1/12, -11/12: (100 + 1 + 121) / 432 / (25/9) = 0.185.
    assert oracle.importance_loss(TABLE, MASK) == pytest.approx([0.185])
    assert oracle.importance_loss(TABLE, ~np.ones_like(MASK)).tolist() == [0.0]


def test_load_loss_is_the_squared_variation_of_the_chances_to_be_chosen():
    logits = np.array([[[1.0, 0.0], [0.0, 0.0], [8.0, 0.0]]])
    noisy = np.array([[[1.5, 0.25], [0.0, 0.5], [8.0, 0.0]]])
    mask = np.array([[True, True, False]])
    # Phi(1.5) + Phi(-1) = 0.9331928 + 0.1586553 and Phi(-3) + Phi(0) = 0.0013499 + 0.5.
    loss = oracle.load_loss(logits, noisy, mask, k=1, noise_std=0.5)
    assert loss == pytest.approx([(0.2952491 / 0.7965990) ** 2], rel=1e-6)
    assert oracle.load_loss(logits, noisy, mask, k=2, noise_std=0.5).tolist() == [0.0]  # Every expert is chosen.
    assert oracle.load_loss(logits, noisy, ~np.ones_like(mask), k=1, noise_std=0.5).tolist() == [0.0]
    # k = 2: the thresholds are 1, 1 and 2, so Phi(2) = 0.9772499, Phi(1) = 0.8413447 and Phi(-1) = 0.1586553, of
    # mean 0.6590833 and deviations 0.3181666, 0.1822614, -0.5004280.
    logits = np.array([[[3.0, 2.0, 1.0]]])
    loss = oracle.load_loss(logits, logits, ONE, k=2, noise_std=1.0)
    assert loss == pytest.approx([0.1282925 / 0.4343908], rel=1e-5)


def test_statistics():
    stats = oracle.statistics(TABLE, top_k(LOGITS, MASK, 2), MASK, 3)
    assert (stats["tokens"], stats["expert_load"].tolist(), stats["dropped"]) == (5, [4, 1, 0], 2)
    assert stats["confidence"] == pytest.approx(3.0)
    # Entropies 1.0397208, 0.8979457, 0.8018186, 1.0549202 and 0.6390319.
    assert stats["entropy"] == pytest.approx(4.4334372, rel=1e-6)
    # Over two groups, with a probability of zero.
    probs = np.array([[[1.0, 0.0]], [[0.5, 0.5]]])
    stats = oracle.statistics(probs, [Route(1, 0, 0, 0, 0, 0.5)], np.ones((2, 1), bool), 2)
    assert (stats["tokens"], stats["dropped"], stats["confidence"]) == (2, 1, 1.5)
    assert stats["entropy"] == pytest.approx(0.6931472)
    # A token is dropped where no expert kept it.
    routes = top_k(LOGITS, MASK, 2, k=2)
    stats = oracle.statistics(TABLE, routes, MASK, 3)
    assert (stats["expert_load"].tolist(), stats["dropped"]) == ([5, 5, 0], 2)
    stats = oracle.statistics(TABLE, routes, MASK, 3, first_choice_only=True)
    assert (stats["expert_load"].tolist(), stats["dropped"]) == ([4, 1, 0], 2)
    stats = oracle.statistics(TABLE, oracle.expert_choice(LOGITS, MASK, 1), MASK, 3)  # Tokens 5, 3 and 0.
    assert (stats["expert_load"].tolist(), stats["dropped"]) == ([1, 1, 1], 2)


def derivative(function: Any, **arrays: Any) -> dict[str, np.ndarray]:
    return oracle.gradients(lambda point: function(**point), arrays)


@pytest.mark.parametrize(
    ("weight", "token", "expected"),
    [  # p_i (delta - p) of a softmax; of the selected two alone where they are renormalised.
        (lambda z: top_k(z, MASK, 2)[0].weight, 0, (0.25, -0.125, -0.125)),
        (lambda z: top_k(z, MASK, 2, k=2, renormalize=True)[0].weight, 0, (2 / 9, -2 / 9, 0)),
        (lambda z: oracle.gshard_top_2(z, MASK, 2, uniform=np.zeros((1, 6)))[0].weight, 0, (2 / 9, -2 / 9, 0)),
        (lambda z: oracle.expert_choice(z, MASK, 2)[4].weight, 0, (-0.125, -0.0625, 0.1875)),
        (lambda z: oracle.no_token_left_behind(z, MASK, 2, rounds=2)[3].weight, 4, (-0.16, 0.24, -0.08)),
        (lambda z: oracle.sinkhorn(z, MASK, 2, iterations=3)[0].weight, 0, (-0.125, -0.0625, 0.1875)),
    ],
    ids=["switch", "renormalized", "gshard", "expert_choice", "no_token_left_behind", "sinkhorn"],
)
def test_gradient_of_a_weight(weight, token, expected):
    gradient = derivative(weight, z=LOGITS)["z"][0]
    assert gradient[token] == pytest.approx(expected, abs=1e-15)
    assert not np.delete(gradient, token, axis=0).any()


def test_gradient_of_a_sigmoid_weight_has_none_of_the_bias():
    # w = s3 / (s3 + s1) = 0.25 of s = 0.2, 0.6: dw/ds3 = 0.6 / 0.64, dw/ds1 = -0.2 / 0.64, ds/dz = s (1 - s).
    gradient = derivative(lambda z, b: oracle.sigmoid_top_k(z, ONE, 1, k=2, bias=b)[0].weight, z=SCORES, b=BIAS)
    assert gradient["z"][0, 0] == pytest.approx([0.0, -0.075, 0.0, 0.15], rel=1e-12)
    assert not gradient["b"].any()


def test_gradient_of_an_experts_kernels():
    routes = [Route(0, 0, 0, 0, 0, 0.5), Route(0, 2, 0, 0, 1, 0.25), Route(0, 1, 0, 1, None, 0.9)]
    gradient = derivative(lambda x, wi, wo: oracle.combine(x, routes, (wi,), wo, ("relu",)).sum(), x=X, wi=WI_0, wo=WO)
    # The sum is (10 + 1) (0.5 relu(x_0 wi) + 0.25 relu(x_2 wi)), both above zero. The other expert kept no token.
    assert gradient["wi"] == pytest.approx(np.array([[[8.25], [13.75]], [[0.0], [0.0]]]), rel=1e-15, abs=0)
    assert gradient["wo"] == pytest.approx(np.array([[[2.0, 2.0]], [[0.0, 0.0]]]), rel=1e-15, abs=0)
    assert gradient["x"] == pytest.approx(np.array([[[5.5, 5.5], [0.0, 0.0], [2.75, 2.75]]]), rel=1e-15, abs=0)


def test_gradient_of_activations():
    sigmoid, inner = 1 / (1 + math.exp(-2.0)), math.sqrt(2 / math.pi) * (2 + 0.044715 * 8)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * 4)
    expected = {
        ("silu",): sigmoid + 2 * sigmoid * (1 - sigmoid),
        ("gelu",): 0.5 * (1 + math.tanh(inner)) + slope / math.cosh(inner) ** 2,
        ("linear", "relu"): 4.0,
    }
    for names, value in expected.items():
        wi = (UNIT,) * len(names)
        gradient = derivative(lambda x, wi=wi, names=names: oracle.experts_forward(x, wi, UNIT, names)[0, 0], x=[2.0])
        assert gradient["x"] == pytest.approx([value], rel=1e-13)


def test_gradient_through_router_and_experts():
    # y sums to p0 c with c = 33 for the only token, so the router's gradient is c p0 (delta - p) times x.
    x, router = np.array([[[1.0, 2.0]]]), np.array([[math.log(3.0), 0.0], [0.0, 0.0]])
    gradient = derivative(lambda w: oracle.combine(x, top_k(x @ w, ONE, 1), (WI_0,), WO, ("relu",)).sum(), w=router)
    assert gradient["w"] == pytest.approx(np.array([[6.1875, -6.1875], [12.375, -12.375]]), rel=1e-13)


def test_gradient_of_load_balance_goes_through_probabilities_alone():
    routes = top_k(LOGITS, MASK, 2)
    loss = derivative(lambda z: oracle.load_balance_loss(oracle.softmax(z), routes, MASK)[0], z=LOGITS)["z"][0]
    # E / n p (f - f.p) of the first token: f = 0.8, 0.2, 0, whose product with p is 0.45.
    assert loss[0] == pytest.approx([0.6 * 0.175, 0.6 * -0.0625, 0.6 * -0.1125], rel=1e-12)
    assert not loss[2].any()


def test_gradient_of_the_z_loss_and_of_importance():
    gradient = derivative(lambda z: oracle.router_z_loss(z, ONE).sum(), z=np.log([[[1.0, 2.0, 5.0]]]))["z"]
    assert gradient[0, 0] == pytest.approx(2 * math.log(8) * np.array([0.125, 0.25, 0.625]), rel=1e-13)
    # Of a + b = 1 the loss is (a - b)^2: 4 (a - b) da/dz0 = 4 0.5 (0.75 0.25).
    gradient = derivative(lambda z: oracle.importance_loss(oracle.softmax(z), ONE)[0], z=np.log([[[0.75, 0.25]]]))["z"]
    assert gradient[0, 0] == pytest.approx([0.375, -0.375], rel=1e-12)


def test_gradient_of_load_follows_thresholds_where_they_are_given():
    # Loads a = Phi(1.5), b = Phi(-3), loss ((a - b) / (a + b))^2: its slopes 4 (a - b) b / (a + b)^3 by a and
    # -4 (a - b) a / (a + b)^3 by b; densities of 1.5 and -3 over 0.5.
    a, b = 0.5 * math.erfc(-1.5 / math.sqrt(2)), 0.5 * math.erfc(3 / math.sqrt(2))
    by_a, by_b = 4 * (a - b) * b / (a + b) ** 3, -4 * (a - b) * a / (a + b) ** 3
    to_a, to_b = (math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi) / 0.5 for v in (1.5, 3.0))
    point = {"z": np.array([[[1.0, 0.0]]]), "noisy": np.array([[[1.5, 0.25]]])}
    gradient = derivative(lambda z, noisy: oracle.load_loss(z, noisy, ONE, k=1, noise_std=0.5)[0], **point)
    assert gradient["z"][0, 0] == pytest.approx([by_a * to_a, by_b * to_b], rel=1e-12)
    # Expert 1's logit is the threshold of expert 0, and the other way round.
    assert gradient["noisy"][0, 0] == pytest.approx([-by_b * to_b, -by_a * to_a], rel=1e-12)
