"""The factories, and the axis names of every state that they make."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switch_t5.errors import ConfigError
from switch_t5.partitioning.rules import named_sharding
from switch_t5.training import optimizers
from switch_t5.training.optimizers import adafactor, adamw, optax_optimizer, sgd, state_axes
from switch_t5.training.schedules import rsqrt_decay

AXES = {
    "decoder": {"norm": ("layers", "embed"), "experts": {"wi": ("layers", "expert", "embed", "expert_mlp")}},
    "encoder": {"out": ("heads", "kv", "embed"), "router": ("embed", None), "norm": ("embed",)},
}
SHAPES = {
    "decoder": {"norm": (2, 8), "experts": {"wi": (2, 4, 8, 12)}},
    "encoder": {"out": (2, 4, 8), "router": (8, 4), "norm": (8,)},
}


def drawn(seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.standard_normal(shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


FACTORIES = {
    "adafactor": adafactor(0.01, min_dim_size_to_factor=8),
    "adafactor with momentum": adafactor(0.01, min_dim_size_to_factor=8, beta1=0.9, clip_by_global_norm=1.0),
    "adamw": adamw(rsqrt_decay(), clip_by_global_norm=1.0),
    "adamw of all": adamw(0.01, decay_vectors=True),
    "sgd": sgd(0.01),
    "sgd with momentum": sgd(0.01, momentum=0.9, nesterov=True, clip_by_global_norm=1.0),
} | {f"optax {name}": optax_optimizer(name, rsqrt_decay()) for name in optimizers.OPTAX_OPTIMIZERS}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
def test_every_array_of_the_state_gets_axes_of_its_rank_and_every_parameter_moves(factory):
    params, gradients = drawn(), drawn(1)
    transformation = factory(AXES)
    state = transformation.init(params)
    axes = state_axes(jax.eval_shape(transformation.init, params), params, AXES)
    jax.tree.map(lambda leaf, names: np.testing.assert_equal(len(names), leaf.ndim), state, axes)
    for _ in range(2):  # A first update may only note the gradient.
        updates, state = jax.jit(transformation.update)(gradients, state, params)
        params = optax.apply_updates(params, updates)
    for before, after in zip(jax.tree.leaves(drawn()), jax.tree.leaves(params), strict=True):
        assert np.isfinite(after).all()
        assert (after != before).any()


def test_adafactors_state_has_the_axes_that_its_means_left():
    params = drawn()
    state = adafactor(0.01, min_dim_size_to_factor=8, beta1=0.5)(AXES).init(params)
    axes = state_axes(state, params, AXES)
    assert axes.count == ()
    assert axes.moments == {
        "decoder": {
            "norm": {"v": ("layers", "embed"), "m": ("layers", "embed")},
            "experts": {
                "wi": {
                    "v_row": ("layers", "expert", "embed"),
                    "v_col": ("layers", "expert", "expert_mlp"),
                    "m": ("layers", "expert", "embed", "expert_mlp"),
                }
            },
        },
        "encoder": {
            "out": {"v_row": ("heads", "kv"), "v_col": ("embed",), "m": ("heads", "kv", "embed")},
            "router": {"v": ("embed", None), "m": ("embed", None)},
            "norm": {"v": ("embed",), "m": ("embed",)},
        },
    }


def test_adams_state_has_its_parameters_axes():
    params = drawn()
    axes = state_axes(optax.adam(0.1).init(params), params, AXES)
    assert axes[0].mu == axes[0].nu == AXES
    assert axes[0].count == ()


def test_state_that_fits_no_parameter_is_refused_by_name():
    params, axes = {"wi": jnp.zeros((4, 6))}, {"wi": ("embed", "mlp")}
    with pytest.raises(ValueError, match=r"mu/wi \(4,\) .* neither shaped as its parameter wi \(4, 6\)"):
        state_axes({"mu": {"wi": jnp.zeros(4)}}, params, axes)
    with pytest.raises(ValueError, match=r"wi/v_row \(6,\) .* parameter wi"):
        state_axes({"wi": {"v_row": jnp.zeros(6)}}, params, axes)
    with pytest.raises(ValueError, match=r"key \(2,\) .* belongs to no parameter"):
        state_axes({"key": jnp.zeros(2)}, params, axes)
    with pytest.raises(ValueError, match="wi of shape"):
        state_axes({}, params, {"wi": ("embed",)})


def test_state_belongs_to_the_parameter_with_the_longest_path():
    params = {"wi": jnp.zeros((4, 6)), "mlp": {"wi": jnp.zeros((6, 4))}}
    axes = {"wi": ("embed", "mlp"), "mlp": {"wi": ("mlp", "embed")}}
    assert state_axes(optax.trace(0.9).init(params), params, axes).trace == axes


@pytest.mark.multidevice
def test_update_sharded_over_eight_devices_equals_that_of_one_and_gathers_no_parameter():
    axes = {"wi": ("expert", "embed", "expert_mlp"), "out": ("heads", "kv", "embed")}
    generator = np.random.default_rng(0)
    shapes = {"wi": (4, 128, 256), "out": (2, 64, 128)}
    params, gradients = (
        {name: jnp.asarray(generator.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    transformation = adafactor(0.1, clip_by_global_norm=1.0)(axes)
    state = transformation.init(params)
    expected = jax.jit(transformation.update)(gradients, state, params)

    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def shard(tree, names):
        return jax.tree.map(lambda x, name: jax.device_put(x, named_sharding(mesh, name, x.shape)), tree, names)

    arguments = (shard(gradients, axes), shard(state, state_axes(state, params, axes)), shard(params, axes))
    compiled = jax.jit(transformation.update).lower(*arguments).compile()
    actual = compiled(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), actual, expected)
    for moment in ("v_row", "v_col"):
        kept = arguments[1].moments["wi"][moment].sharding
        assert actual[1].moments["wi"][moment].sharding.is_equivalent_to(kept, 2)
    assert "all-gather" not in str(compiled.as_text())


def test_factory_keeps_its_name_and_schedule():
    schedule = rsqrt_decay()
    for name, factory in {
        "adafactor": adafactor(schedule),
        "adamw": adamw(schedule, clip_by_global_norm=1.0),
        "sgd": sgd(schedule),
        "lion": optax_optimizer("lion", schedule),
    }.items():
        assert (factory.name, factory.learning_rate) == (name, schedule)


def test_learning_rate_may_be_a_number():
    assert sgd(0.25).learning_rate(3) == 0.25


def test_sgd_follows_its_schedule():
    params = {"w": jnp.zeros(2)}
    transformation = sgd(lambda step: 1.0 / (step + 1))({"w": ("embed",)})
    state = transformation.init(params)
    for rate in (1.0, 0.5):
        updates: Any
        updates, state = transformation.update({"w": jnp.array([1.0, -2.0])}, state, params)
        np.testing.assert_allclose(updates["w"], [-rate, 2 * rate])


@pytest.mark.parametrize(
    "clipped", [sgd(1.0, clip_by_global_norm=0.5), optax_optimizer("sgd", 1.0, clip_by_global_norm=0.5)]
)
def test_gradients_are_clipped_by_their_common_norm(clipped):
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    transformation = clipped({"a": ("embed",), "b": ("embed",)})
    updates, _ = transformation.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, transformation.init(params))
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.3, -0.4], rtol=1e-6)


def test_adamw_decays_matrices_and_vectors_only_where_asked():
    zeros = jax.tree.map(jnp.zeros_like, drawn())

    def moved(factory):
        transformation = factory(AXES)
        updates, _ = transformation.update(zeros, transformation.init(drawn()), drawn())
        return jax.tree.map(lambda update: bool((update != 0).all()), updates)

    assert moved(adamw(0.1, weight_decay=0.1)) == {
        "decoder": {"norm": False, "experts": {"wi": True}},
        "encoder": {"out": True, "router": True, "norm": False},
    }
    assert all(jax.tree.leaves(moved(adamw(0.1, weight_decay=0.1, decay_vectors=True))))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (adafactor, (-1.0, {}), "learning_rate must be a number at least 0, got -1.0."),
        (adafactor, ("fast", {}), "learning_rate must be a number at least 0, got 'fast'."),
        (
            adamw,
            (rsqrt_decay, {}),
            "learning_rate must be a schedule, got what makes one; call it, as in @rsqrt_decay().",
        ),
        (adafactor, (0.1, {"decay_rate": None}), "decay_rate must be a number above 0, got None."),
        (adamw, (0.1, {"b2": 1}), "b2 must be a number at least 0 and below 1, got 1."),
        (
            adamw,
            (0.1, {"clip_by_global_norm": 0}),
            "clip_by_global_norm must be a number above 0 or None, got 0.",
        ),
        (sgd, (0.1, {"nesterov": "yes"}), "nesterov must be True or False, got 'yes'."),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_sentence(make, arguments, message):
    learning_rate, others = arguments
    with pytest.raises(ConfigError) as error:
        make(learning_rate, **others)
    assert str(error.value) == f"{make.__name__}.{message}"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamm", {}, "name must be an optimizer of optax, got 'adamm'. Did you mean 'adam'?"),
        (
            "lion",
            {"weight_deca": 0.1},
            "weight_deca is no argument of optax.lion. Did you mean 'weight_decay'?",
        ),
        ("lion", {"b1": "x"}, "b1 must be a number, got 'x'."),
        ("adam", {"nesterov": 1}, "nesterov must be True or False, got 1."),
        ("sgd", {"clip_by_global_norm": -1}, "clip_by_global_norm must be a number above 0 or None, got -1."),
    ],
)
def test_arguments_that_optax_would_misread_are_refused_in_one_sentence(name, arguments, message):
    with pytest.raises(ConfigError) as error:
        optax_optimizer(name, 0.1, **arguments)
    assert str(error.value) == f"optax_optimizer.{message}"


def test_optax_optimizers_that_mix_a_stack_are_not_offered():
    with pytest.raises(ConfigError, match="There are adabelief, "):
        optax_optimizer("sm3", 0.1)
    for name in ("adafactor", "lamb", "lars"):
        with pytest.raises(ConfigError, match="must be an optimizer of optax"):
            optax_optimizer(name, 0.1)


def test_arguments_that_optax_refuses_are_told_in_its_words():
    with pytest.raises(ConfigError, match=r"cannot make optax\.adam of {'mu_dtype': 'float33'}"):
        optax_optimizer("adam", 0.1, mu_dtype="float33")
