"""The sparse layer against the oracle, cell by cell, and proof that a wrong layer would not pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.conformance import cells
from switch_t5.conformance.cells import ROUTERS, Cell, Result, check, expected_values
from switch_t5.conformance.layers import LAYERS
from switch_t5.layers import expert_loop, moe, moe_config
from switch_t5.routing import assignment, balance, choice, dispatch, router
from tests.routing.routers import expected_routes, found_routes

DEFAULT = [
    *(Cell(name) for name in ROUTERS),
    *(Cell(name, "einsum") for name in ("top_2", "expert_choice", "no_token_left_behind")),
    *(Cell(name, mesh="2 x 2 x 2") for name in ("switch", "sigmoid_limited", "expert_choice")),
    Cell("top_2", "dropless"),
    Cell("top_3_renormalized", "dropless", mesh="2 x 2 x 2"),
    *(Cell(name, dtype="bfloat16") for name in ("switch", "top_2")),
    *(Cell(layer.router, layer=name) for name, layer in LAYERS.items() if layer.router),
]
SLOW = [cell for cell in cells.cells(8) if cell not in DEFAULT]


def describe(result: Result) -> str:
    return f"{result.cell}: { ({name: error for name, error in result.errors.items() if error > result.bound}) }"


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
    of_other_forms = (len(LAYERS) - 1) * 3 * len(cells.BOUNDS)
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
filled_slots, combine_rows = moe.filled_slots, moe.combine_rows
masks, rows_of = dispatch._masks, dispatch._rows


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


@pytest.mark.parametrize(
    ("cell", "owner", "name", "wrong"),
    [
        (Cell("switch"), moe_config, "expert_capacity", one_more_slot),
        (Cell("switch"), moe_config, "expert_capacity", one_slot_fewer),
        (Cell("switch"), moe_config, "expert_capacity", rounded_up),
        (Cell("top_2", "einsum"), dispatch, "_masks", every_slot_by_weight_one),
        (Cell("switch", mesh="2 x 2 x 2"), dispatch, "_rows", the_token_before),
        (Cell("switch"), assignment, "_counts", inclusive_counts),
        (Cell("switch"), moe.SwitchFeedForward, "_router_logits", padding_counted),
        (Cell("switch"), moe.SwitchFeedForward, "route", padding_routed),
        (Cell("switch"), balance, "_importance", mean_for_sum),
        (Cell("switch"), balance, "router_z_loss", not_squared),
        (Cell("top_2"), router, "load_of", load_after_capacity),
        (Cell("top_2"), dispatch, "_sum_by_token", unscaled),
        (Cell("sigmoid_top_k"), choice, "top_k", no_bias),
        (Cell("sinkhorn"), choice, "top_k", no_bias),
        (Cell("switch", "dropless"), expert_loop, "cut", blocks_one_row_short),
        (Cell("switch"), moe, "filled_slots", rows_of_the_next_expert),
        (Cell("top_2", layer="shared expert"), moe.SwitchFeedForward, "route", padding_routed),
    ],
    ids=[
        "one slot more",
        "one slot fewer",
        "a capacity rounded up",
        "masks without weights",
        "slots of the token before",
        "a cumsum that is not exclusive",
        "padding counted",
        "padding routed",
        "a mean for a sum",
        "a z-loss without its square",
        "load counted after capacity",
        "choices averaged for summed",
        "a bias left out",
        "a plan left out",
        "an expert's last row left out",
        "rows given to another expert",
        "padding routed beside a shared expert",
    ],
)
def test_a_wrong_layer_is_caught(
    cell: Cell, owner: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    result = check(cell)
    assert not result.is_green


def test_a_gradient_that_is_left_out_is_caught_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "combine_rows", combined_without_a_gradient_of_weights)
    result = check(Cell("switch"))
    wrong = {name for name, error in result.errors.items() if error > result.bound}
    assert wrong == {"gradient of x", "gradient of router"}


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


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_load_loss_under_gaussian_noise_is_the_oracles(k: int) -> None:
    logits, mask = logits_and_mask()
    rng, std = jax.random.key(7), 0.5
    config = router.RouterConfig(num_selected_experts=k, exploration="gaussian", noise_std=std * cells.EXPERTS)
    routing = router.route(config, jnp.asarray(logits, jnp.float32), 4, jnp.asarray(mask), rng=rng)
    noise = np.asarray(jax.random.normal(rng, logits.shape, jnp.float32), np.float64)
    expected = cells.oracle.load_loss(logits, logits + std * noise, mask, k=k, noise_std=std)
    assert routing.load_probs is not None
    np.testing.assert_allclose(balance.load_loss(routing.load_probs, jnp.asarray(mask)), expected, rtol=1e-4, atol=1e-6)
