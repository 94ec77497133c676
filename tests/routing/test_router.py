"""Routers as configurations name them: what they see, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.errors import ConfigError
from switch_t5.layers.moe import SwitchFeedForward, layer_keys
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.routing.choice import hashed
from switch_t5.routing.router import RouterConfig, route, route_without_logits
from switch_t5.types import Array
from tests.routing.routers import with_slots

TOKENS, EXPERTS = 16, 8
CAUSAL = [
    RouterConfig(),
    RouterConfig(num_selected_experts=2, renormalize_weights=True),
    RouterConfig(router="gshard_top_2"),
    RouterConfig(router="no_token_left_behind"),
    RouterConfig(router="sigmoid_top_k", num_selected_experts=2),
]
LEAKING = [
    RouterConfig(router="expert_choice"),
    RouterConfig(router="sinkhorn"),
    RouterConfig(batch_prioritized=True),
]


def name_of(config: RouterConfig) -> str:
    return f"{config.router}{'_prioritized' * config.batch_prioritized}"


def logits(seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(1, TOKENS, EXPERTS)), jnp.float32)


def decisions(config: RouterConfig, values: Array, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and slots of every token, in training."""
    found = with_slots(route(config, values, capacity, jnp.ones((1, TOKENS), bool), train=True).assignment)
    return np.asarray(found.expert)[0], np.asarray(found.slot)[0]


