"""The Switch layer against a walk over its tokens in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.conformance import oracle
from switch_t5.errors import ConfigError
from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import partitioned
from switch_t5.routing.balance import RouterStats
from switch_t5.routing.router import RouterConfig
from switch_t5.types import Array

BATCH, LENGTH, FEATURES, HIDDEN, EXPERTS = 4, 8, 6, 10, 4
CONFIG = MoEConfig(EXPERTS, group_size=16, train_capacity_factor=1.0, eval_capacity_factor=1.25, min_expert_capacity=1)
SEQUENCES = 2


def make_layer(
    config: MoEConfig = CONFIG, activations: tuple[str, ...] = ("relu",), seed: int = 0
) -> SwitchFeedForward:
    """A layer whose router is decided enough to load its experts unevenly."""
    layer = SwitchFeedForward(config, FEATURES, HIDDEN, activations, "t5x", rngs=nnx.Rngs(seed))
    shape = (FEATURES, config.num_experts)
    layer.router[...] = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return layer


def tokens(seed: int = 0, dtype: Any = jnp.float32) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    x = random.normal(size=(BATCH, LENGTH, FEATURES)) + 0.5
    mask = np.arange(LENGTH) < np.asarray([[LENGTH], [5], [0], [LENGTH - 1]])
    return jnp.asarray(x, dtype), jnp.asarray(mask)


@functools.partial(nnx.jit, static_argnames="train")
def apply(
    layer: SwitchFeedForward, x: Array, mask: Array, *, train: bool = False, rng: Array | None = None
) -> tuple[Array, RouterStats]:
    return layer(x, mask, tokens=jnp.ones(mask.shape, jnp.int32), sequences=SEQUENCES, train=train, rng=rng)


def walk(layer: SwitchFeedForward, x: Array, mask: Array, capacity: int) -> dict[str, np.ndarray]:
    """Routes the groups of two sequences token by token, in float64."""
    groups = np.asarray(x, np.float64).reshape(-1, SEQUENCES * LENGTH, FEATURES)
    real = np.asarray(mask).reshape(groups.shape[:2])
    router = np.asarray(layer.router[...], np.float64)
    wi = np.asarray(layer.experts.wi[...], np.float64)
    wo = np.asarray(layer.experts.wo[...], np.float64)
    output, load, dropped = np.zeros_like(groups), np.zeros(EXPERTS), 0
    z_loss, balance = 0.0, 0.0
    for g in range(len(groups)):
        used, chosen, mean_prob = [0] * EXPERTS, np.zeros(EXPERTS), np.zeros(EXPERTS)
        for s in np.flatnonzero(real[g]):
            logits = groups[g, s] @ router
            probs = np.exp(logits) / np.exp(logits).sum()
            expert = int(np.argmax(probs))
            chosen[expert] += 1
            mean_prob += probs
            z_loss += np.log(np.exp(logits).sum()) ** 2
            if used[expert] == capacity:
                dropped += 1
                continue
            used[expert] += 1
            output[g, s] = probs[expert] * (np.maximum(groups[g, s] @ wi[expert], 0) @ wo[expert])
        count = max(real[g].sum(), 1)
        balance += EXPERTS * (chosen / count) @ (mean_prob / count) * real[g].sum()
        load += chosen
    return {
        "output": output.reshape(x.shape),
        "expert_load": load,
        "dropped": np.asarray(dropped),
        "router_z_loss": np.asarray(z_loss),
        "load_balance_loss": np.asarray(balance),
    }


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "auto"])
@pytest.mark.parametrize(("train", "capacity"), [(True, 4), (False, 5)])
def test_the_layer_equals_a_walk_over_its_tokens(dispatch: str, train: bool, capacity: int) -> None:
    layer = make_layer(dataclasses.replace(CONFIG, dispatch=dispatch))
    x, mask = tokens()
    expected = walk(layer, x, mask, capacity)
    assert expected["dropped"] > 0
    output, stats = apply(layer, x, mask, train=train)
    np.testing.assert_allclose(output, expected.pop("output"), rtol=1e-4, atol=1e-5)
    assert float(stats.tokens) == np.asarray(mask).sum()
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5, err_msg=name)


def test_a_token_without_a_slot_and_padding_give_exactly_zero() -> None:
    layer, (x, mask) = make_layer(), tokens()
    output, stats = apply(layer, x, mask, train=True)
    zero = (np.asarray(output) == 0).all(-1)
    assert zero[~np.asarray(mask)].all()
    assert zero[np.asarray(mask)].sum() == float(stats.dropped) > 0


def test_what_padding_holds_changes_nothing() -> None:
    layer, (x, mask) = make_layer(), tokens()
    other = jnp.where(mask[..., None], x, 7.0)
    for one, another in zip(
        jax.tree.leaves(apply(layer, x, mask)), jax.tree.leaves(apply(layer, other, mask)), strict=True
    ):
        np.testing.assert_array_equal(one, another)


def test_groups_are_routed_apart() -> None:
    layer, (x, mask) = make_layer(), tokens()
    whole, _ = apply(layer, x, mask, train=True)
    for part in (slice(0, 2), slice(2, 4)):
        alone, _ = apply(layer, x[part], mask[part], train=True)
        np.testing.assert_allclose(whole[part], alone, rtol=1e-6, atol=1e-7)


def test_the_router_stays_in_float32_in_a_bfloat16_model() -> None:
    """1 and 1.001 are the same number in bfloat16, where a tie goes to the lower index."""
    x, mask = jnp.ones((1, 4, FEATURES), jnp.bfloat16), jnp.ones((1, 4), bool)
    loads = {}
    for dtype in ("float32", "bfloat16"):
        layer = make_layer(dataclasses.replace(CONFIG, router_dtype=dtype))
        layer.router[...] = jnp.zeros((FEATURES, EXPERTS)).at[0].set(jnp.asarray([1.0, 1.001, 0, 0]))
        output, stats = apply(layer, x, mask)
        assert output.dtype == jnp.bfloat16
        assert stats.router_z_loss.dtype == jnp.float32
        loads[dtype] = np.asarray(stats.expert_load).tolist()
    assert loads == {"float32": [0, 4, 0, 0], "bfloat16": [4, 0, 0, 0]}


def test_selective_precision_routes_as_float32_does_and_bfloat16_rounds_its_probabilities() -> None:
    layer, (x, mask) = make_layer(), tokens(dtype=jnp.bfloat16)
    low = make_layer(dataclasses.replace(CONFIG, router_dtype="bfloat16"))
    _, in_float32 = apply(layer, x.astype(jnp.float32), mask)
    _, selective = apply(layer, x, mask)
    _, in_bfloat16 = apply(low, x, mask)
    for name in ("expert_load", "dropped", "router_z_loss", "load_balance_loss", "router_confidence"):
        np.testing.assert_allclose(getattr(selective, name), getattr(in_float32, name), rtol=1e-6, err_msg=name)
    error = abs(float(in_bfloat16.router_z_loss / in_float32.router_z_loss) - 1)
    assert 1e-4 < error < 0.05


def test_jitter_changes_the_routers_input_in_training_and_not_the_experts() -> None:
    # A single expert has weight 1 whatever its logit, so only what the router saw shows the jitter.
    config = MoEConfig(1, group_size=16, jitter_noise=0.01)
    layer, (x, mask) = make_layer(config), tokens()
    still, still_stats = apply(layer, x, mask)
    moved, moved_stats = apply(layer, x, mask, train=True, rng=jax.random.key(0))
    np.testing.assert_array_equal(moved, still)
    change = abs(float(moved_stats.router_z_loss / still_stats.router_z_loss) - 1)
    assert 0 < change < 0.02


def test_jitter_stays_within_its_bounds() -> None:
    """With one expert and one feature the logit is the input, and the z-loss of one token its square."""
    config = MoEConfig(1, group_size=1, jitter_noise=0.125)
    layer = SwitchFeedForward(config, 1, 2, ("relu",), "t5x", rngs=nnx.Rngs(0))
    layer.router[...] = jnp.ones((1, 1))

    @jax.jit
    @jax.vmap
    def factor(key: Array) -> Array:
        one = jnp.ones((1, 1), jnp.int32)
        _, stats = layer(jnp.ones((1, 1, 1)), one > 0, tokens=one, sequences=1, train=True, rng=key)
        return jnp.sqrt(stats.router_z_loss)

    factors = np.asarray(factor(jax.random.split(jax.random.key(0), 500)))
    assert 0.875 <= factors.min() < 0.885
    assert 1.115 < factors.max() <= 1.125
    np.testing.assert_allclose(factors.mean(), 1.0, atol=0.01)


def test_without_a_key_training_and_evaluation_differ_by_capacity_alone() -> None:
    config = dataclasses.replace(CONFIG, eval_capacity_factor=CONFIG.train_capacity_factor)
    layer, (x, mask) = make_layer(dataclasses.replace(config, expert_dropout_rate=0.4)), tokens()
    np.testing.assert_array_equal(apply(layer, x, mask, train=True)[0], apply(layer, x, mask, train=False)[0])


def test_expert_dropout_acts_inside_the_experts_at_its_own_rate() -> None:
    config = MoEConfig(
        EXPERTS, jitter_noise=0.0, expert_dropout_rate=0.75, train_capacity_factor=4.0, eval_capacity_factor=4.0
    )
    layer = SwitchFeedForward(config, FEATURES, 2000, ("relu",), "t5x", rngs=nnx.Rngs(0))
    # Every hidden feature is 1 and the output's first feature their sum.
    layer.experts.wi[...] = jnp.zeros((EXPERTS, FEATURES, 2000)).at[:, 0].set(1.0)
    layer.experts.wo[...] = jnp.zeros((EXPERTS, 2000, FEATURES)).at[:, :, 0].set(1.0)
    layer.router[...] = jnp.zeros((FEATURES, EXPERTS)).at[0, 0].set(100.0)
    x = jnp.zeros((BATCH, LENGTH, FEATURES)).at[..., 0].set(1.0)
    mask = jnp.ones((BATCH, LENGTH), bool)
    np.testing.assert_array_equal(apply(layer, x, mask)[0][..., 0], np.full((BATCH, LENGTH), 2000.0))
    dropped = np.asarray(apply(layer, x, mask, train=True, rng=jax.random.key(1))[0])[..., 0]
    # About 500 are kept, each counting four times; the deviation of their number is 19.
    np.testing.assert_allclose(dropped / 4, 500, atol=80)
    np.testing.assert_array_equal(dropped / 4, np.round(dropped / 4))
    # Each slot draws for itself.
    assert len(np.unique(dropped)) > 8


@pytest.mark.multidevice
def test_expert_dropout_draws_the_same_where_empty_slots_are_left_out_and_where_they_are_not() -> None:
    """One device multiplies filled slots alone, several multiply all of them."""
    config = dataclasses.replace(CONFIG, expert_dropout_rate=0.5)
    layer, (x, mask) = make_layer(config), tokens()
    graph, params = nnx.split(layer)

    def run(params: nnx.State, x: Array, mask: Array) -> Array:
        ids = jnp.ones(mask.shape, jnp.int32)
        rng = jax.random.key(4)
        return nnx.merge(graph, params)(x, mask, tokens=ids, sequences=SEQUENCES, train=True, rng=rng)[0]

    alone = jax.jit(run)(params, x, mask)
    with partitioned(make_mesh(MeshConfig(num_devices=2, num_expert_partitions=2))):
        together = jax.jit(run)(params, x, mask)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert np.abs(alone - apply(layer, x, mask, train=True)[0]).max() > 0.1


def test_capacity_follows_the_configuration() -> None:
    config = MoEConfig(8, train_capacity_factor=1.25, eval_capacity_factor=2.0, capacity_rounding="ceil")
    layer = SwitchFeedForward(config, 2, 2, ("relu",), "t5x", rngs=nnx.Rngs(0))
    assert layer.config.capacity(100, train=True) == math.ceil(15.625)
    assert layer.config.capacity(100, train=False) == 25
    assert layer.config.capacity(8, train=True) == 4


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_experts", 0, "must be at least 1, got 0."),
        ("num_experts", 10**22, "must be at most 65536, got 10000000000000000000000."),
        ("num_shared_experts", 10**22, "must be at most 65536, got 10000000000000000000000."),
        ("group_size", 0, "must be at least 1, got 0."),
        ("min_expert_capacity", 0, "must be at least 1, got 0."),
        ("min_expert_capacity", -1, "must be at least 1, got -1."),
        ("train_capacity_factor", 0.0, "must be above 0, got 0.0."),
        ("eval_capacity_factor", -1.0, "must be above 0, got -1.0."),
        ("jitter_noise", 1.0, "must be in [0, 1), got 1.0."),
        ("expert_dropout_rate", -0.1, "must be in [0, 1), got -0.1."),
        ("capacity_rounding", "down", "must be one of 'floor', 'round', 'ceil', got 'down'."),
        ("router_dtype", "float16", "must be one of 'float32', 'bfloat16', got 'float16'. Did you mean 'bfloat16'?"),
        ("dispatch", "sort", "must be one of 'auto', 'gather', 'einsum', 'dropless', got 'sort'."),
        ("num_experts", 2.5, "must be an integer, got 2.5."),
        ("expert_capacity", 0, "must be at least 1, got 0."),
        ("expert_capacity", 1.5, "must be an integer or None, got 1.5."),
        ("group_size", "row", "must be an integer or one of 'sequence', got 'row'."),
        (
            "padding",
            "counts",
            "must be one of 'ignored', 'counted', 'zeroed', 'routed', got 'counts'. Did you mean 'counted'?",
        ),
    ],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **{field: value})
    assert str(caught.value) == f"MoEConfig.{field} {message}"


def test_an_integer_that_no_float_holds_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"^MoEConfig\.train_capacity_factor must be a number that float32 holds"):
        MoEConfig(4, train_capacity_factor=10**400)


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ({"router": "expert_choice"}, "the router 'expert_choice'"),
        ({"router": "no_token_left_behind"}, "the router 'no_token_left_behind'"),
        ({"batch_prioritized": True}, "batch_prioritized"),
    ],
)
def test_dropless_refuses_what_is_about_capacity(field: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"^MoEConfig.dispatch 'dropless' has no capacity, which {what} is about"):
        MoEConfig(8, dispatch="dropless", router=RouterConfig(**field))
    with pytest.raises(ConfigError, match=r"^MoEConfig\.expert_capacity has no effect on 'dropless'"):
        MoEConfig(8, dispatch="dropless", expert_capacity=64)
    with pytest.raises(
        ConfigError, match=r"^MoEConfig\.exchange has no effect on 'dropless'.*leave it at 'constraints'"
    ):
        MoEConfig(8, dispatch="dropless", exchange="all_to_all")


def paddings_layer(padding: Any, **fields: Any) -> SwitchFeedForward:
    """Two experts, chosen by the sign of the first feature and weighed 3/4 for +-1; each returns its input."""
    config = MoEConfig(2, group_size=8, expert_capacity=2, padding=padding, **fields)
    layer = SwitchFeedForward(config, 2, 2, ("relu",), "t5x", rngs=nnx.Rngs(0))
    layer.router[...] = jnp.asarray([[math.log(3) / 2, -math.log(3) / 2], [0.0, 0.0]])
    layer.experts.wi[...] = jnp.broadcast_to(jnp.asarray([[0.0, 0.0], [0.0, 1.0]]), (2, 2, 2))
    layer.experts.wo[...] = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    return layer


# Experts 0 0 1 | pad 0 0 1 | real 0: P of a token that chooses 0 is (3/4, 1/4). Slots: two of each expert.
PADDED = jnp.asarray([[[1.0, 1], [1, 1], [-1, 1], [1, 1], [1, 1], [-1, 1], [1, 1], [-1, 1]]])
PADDED_MASK = jnp.asarray([[False, True, True, False, True, False, True, True]])


# Real tokens: experts 0 1 0 0 1. All: 0 0 1 0 0 1 0 1. Where padding is zero: 0 0 1 0 0 0 0 1.
@pytest.mark.parametrize(
    ("padding", "kept", "load", "balance", "tokens_and_counted", "dropped"),
    [
        # f (3/5, 2/5), P (11/20, 9/20): 2 (33 + 18) / 100 = 1.02, for five tokens.
        ("ignored", [1, 2, 4, 7], [3, 2], 5 * 1.02, (5, 5), 1),
        # f (5/8, 3/8), P (9/16, 7/16): 2 (45 + 21) / 128 = 1.03125, weighed as the five real tokens.
        ("counted", [1, 2, 4, 7], [5, 3], 5 * 1.03125, (5, 8), 1),
        # Padding has probabilities (1/2, 1/2): f (6/8, 2/8), P ((11/4 + 3/2) / 8, (9/4 + 3/2) / 8).
        ("zeroed", [1, 2, 7], [6, 2], 8 * 2 * (0.75 * 4.25 + 0.25 * 3.75) / 8, (8, 8), 4),
        # The first two of each expert: 0 and 1, 2 and 5.
        ("routed", [0, 1, 2, 5], [5, 3], 8 * 1.03125, (8, 8), 4),
    ],
)
def test_what_padding_takes_and_where_it_counts(
    padding: str, kept: list[int], load: list[int], balance: float, tokens_and_counted: tuple[int, int], dropped: int
) -> None:
    output, stats = apply(paddings_layer(padding), PADDED, PADDED_MASK)
    expected = np.zeros(8)
    expected[kept] = 0.75
    np.testing.assert_allclose(output[0, :, 1], expected, rtol=1e-6)
    np.testing.assert_array_equal(stats.expert_load, load)
    np.testing.assert_allclose(stats.load_balance_loss, balance, rtol=1e-6)
    assert (float(stats.tokens), float(stats.counted)) == tokens_and_counted
    assert float(stats.dropped) == dropped
    means = stats.means()
    np.testing.assert_allclose(means["load_balance_loss"], balance / tokens_and_counted[1], rtol=1e-6)
    np.testing.assert_allclose(means["fraction_dropped"], dropped / tokens_and_counted[0], rtol=1e-6)
    np.testing.assert_allclose(np.sum(means["expert_load"]), 1, rtol=1e-6)


@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("router", ["top_k", "no_token_left_behind"])
def test_counted_padding_is_what_the_oracle_says(scope: Any, router: Any) -> None:
    config = dataclasses.replace(
        CONFIG, padding="counted", balance_scope=scope, router=RouterConfig(router=router), group_size="sequence"
    )
    layer, (x, mask) = make_layer(config), tokens()
    _, stats = apply(layer, x, mask, train=True)
    probs = oracle.softmax(np.asarray(x, np.float64) @ np.asarray(layer.router[...], np.float64))
    expected = oracle.padding_counted_load_balance_loss(
        probs, probs.argmax(-1), np.asarray(mask), np.ones(mask.shape, bool), scope=scope
    )
    np.testing.assert_allclose(stats.means()["load_balance_loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("padding", ["ignored", "counted", "zeroed", "routed"])
def test_a_token_that_is_not_finite_never_takes_a_slot(padding: str) -> None:
    x = PADDED.at[0, 1, 0].set(jnp.inf).at[0, 3, 0].set(jnp.nan)
    output, stats = apply(paddings_layer(padding), x, PADDED_MASK)
    assert np.isfinite(output).all()
    assert not np.asarray(output)[0, [1, 3]].any()
    # Token 3 is padding: it asks for a slot where padding is routed as it is.
    assert float(stats.nonfinite) == (2 if padding == "routed" else 1)


def test_an_absolute_capacity_takes_the_place_of_the_factors() -> None:
    config = dataclasses.replace(CONFIG, expert_capacity=64, min_expert_capacity=80)
    assert [config.capacity(tokens, train) for tokens in (100, 12) for train in (True, False)] == [64, 64, 12, 12]


def test_a_sequence_is_a_group_of_its_own() -> None:
    config = dataclasses.replace(CONFIG, expert_capacity=1, group_size="sequence")
    (x, mask), layer = tokens(), make_layer(config)
    whole, stats = apply(layer, x, mask)
    rows = [apply(layer, x[row : row + 1], mask[row : row + 1]) for row in range(BATCH)]
    np.testing.assert_allclose(whole, np.concatenate([output for output, _ in rows]), rtol=1e-6, atol=1e-7)
    assert float(stats.dropped) == sum(float(row.dropped) for _, row in rows) > 0


@pytest.mark.parametrize("router", ["expert_choice", "sinkhorn"])
def test_padding_is_not_counted_by_routers_that_would_choose_otherwise_with_it(router: Any) -> None:
    with pytest.raises(ConfigError, match=rf"MoEConfig\.padding 'counted' has no meaning for the router '{router}'"):
        MoEConfig(4, padding="counted", router=RouterConfig(router=router))
