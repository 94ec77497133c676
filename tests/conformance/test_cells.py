"""The sparse layer against the oracle, cell by cell, and proof that a wrong layer would not pass."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.conformance import cells
from switch_t5.conformance.cells import ROUTERS, Cell, Result, check, expected_values
from switch_t5.conformance.layers import EXPLICIT, LAYERS, SEVERAL
from switch_t5.layers import even_rows, expert_loop, moe, moe_config
from switch_t5.routing import assignment, balance, choice, dispatch, router
from tests.routing.routers import expected_routes, found_routes

DEFAULT = [
    *(Cell(name) for name in ROUTERS),
    *(Cell(name, "einsum") for name in ("top_2", "expert_choice", "no_token_left_behind")),
    *(Cell(name, mesh="2 x 2 x 2") for name in ("switch", "sigmoid_limited", "expert_choice")),
    Cell("top_2", "dropless"),
    Cell("sinkhorn", "dropless", layer="even loads"),
    Cell("top_3_renormalized", "dropless", mesh="2 x 2 x 2"),
    Cell("top_2", mesh="2 x 2 x 2", layer=EXPLICIT),
    *(Cell(name, dtype="bfloat16") for name in ("switch", "top_2")),
    *(Cell(layer.router, layer=name) for name, layer in LAYERS.items() if layer.router),
]
SLOW = [cell for cell in cells.cells(8) if cell not in DEFAULT]


def describe(result: Result) -> str:
    return f"{result.cell}: { ({name: result.errors[name] for name in result.red}) }"


@pytest.mark.multidevice
@pytest.mark.parametrize("cell", DEFAULT, ids=str)
def test_the_layer_agrees_with_the_oracle(cell: Cell) -> None:
    result = check(cell)
    assert result.is_green, describe(result)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("cell", SLOW, ids=str)
def test_the_layer_agrees_with_the_oracle_in_every_other_cell(cell: Cell) -> None:
    result = check(cell)
    assert result.is_green, describe(result)


def test_every_combination_is_a_cell_and_fewer_devices_have_fewer() -> None:
    with_capacity_alone = sum(bool(router.config.needs_capacity) for router in ROUTERS.values())
    combinations = (3 * len(ROUTERS) - with_capacity_alone) * len(cells.BOUNDS)
    of_other_forms = sum(
        (2 if name == EXPLICIT else 3) * (2 if layer.in_bfloat16 else 1)
        for name, layer in LAYERS.items()
        if name != cells.PLAIN
    )
    assert len({*DEFAULT, *SLOW}) == combinations * len(cells.MESHES) + of_other_forms * len(cells.FORMS_MESHES)
    assert len(list(cells.cells(1))) == combinations + of_other_forms


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_the_example_drops_tokens_and_leaves_no_loss_at_zero(name: str) -> None:
    expected = expected_values(name, "float32")
    assert expected["dropped"] > 0
    assert expected["load_balance_loss"] > 0 and expected["importance_loss"] > 0
    assert all(np.abs(expected[f"gradient of {which}"]).max() > 0 for which in ("x", "wi", "wo"))


def one_more_slot(*args: Any, **kwargs: Any) -> int:
    return expert_capacity(*args, **kwargs) + 1


def one_slot_fewer(*args: Any, **kwargs: Any) -> int:
    return expert_capacity(*args, **kwargs) - 1


def rounded_up(*args: Any, **kwargs: Any) -> int:
    return expert_capacity(*args, **kwargs | {"rounding": "ceil"})


def combined_without_a_gradient_of_weights(rows: jax.Array, weight: jax.Array, order: Any) -> jax.Array:
    return combine_rows(rows, jax.lax.stop_gradient(weight), order)


def every_slot_by_weight_one(assigned: Any, weight: jax.Array) -> jax.Array:
    return masks(assigned, jnp.ones_like(weight))


def the_token_before(x: jax.Array, index: jax.Array) -> jax.Array:
    return rows_of(x, jnp.maximum(index - 1, 0))


def not_squared(logits: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits, axis=-1) * mask


expert_capacity, counts, sum_by_token = moe_config.expert_capacity, assignment._counts, dispatch._sum_by_token
router_logits, load_of, importance = moe.SwitchFeedForward._router_logits, assignment.load_of, balance._importance
top_k, cut, layer_route = choice.top_k, expert_loop.cut, moe.SwitchFeedForward.route
filled_slots, combine_rows, sort_by_expert = moe.filled_slots, moe.combine_rows, moe.sort_by_expert
masks, rows_of, holders = dispatch._masks, dispatch._rows, assignment._holders
token_of, rows_taken = cast("property", vars(assignment.Assignment)["token"]).__get__, even_rows.even_rows
no_token_left_behind, expert_choice = choice.no_token_left_behind, choice.expert_choice
assign_slots, load_balance_loss = choice.assign_slots, balance.load_balance_loss
gshard_top_2, hashed, sum_shards = choice.gshard_top_2, choice.hashed, moe.sum_shards
route_without_logits, einsum_dispatch = moe.route_without_logits, dispatch.Einsum.dispatch
layer_call, exchange_shards = moe.SparseLayer.__call__, moe.exchange_shards


def inclusive_counts(expert: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    first, count = counts(expert, num_experts)
    return first + count, count


def padding_counted(layer: Any, x: jax.Array, mask: jax.Array, rng: Any) -> Any:
    return router_logits(layer, x, jnp.ones_like(mask), rng)


def padding_routed(layer: Any, x: jax.Array, real: jax.Array, *others: Any, **more: Any) -> Any:
    return layer_route(layer, x, jnp.ones_like(real), *others, **more)


def mean_for_sum(probs: jax.Array, mask: jax.Array) -> jax.Array:
    return importance(probs, mask) / mask.shape[-1]


def load_after_capacity(expert: jax.Array, num_experts: int) -> jax.Array:
    return jnp.minimum(load_of(expert, num_experts), cells.CAPACITY)


def unscaled(rows: jax.Array, slot: jax.Array, token: jax.Array) -> jax.Array:
    return sum_by_token(rows, slot, token) / slot.shape[-1]


def blocks_one_row_short(*args: Any, **skip: Any) -> Any:
    blocks = cut(*args, **skip)
    return dataclasses.replace(blocks, rest=blocks.rest - 1)


def rows_of_the_next_expert(assigned: Any) -> Any:
    order = filled_slots(assigned)
    return dataclasses.replace(order, sizes=jnp.roll(order.sizes, 1))


def no_bias(*args: Any, scores: Any = None, **kwargs: Any) -> Any:
    del scores
    return top_k(*args, **kwargs)


@property
def the_slot_before(assignment: Any) -> jax.Array:
    return jnp.roll(token_of(assignment), 1, axis=-1)


def holders_one_too_far(order: jax.Array, first: jax.Array, *others: Any) -> jax.Array:
    return holders(order, first + 1, *others)


def first_of_even_rows_left_out(*args: Any) -> Any:
    even = rows_taken(*args)
    return dataclasses.replace(even, mine=even.mine.at[:, 0].set(False))


def one_even_row_twice(*args: Any) -> Any:
    even = rows_taken(*args)
    return dataclasses.replace(even, share=jnp.maximum(even.share - 1, 0))


def with_slots_of_gather(layer: Any, *args: Any, **more: Any) -> Any:
    layer.config = dataclasses.replace(layer.config, dispatch="gather")
    return layer_route(layer, *args, **more)


def sorted_for_the_next_expert(expert: jax.Array, num_experts: int) -> Any:
    order = sort_by_expert(expert, num_experts)
    return dataclasses.replace(order, sizes=jnp.roll(order.sizes, 1))


def one_round(probs: jax.Array, capacity: int, mask: jax.Array, *, rounds: int) -> Any:
    del rounds
    return no_token_left_behind(probs, capacity, mask, rounds=1)


def earlier_rounds_forgotten(table: jax.Array, expert: jax.Array) -> jax.Array:
    del table
    return jnp.zeros_like(expert)


def padding_chosen(probs: jax.Array, capacity: int, mask: jax.Array) -> Any:
    return expert_choice(probs, capacity, jnp.ones_like(mask))


def one_fewer(probs: jax.Array, capacity: int, mask: jax.Array) -> Any:
    return expert_choice(probs, capacity - 1, mask)


def threshold_of_itself(logits: jax.Array, noisy: jax.Array, k: int, noise_std: float) -> jax.Array:
    return jax.scipy.stats.norm.cdf((logits - jax.lax.top_k(noisy, k)[0][..., -1:]) / noise_std)


def in_the_order_of_tokens(*args: Any, order: Any = None) -> Any:
    del order
    return assign_slots(*args)


def as_in_training(layer: Any, *args: Any, train: bool, **more: Any) -> Any:
    del train
    return layer_route(layer, *args, train=True, **more)


def each_group_on_its_own(*args: Any, scope: str) -> jax.Array:
    del scope
    return load_balance_loss(*args, scope="group")


def each_sequence_on_its_own(batch: int, length: int, *group: Any) -> tuple[int, int]:
    return batch, length


def always_asked(*args: Any, uniform: jax.Array) -> Any:
    return gshard_top_2(*args, uniform=jnp.zeros_like(uniform))


def not_renormalized(*args: Any, **kwargs: Any) -> Any:
    return top_k(*args, **kwargs | {"renormalize": False})


def not_scaled(*args: Any, **kwargs: Any) -> Any:
    return top_k(*args, **kwargs | {"scale": 1.0})


def all_groups(scores: jax.Array, *limits: int) -> jax.Array:
    del limits
    return scores


def the_next_expert(tokens: jax.Array, num_experts: int) -> jax.Array:
    return (hashed(tokens, num_experts) + 1) % num_experts


def drawn_by_another_key(*args: Any, rng: jax.Array) -> Any:
    return route_without_logits(*args, rng=jax.random.fold_in(rng, 1))


def without_a_key(layer: Any, x: jax.Array, mask: jax.Array, rng: Any) -> Any:
    del rng
    return router_logits(layer, x, mask, None)


def one_devices_part(x: jax.Array, *, scatter: str, over: str) -> jax.Array:
    del over
    return sum_shards(x, scatter=scatter, over="embed")


def sent_to_the_next_device(x: jax.Array, axis: str, *, split: int, join: int) -> jax.Array:
    return exchange_shards(jnp.roll(x, x.shape[split] // 2, axis=split), axis, split=split, join=join)


def masks_of_the_next_token(method: Any, x: jax.Array, assigned: Any) -> jax.Array:
    return einsum_dispatch(method, jnp.roll(x, 1, axis=1), assigned)


def routed_as_it_is(layer: Any, *args: Any, **more: Any) -> Any:
    layer.config = dataclasses.replace(layer.config, padding="routed")
    return layer_call(layer, *args, **more)


def in_bfloat16(layer: Any, x: jax.Array, *others: Any) -> Any:
    layer.config = dataclasses.replace(layer.config, router_dtype="bfloat16")
    return router_logits(layer, x, *others)


EXPERTS = {"gradient of wi", "gradient of wo"}
LOGITS = {"gradient of x", "gradient of router"}
OUTPUT = {"output", *EXPERTS, *LOGITS}
SERVED = {"slots", "dropped", *OUTPUT}
"""What depends on who has a slot."""
SENT = {"routes", *SERVED}
"""What depends on who is sent where; a load that counts first choices alone does not."""
BALANCE = {"load_balance_loss", *LOGITS}
DISTRIBUTION = {"load_balance_loss", "router_z_loss", "importance_loss", "router_entropy", "router_confidence"}
"""What is computed from probabilities alone, in float32."""
ELSEWHERE = {"expert_load", "load_balance_loss", "importance_loss", *SENT} - {"gradient of router"}
"""What depends on a choice that no router makes."""
EVERYTHING = {"tokens", "expert_load", *DISTRIBUTION, *SENT}


class Wrong(NamedTuple):
    """A deliberate error: where it is put in, and exactly the quantities that have to show it."""

    what: str
    cell: Cell
    owner: Any
    name: str
    replacement: Any
    red: set[str]


LAYER = moe.SwitchFeedForward
TWO, MESHED, DROPLESS = Cell("top_2"), Cell("switch", mesh="2 x 2 x 2"), Cell("switch", "dropless")
SWITCH, EXPERT_CHOICE, NO_TOKEN = Cell("switch"), Cell("expert_choice"), Cell("no_token_left_behind")
# On one device even loads fill 34 of 48 places, and are taken evenly.
EVEN, SHARED = Cell("sinkhorn", "dropless", layer="even loads"), Cell("top_2", layer="shared expert")
NOISY, LIMITED = Cell("top_2", layer="gaussian noise"), Cell("sigmoid_limited")
ASKED, DRAWN = Cell("gshard_top_2", layer="second choice drawn"), Cell("random", layer="experts drawn")
EINSUM, ZEROED = Cell("top_2", "einsum"), Cell("top_2", layer="padding zeroed")
EXCHANGED = Cell("top_2", mesh="2 x 2 x 2", layer=EXPLICIT)
GROUPED, EVALUATED = Cell("top_2", layer=SEVERAL), Cell("sinkhorn", layer="evaluation")

WRONG = [
    Wrong("one slot more", SWITCH, moe_config, "expert_capacity", one_more_slot, SERVED),
    Wrong("a cumsum that is not exclusive", SWITCH, assignment, "_counts", inclusive_counts, SERVED),
    Wrong("a mean for a sum", SWITCH, balance, "_importance", mean_for_sum, BALANCE),
    Wrong("padding counted", SWITCH, LAYER, "_router_logits", padding_counted, BALANCE),
    Wrong("padding routed", SWITCH, LAYER, "route", padding_routed, EVERYTHING),
    Wrong("a z-loss without its square", SWITCH, balance, "router_z_loss", not_squared, {"router_z_loss", *LOGITS}),
    Wrong("a weight without its gradient", SWITCH, moe, "combine_rows", combined_without_a_gradient_of_weights, LOGITS),
    Wrong("rows given to another expert", SWITCH, moe, "filled_slots", rows_of_the_next_expert, OUTPUT),
    Wrong("load counted after capacity", TWO, router, "load_of", load_after_capacity, {"expert_load", *BALANCE}),
    Wrong("choices averaged for summed", TWO, dispatch, "_sum_by_token", unscaled, {"output", "gradient of x"}),
    Wrong("masks without weights", EINSUM, dispatch, "_masks", every_slot_by_weight_one, OUTPUT),
    Wrong("rows of the token before", MESHED, dispatch, "_rows", the_token_before, OUTPUT),
    Wrong("slots held by the next token", MESHED, assignment, "_holders", holders_one_too_far, OUTPUT),
    Wrong("slots sent to the next device", EXCHANGED, moe, "exchange_shards", sent_to_the_next_device, OUTPUT),
    Wrong("an expert's last row left out", DROPLESS, expert_loop, "cut", blocks_one_row_short, OUTPUT),
    Wrong("the first even rows left out", EVEN, even_rows, "even_rows", first_of_even_rows_left_out, OUTPUT),
    Wrong("slots given again in another round", NO_TOKEN, choice, "_look_up", earlier_rounds_forgotten, SENT),
    Wrong("one choice fewer of an expert", EXPERT_CHOICE, choice, "expert_choice", one_fewer, {"expert_load", *SENT}),
    Wrong("a threshold of itself", NOISY, choice, "load_probabilities", threshold_of_itself, {"load_loss", *LOGITS}),
    Wrong("a bias left out", Cell("sigmoid_top_k"), choice, "top_k", no_bias, {"expert_load", *SENT, *BALANCE}),
]
"""One for each part of the layer; variations of them are tried with the slow tests."""

MORE_WRONG = [
    Wrong("one slot fewer", SWITCH, moe_config, "expert_capacity", one_slot_fewer, SERVED),
    Wrong("a capacity rounded up", SWITCH, moe_config, "expert_capacity", rounded_up, SERVED),
    Wrong("slots read from the slot before", MESHED, assignment.Assignment, "token", the_slot_before, OUTPUT),
    Wrong(
        "an even row left to the loop too",
        EVEN,
        even_rows,
        "even_rows",
        one_even_row_twice,
        {*EXPERTS, "gradient of x"},
    ),
    Wrong("slots in dropless", DROPLESS, LAYER, "route", with_slots_of_gather, {"dropped", *OUTPUT}),
    Wrong("sorted rows given to another expert", DROPLESS, moe, "sort_by_expert", sorted_for_the_next_expert, OUTPUT),
    Wrong("one round alone", NO_TOKEN, choice, "no_token_left_behind", one_round, SENT),
    Wrong(
        "padding chosen", EXPERT_CHOICE, choice, "expert_choice", padding_chosen, {"expert_load", *SENT} - {"dropped"}
    ),
    Wrong("a plan left out", Cell("sinkhorn"), choice, "top_k", no_bias, {"expert_load", *SENT, *BALANCE}),
    Wrong("the surest not first", Cell("batch_prioritized"), choice, "assign_slots", in_the_order_of_tokens, SERVED),
    Wrong("padding routed beside a shared expert", SHARED, LAYER, "route", padding_routed, EVERYTHING),
    Wrong("training's capacity and plan", EVALUATED, LAYER, "route", as_in_training, {"expert_load", *SENT, *BALANCE}),
    Wrong("groups balanced apart", GROUPED, balance, "load_balance_loss", each_group_on_its_own, BALANCE),
    Wrong("each sequence a group", GROUPED, moe, "group_shape", each_sequence_on_its_own, {"importance_loss", *OUTPUT}),
    Wrong("one slot more on a mesh", MESHED, moe_config, "expert_capacity", one_more_slot, SERVED),
    Wrong("a cumsum that is not exclusive on a mesh", MESHED, assignment, "_counts", inclusive_counts, SERVED),
    Wrong("a second choice always asked", ASKED, choice, "gshard_top_2", always_asked, SENT - {"dropped"}),
    Wrong("not renormalized", Cell("top_3_renormalized"), choice, "top_k", not_renormalized, OUTPUT),
    Wrong("not scaled", Cell("sigmoid_top_k"), choice, "top_k", not_scaled, OUTPUT),
    Wrong("all groups", LIMITED, choice, "limited_scores", all_groups, {"expert_load", *SENT, *BALANCE}),
    Wrong(
        "another hash",
        Cell("hash"),
        choice,
        "hashed",
        the_next_expert,
        ELSEWHERE - {"dropped", "load_balance_loss", "importance_loss"},
    ),
    Wrong("another draw", DRAWN, moe, "route_without_logits", drawn_by_another_key, ELSEWHERE),
    Wrong(
        "no jitter",
        Cell("top_2", layer="jitter"),
        LAYER,
        "_router_logits",
        without_a_key,
        EVERYTHING - {"dropped", "tokens"},
    ),
    Wrong("a device's part", Cell("switch", "dropless", mesh="2 x 2 x 2"), moe, "sum_shards", one_devices_part, OUTPUT),
    Wrong("masks of the next token", EINSUM, dispatch.Einsum, "dispatch", masks_of_the_next_token, OUTPUT),
    Wrong(
        "padding not zeroed",
        ZEROED,
        moe.SparseLayer,
        "__call__",
        routed_as_it_is,
        EVERYTHING - {"routes", "slots", "tokens"},
    ),
    Wrong(
        "a router in bfloat16",
        Cell("switch", dtype="bfloat16"),
        LAYER,
        "_router_logits",
        in_bfloat16,
        DISTRIBUTION - {"router_z_loss"},
    ),
]


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "wrong",
    [*WRONG, *(pytest.param(wrong, marks=pytest.mark.slow) for wrong in MORE_WRONG)],
    ids=lambda wrong: wrong.what,
)
def test_a_wrong_layer_turns_red_what_it_changes_and_nothing_else(
    wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wrong.owner, wrong.name, wrong.replacement)
    assert check(wrong.cell).red == wrong.red


def logits_and_mask() -> tuple[np.ndarray, np.ndarray]:
    """Of the example."""
    inputs = cells.example_inputs("float32")
    return inputs["x"] @ inputs["router"], inputs["mask"]


def test_gshards_second_choice_is_asked_with_the_drawn_numbers() -> None:
    logits, mask = logits_and_mask()
    rng = jax.random.key(3)
    uniform = np.asarray(jax.random.uniform(rng, mask.shape))
    found = router.route(
        router.RouterConfig(router="gshard_top_2"), jnp.asarray(logits, jnp.float32), 2, jnp.asarray(mask), rng=rng
    )
    expected = expected_routes(cells.oracle.gshard_top_2(logits, mask, 2, uniform=uniform))
    assert found_routes(found.assignment) == expected
    # Some tokens asked for one expert only.
    assert mask.sum() < len(expected) < 2 * mask.sum()


@pytest.mark.parametrize("k", [1, 2])
def test_sampled_experts_are_those_of_gumbel_noise_and_weigh_their_own_probability(k: int) -> None:
    logits, mask = logits_and_mask()
    rng = jax.random.key(5)
    gumbel = np.asarray(jax.random.gumbel(rng, logits.shape, jnp.float32))
    config = router.RouterConfig(num_selected_experts=k, exploration="sample")
    found = router.route(config, jnp.asarray(logits, jnp.float32), 2, jnp.asarray(mask), rng=rng).assignment
    routes = cells.oracle.top_k(logits, mask, 2, k=k, gumbel=gumbel)
    assert found_routes(found) == expected_routes(routes)
    for route in routes:
        weight = found.weight[route.group, route.token, route.choice]
        np.testing.assert_allclose(weight, route.weight, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, cells.EXPERTS])
def test_the_load_loss_under_gaussian_noise_is_the_oracles(k: int) -> None:
    logits, mask = logits_and_mask()
    rng, std = jax.random.key(7), 0.5
    config = router.RouterConfig(num_selected_experts=k, exploration="gaussian", noise_std=std * cells.EXPERTS)
    routing = router.route(config, jnp.asarray(logits, jnp.float32), 4, jnp.asarray(mask), rng=rng)
    noise = np.asarray(jax.random.normal(rng, logits.shape, jnp.float32), np.float64)
    expected = cells.oracle.load_loss(logits, logits + std * noise, mask, k=k, noise_std=std)
    assert routing.load_probs is not None
    np.testing.assert_allclose(balance.load_loss(routing.load_probs, jnp.asarray(mask)), expected, rtol=1e-4, atol=1e-6)