@pytest.mark.parametrize("config", CAUSAL, ids=name_of)
def test_without_drops_a_token_of_a_causal_router_never_depends_on_later_ones(config: RouterConfig) -> None:
    values = logits()
    changed = values.at[:, TOKENS // 2 :].set(logits(1)[:, TOKENS // 2 :])
    before, after = (decisions(config, each, TOKENS)[0][: TOKENS // 2] for each in (values, changed))
    np.testing.assert_array_equal(before, after)
    assert not config.sees_future_tokens


@pytest.mark.parametrize("config", LEAKING, ids=name_of)
def test_a_router_that_is_said_to_look_ahead_does(config: RouterConfig) -> None:
    found = False
    for seed in range(1, 6):
        values = logits()
        changed = values.at[:, TOKENS // 2 :].set(3 * logits(seed)[:, TOKENS // 2 :])
        # Which tokens have a slot: at little capacity, priority decides.
        before, after = (decisions(config, each, 2)[1][: TOKENS // 2] < 2 * EXPERTS for each in (values, changed))
        experts = [decisions(config, each, 2)[0][: TOKENS // 2] for each in (values, changed)]
        found |= (before != after).any() or (experts[0] != experts[1]).any()
    assert found
    assert config.sees_future_tokens


def transformer(**settings: Any) -> TransformerConfig:
    return TransformerConfig(11, 8, 2, 4, 16, 2, 2, **settings)


@pytest.mark.parametrize("config", LEAKING, ids=name_of)
def test_a_decoder_refuses_a_router_that_looks_ahead_unless_it_is_allowed(config: RouterConfig) -> None:
    moe = MoEConfig(4, router=config)
    with pytest.raises(ConfigError, match=r"leaks the future into training.*RouterConfig\.allow_future_tokens = True"):
        transformer(moe=moe)
    with pytest.raises(
        ConfigError, match=r"TransformerConfig\.decoder_moe cannot serve.*or allow_future_tokens = True"
    ):
        transformer(moe=MoEConfig(4), decoder_moe=moe)
    transformer(moe=moe, decoder_sparse_layers="none")
    transformer(moe=moe, decoder_moe=MoEConfig(4))
    transformer(moe=dataclasses.replace(moe, router=dataclasses.replace(config, allow_future_tokens=True)))


def test_both_stacks_have_one_group_size() -> None:
    with pytest.raises(ConfigError, match=r"decoder_moe.*group_size 64.*give it the encoder's, 4096"):
        transformer(moe=MoEConfig(4), decoder_moe=MoEConfig(4, group_size=64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_selected_experts": 0}, "num_selected_experts must be at least 1, got 0"),
        ({"router": "top_j"}, "router must be one of"),
        ({"noise_std": 0.0}, "noise_std must be above 0, got 0.0"),
        ({"noise_std": float("inf")}, "noise_std must be a number that float32 holds, got inf"),
        ({"noise_std": 1e300}, "noise_std must be a number that float32 holds, got 1e\\+300"),
        ({"noise_std": True}, "noise_std must be a number, got True"),
        ({"bias_update_rate": -1.0, "router": "sigmoid_top_k"}, "bias_update_rate must not be negative, got -1.0"),
        (
            {"router": "sigmoid_top_k", "num_expert_groups": 2, "num_limited_groups": 3},
            "num_limited_groups must be from 1 to num_expert_groups, 2, got 3",
        ),
        (
            {"router": "expert_choice", "num_selected_experts": 2},
            "num_selected_experts has no effect on the router 'exp",
        ),
        (
            {"router": "hash", "exploration": "sample"},
            "exploration has no effect on the router 'hash'; it is for top_k",
        ),
        (
            {"router": "sinkhorn", "sinkhorn_iterations": 10**9},
            "sinkhorn_iterations must be at most 65536, got 1000000000",
        ),
        ({"num_rounds": 3}, "num_rounds has no effect on the router 'top_k'; it is for no_token_left_behind"),
        (
            {"router": "gshard_top_2", "sinkhorn_iterations": 4},
            "sinkhorn_iterations has no effect on the router 'gshard_top_2'; it is for sinkhorn: leave it at 8, or",
        ),
        (
            {"bias_update_rate": 0.0},
            "bias_update_rate has no effect on the router 'top_k'; it is for sigmoid_top_k",
        ),
        (
            {"router": "sinkhorn", "num_limited_groups": 2},
            "num_limited_groups has no effect on the router 'sinkhorn'; it is for sigmoid_top_k",
        ),
        ({"noise_std": 0.5}, "noise_std has no effect with exploration = 'argmax'; it is for 'gaussian'"),
        (
            {"noise_std": 0.5, "exploration": "sample"},
            "noise_std has no effect with exploration = 'sample'; it is for 'gaussian'",
        ),
        (
            {"router": "sigmoid_top_k"},
            r"num_selected_experts is 1, but the router 'sigmoid_top_k' divides .*; give 2 or more\.$",
        ),
        (
            {"renormalize_weights": True},
            r"is 1, but renormalize_weights divides .*; give 2 or more, or renormalize_weights = False\.$",
        ),
        ({"router": "sinkhorn", "renormalize_weights": True}, "is 1, but renormalize_weights divides"),
    ],
)
def test_a_wrong_router_is_refused_with_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**settings)


def test_what_has_an_effect_is_accepted_and_so_is_permission_that_is_not_needed() -> None:
    RouterConfig(exploration="gaussian", noise_std=0.5)
    RouterConfig(router="no_token_left_behind", num_rounds=3)
    RouterConfig(router="sinkhorn", sinkhorn_iterations=4)
    RouterConfig(
        router="sigmoid_top_k", num_selected_experts=2, num_expert_groups=4, num_limited_groups=2, bias_update_rate=0.0
    )
    RouterConfig(allow_future_tokens=True)


@pytest.mark.parametrize(
    ("experts", "settings", "message"),
    [
        (2, {"num_selected_experts": 3}, "num_selected_experts must not exceed the 2 experts to choose from, got 3"),
        (4, {"router": "no_token_left_behind", "num_rounds": 5}, "num_rounds must not exceed the 4 experts"),
        (
            6,
            {"router": "sigmoid_top_k", "num_selected_experts": 2, "num_expert_groups": 4},
            "num_expert_groups must divide num_experts, 6, got 4",
        ),
        (
            8,
            {"router": "sigmoid_top_k", "num_expert_groups": 4, "num_selected_experts": 3},
            "must not exceed the 2 experts",
        ),
        (1, {"router": "gshard_top_2"}, "'gshard_top_2' needs at least 2 experts"),
    ],
)
def test_choices_that_the_experts_do_not_offer_are_refused(
    experts: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(experts, router=RouterConfig(**settings))


@pytest.mark.parametrize("name", ["hash", "random"])
@pytest.mark.parametrize(("field", "value"), [("router_input_dropout_rate", 0.1), ("router_dtype", "bfloat16")])
def test_what_is_of_logits_has_no_effect_without_them(name: Any, field: str, value: Any) -> None:
    settings = {field: value}
    with pytest.raises(ConfigError, match=f"MoEConfig.{field} has no effect on the router '{name}', .*; leave it at "):
        MoEConfig(4, router=RouterConfig(router=name), **settings)
    MoEConfig(4, **settings)


def test_a_hash_is_fixed_and_spreads_the_vocabulary() -> None:
    experts = np.asarray(hashed(jnp.arange(32000), 64))
    assert experts[:8].tolist() == np.asarray(hashed(jnp.arange(8), 64)).tolist()
    load = np.bincount(experts, minlength=64)
    # 500 of each, give or take five deviations of a fair draw.
    assert abs(load - 500).max() < 5 * np.sqrt(500)


def test_random_experts_are_drawn_anew_in_training_and_are_fixed_in_evaluation() -> None:
    config, mask = RouterConfig(router="random"), jnp.ones((2, 64), bool)

    def experts(rng: Array | None) -> list[Any]:
        found = route_without_logits(config, EXPERTS, 64, mask, jnp.zeros((2, 64), jnp.int32), rng=rng)
        return np.asarray(found.assignment.expert).tolist()

    assert experts(None) == experts(None)
    assert experts(jax.random.key(1)) != experts(jax.random.key(2))


def test_an_evaluation_of_sinkhorn_chooses_by_the_logits() -> None:
    values = logits()
    found = route(RouterConfig(router="sinkhorn"), values, TOKENS, jnp.ones((1, TOKENS), bool), train=False)
    np.testing.assert_array_equal(found.assignment.expert[..., 0], jnp.argmax(values, axis=-1))


@nnx.jit
def evaluated(layer: SwitchFeedForward, x: Array, mask: Array, tokens: Array) -> Any:
    return layer(x, mask, tokens=tokens, sequences=1, train=False, rng=None)


@nnx.jit
def trained(layer: SwitchFeedForward, x: Array, rng: Array | None) -> Any:
    mask, ids = jnp.ones(x.shape[:2], bool), jnp.ones(x.shape[:2], jnp.int32)
    return layer(x, mask, tokens=ids, sequences=1, train=True, rng=rng)


def test_shared_experts_add_what_every_token_passes() -> None:
    moe = MoEConfig(4, group_size=8, num_shared_experts=2, router=RouterConfig())
    layer = SwitchFeedForward(moe, 4, 8, ("relu",), "t5x", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 4)), jnp.float32)
    ids = jnp.ones((1, 8), jnp.int32)
    nobody, _ = evaluated(layer, x, jnp.zeros((1, 8), bool), ids)
    wi, wo = layer.shared_experts.wi[...], layer.shared_experts.wo[...]
    assert wi.shape == (4, 16)
    np.testing.assert_allclose(nobody, jax.nn.relu(x @ wi) @ wo, rtol=1e-5, atol=1e-6)


def test_dropout_of_the_routers_input_changes_choices_in_training_alone() -> None:
    moe = MoEConfig(8, group_size=32, jitter_noise=0.0, router_input_dropout_rate=0.5)
    layer = SwitchFeedForward(moe, 4, 8, ("relu",), "t5x", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 4)), jnp.float32)
    still, drawn, other = (trained(layer, x, rng) for rng in (None, jax.random.key(0), jax.random.key(1)))
    losses = {float(stats.router_z_loss) for _, stats in (still, drawn, other)}
    assert len(losses) == 3
    # What is kept is doubled: the logits of half of the features, twice.
    keep = jax.random.bernoulli(jax.random.fold_in(layer_keys(jax.random.key(0)).input, 1), 0.5, x.shape)
    logits = jnp.where(keep, 2 * x, 0) @ layer.router[...]
    np.testing.assert_allclose(drawn[1].router_z_loss, jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2), rtol=1e-5)
    # Experts see the input as it is.
    chosen = jax.nn.softmax(logits).max(axis=-1)
    hidden = jax.nn.relu(jnp.einsum("gsd,edf->gsef", x, layer.experts.wi[...]))
    outputs = jnp.einsum("gsef,efd->gsed", hidden, layer.experts.wo[...])
    expected = chosen[..., None] * jnp.take_along_axis(outputs, jnp.argmax(logits, -1)[..., None, None], 2)[:, :, 0]
    served = np.any(np.asarray(drawn[0]) != 0, axis=-1)
    assert served.sum() > 16
    np.testing.assert_allclose(np.asarray(drawn[0])[served], np.asarray(expected)[served], rtol=1e-4, atol=1e-5)
