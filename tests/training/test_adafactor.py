"""Adafactor against a float64 oracle in plain loops, against itself taken apart, and against T5X."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switch_t5.errors import ConfigError
from switch_t5.training.adafactor import AdafactorOptions, adafactor_transformation, factor_dims

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "t5x"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there are no golden checkpoints at {GOLDEN}")

EXPERT_PARTITIONS = 4
"""T5X's trainer, not its optimizer, multiplies the experts' gradients by this."""

TINY = AdafactorOptions(min_dim_size_to_factor=2)


def schedule(step):
    return 0.3 / (step + 2.0)


def drawn(shape, seed=0, dtype=jnp.float32):
    """Values with outliers, rows of different size and an entry that is 0."""
    generator = np.random.default_rng([seed, *shape])
    values = generator.standard_normal(shape) * np.exp(2 * generator.standard_normal((*shape[:-1], 1)))
    values.flat[0] = 0.0
    return jnp.asarray(values, dtype)


def run(options, axes, param, gradients, rate=schedule):
    """Returns the parameter and the state after each of the updates."""
    transformation = adafactor_transformation(rate, options, {"w": axes})
    params = {"w": param}
    state = transformation.init(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transformation.update({"w": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        history.append((params["w"], state))
    return history


def oracle(options, param, gradients, factored):
    """Adafactor of one matrix or vector, in float64 and in loops over its entries; returns every step's."""
    p = np.array(param, np.float64)
    entries = list(np.ndindex(p.shape))
    v, m = np.zeros_like(p), np.zeros_like(p)
    rows, columns = np.zeros(p.shape[0]), np.zeros(p.shape[-1])
    results = []
    for step, given in enumerate(gradients):
        gradient = np.array(given, np.float64)
        if options.clip_by_global_norm is not None:
            norm = np.sqrt(sum(gradient[i] ** 2 for i in entries))
            gradient = gradient * min(1.0, options.clip_by_global_norm / norm)
        t = max(step - options.step_offset + 1, 1)
        decay = 1.0 - t**-options.decay_rate
        u = np.zeros_like(p)
        if factored:
            for r in range(len(rows)):
                mean = sum(gradient[r, c] ** 2 + options.epsilon1 for c in range(len(columns))) / len(columns)
                rows[r] = decay * rows[r] + (1 - decay) * mean
            for c in range(len(columns)):
                mean = sum(gradient[r, c] ** 2 + options.epsilon1 for r in range(len(rows))) / len(rows)
                columns[c] = decay * columns[c] + (1 - decay) * mean
            for r, c in entries:
                u[r, c] = gradient[r, c] / np.sqrt(rows[r] * columns[c] / (sum(rows) / len(rows)))
        else:
            for i in entries:
                v[i] = decay * v[i] + (1 - decay) * (gradient[i] ** 2 + options.epsilon1)
                u[i] = gradient[i] / np.sqrt(v[i])
        if options.clipping_threshold is not None:
            root = np.sqrt(sum(u[i] ** 2 for i in entries) / p.size)
            u = u / max(1.0, root / options.clipping_threshold)
        rate = schedule(step)
        if options.multiply_by_parameter_scale:
            rate *= max(np.sqrt(sum(p[i] ** 2 for i in entries) / p.size), options.epsilon2)
        u = rate * u
        if options.beta1 is not None:
            m = u = options.beta1 * m + (1 - options.beta1) * u
        p = (1 - (options.weight_decay_rate or 0.0)) * p - u
        results.append((p.copy(), rows.copy(), columns.copy(), v.copy(), m.copy()))
    return results


OPTIONS = {
    "t5x defaults": {},
    "no clipping": {"clipping_threshold": None},
    "low clipping": {"clipping_threshold": 0.3},
    "no parameter scale": {"multiply_by_parameter_scale": False},
    "parameter below its least scale": {"epsilon2": 1e3},
    "momentum": {"beta1": 0.9},
    "weight decay": {"weight_decay_rate": 0.1},
    "decay rate and offset": {"decay_rate": 0.5, "step_offset": 2},
    "clipped by global norm": {"clip_by_global_norm": 0.05},
    "large epsilon": {"epsilon1": 0.5},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("factored", [True, False], ids=["factored", "whole"])
def test_matrix_follows_the_float64_oracle_for_four_updates(changes, factored):
    options = dataclasses.replace(TINY, factored=factored, **changes)
    param = drawn((5, 7))
    gradients = [drawn((5, 7), seed) for seed in (1, 2, 3, 4)]
    expected = oracle(options, param, gradients, factored)
    actual = run(options, ("embed", "mlp"), param, gradients)
    for step, ((p, rows, columns, v, m), (new, state)) in enumerate(zip(expected, actual, strict=True)):
        np.testing.assert_allclose(new, p, rtol=2e-6, atol=1e-6 * np.abs(p).max())
        moments = state.moments["w"]
        if factored:
            np.testing.assert_allclose(moments["v_row"], rows, rtol=2e-6)
            np.testing.assert_allclose(moments["v_col"], columns, rtol=2e-6)
        else:
            np.testing.assert_allclose(moments["v"], v, rtol=2e-6)
        if options.beta1 is not None:
            np.testing.assert_allclose(moments["m"], m, rtol=1e-5, atol=1e-6)
        assert int(state.count) == step + 1


def test_vector_follows_the_float64_oracle_and_is_kept_whole():
    param, gradients = drawn((9,)), [drawn((9,), seed) for seed in (1, 2, 3)]
    expected = oracle(TINY, param, gradients, factored=False)
    for (p, _, _, v, _), (new, state) in zip(expected, run(TINY, ("embed",), param, gradients), strict=True):
        np.testing.assert_allclose(new, p, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(state.moments["w"]["v"], v, rtol=2e-6)


def test_first_update_of_a_hand_computed_matrix():
    # Gradient [[3, 4], [0, 0]]: row means (12.5, 0), column means (4.5, 8), mean 6.25; the update before
    # clipping is (3 / sqrt(9), 4 / sqrt(16)) = (1, 1), its root mean square sqrt(1/2) is not clipped.
    # The parameter's root mean square is 2; the rate 0.1.
    options = dataclasses.replace(TINY, epsilon1=1e-30)
    param, gradient = jnp.full((2, 2), 2.0), jnp.array([[3.0, 4.0], [0.0, 0.0]])
    ((new, state),) = run(options, ("embed", "mlp"), param, [gradient], rate=optax.constant_schedule(0.1))
    np.testing.assert_allclose(new, [[1.8, 1.8], [2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(state.moments["w"]["v_row"], [12.5, 1e-30], rtol=1e-6)
    np.testing.assert_allclose(state.moments["w"]["v_col"], [4.5, 8.0], rtol=1e-6)


@pytest.mark.parametrize("options", [TINY, dataclasses.replace(TINY, factored=False)], ids=["factored", "whole"])
def test_each_expert_follows_the_oracle_of_its_own_matrix(options):
    param, gradients = drawn((3, 4, 6)), [drawn((3, 4, 6), seed) for seed in (1, 2, 3)]
    history = run(options, ("expert", "embed", "expert_mlp"), param, gradients)
    for expert in range(3):
        alone = oracle(options, param[expert], [gradient[expert] for gradient in gradients], options.factored)
        for (p, *_), (new, _) in zip(alone, history, strict=True):
            np.testing.assert_allclose(new[expert], p, rtol=2e-6, atol=1e-6)


def assert_members_alone_equal_the_stack(options, stacked, axes, shape):
    """``shape`` starts with the stacked dims, named ``stacked``; ``axes`` name the rest."""
    param, gradients = drawn(shape), [drawn(shape, seed) for seed in (1, 2, 3)]
    whole, state = run(options, stacked + axes, param, gradients)[-1]
    for member in np.ndindex(shape[: len(stacked)]):
        alone, alone_state = run(options, axes, param[member], [gradient[member] for gradient in gradients])[-1]
        np.testing.assert_allclose(whole[member], alone, rtol=1e-7, atol=2e-7 * np.abs(alone).max())
        assert state.moments["w"].keys() == alone_state.moments["w"].keys()
        for name, moment in alone_state.moments["w"].items():
            np.testing.assert_allclose(state.moments["w"][name][member], moment, rtol=5e-7)


@pytest.mark.parametrize(
    ("stacked", "axes", "shape"),
    [
        (("expert",), ("embed", "expert_mlp"), (3, 130, 140)),
        (("layers",), ("embed", "mlp"), (2, 140, 128)),
        (("layers",), ("embed", "heads", "kv"), (2, 130, 3, 50)),
        (("layers",), ("embed",), (2, 130)),
        (("layers",), ("embed", None), (2, 130, 8)),
        (("layers",), ("heads", "relpos_buckets"), (2, 4, 32)),
        (("layers", "expert"), ("expert_mlp", "embed"), (2, 2, 128, 129)),
    ],
)
def test_stack_of_experts_or_layers_equals_each_alone(stacked, axes, shape):
    assert_members_alone_equal_the_stack(AdafactorOptions(), stacked, axes, shape)


def test_experts_gradient_leaves_the_other_experts_alone():
    gradient = drawn((2, 4, 6))
    other = gradient.at[1].mul(1000.0)
    param = drawn((2, 4, 6), seed=5)
    axes = ("expert", "embed", "expert_mlp")
    ((one, _),), ((two, _),) = run(TINY, axes, param, [gradient]), run(TINY, axes, param, [other])
    np.testing.assert_array_equal(one[0], two[0])


@pytest.mark.parametrize(
    ("axes", "shape", "flat_axes", "flat_shape"),
    [
        (("embed", "heads", "kv"), (12, 3, 5), ("embed", "mlp"), (12, 15)),
        (("heads", "kv", "embed"), (3, 5, 12), ("mlp", "embed"), (15, 12)),
        (("layers", "heads", "kv", "embed"), (2, 3, 5, 12), ("layers", "mlp", "embed"), (2, 15, 12)),
    ],
)
def test_heads_and_kv_are_one_dim_of_the_matrix(axes, shape, flat_axes, flat_shape):
    options = AdafactorOptions(min_dim_size_to_factor=12)
    param, gradients = drawn(shape), [drawn(shape, seed) for seed in (1, 2, 3)]
    new, state = run(options, axes, param, gradients)[-1]
    flat, flat_state = run(options, flat_axes, param.reshape(flat_shape), [g.reshape(flat_shape) for g in gradients])[
        -1
    ]
    np.testing.assert_allclose(new.reshape(flat_shape), flat, rtol=1e-6, atol=1e-7)
    for name, moment in flat_state.moments["w"].items():
        np.testing.assert_allclose(state.moments["w"][name].reshape(moment.shape), moment, rtol=1e-6)


def moment_shapes(axes, shape, **changes):
    transformation = adafactor_transformation(schedule, AdafactorOptions(**changes), {"w": axes})
    state = jax.eval_shape(transformation.init, {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
    moments = state.moments["w"]
    assert {moment.dtype for moment in moments.values()} == {jnp.dtype("float32")}
    return {name: moment.shape for name, moment in moments.items()}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (128, 512), {"v_row": (128,), "v_col": (512,)}),
        (("embed", "mlp"), (127, 512), {"v": (127, 512)}),
        (("vocab", "embed"), (32128, 128), {"v_row": (32128,), "v_col": (128,)}),
        (("embed", "heads", "kv"), (768, 12, 64), {"v_row": (768,), "v_col": (12, 64)}),
        (("heads", "kv", "embed"), (2, 64, 768), {"v_row": (2, 64), "v_col": (768,)}),
        (("heads", "kv", "embed"), (1, 64, 768), {"v": (1, 64, 768)}),
        (("expert", "embed", "expert_mlp"), (4, 128, 256), {"v_row": (4, 128), "v_col": (4, 256)}),
        (("expert", "embed", "expert_mlp"), (4, 64, 256), {"v": (4, 64, 256)}),
        (("embed", None), (768, 64), {"v": (768, 64)}),
        (("embed", None), (768, 128), {"v_row": (768,), "v_col": (128,)}),
        (("heads", "relpos_buckets"), (128, 128), {"v": (128, 128)}),
        (("embed",), (768,), {"v": (768,)}),
        ((), (), {"v": ()}),
    ],
)
def test_both_dims_of_the_matrix_decide_whether_it_is_factored(axes, shape, expected):
    assert moment_shapes(axes, shape) == expected
    assert moment_shapes(axes, shape, factored=False) == {"v": shape}
    assert moment_shapes(axes, shape, beta1=0.9) == expected | {"m": shape}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("expert", "embed", "expert_mlp"), (4, 8, 6), {"v_row": (4, 8), "v_col": (4, 6)}),
        (("layers", "embed", "heads", "kv"), (2, 8, 2, 3), {"v_row": (2, 8), "v_col": (2, 2, 3)}),
        (("layers", "embed", None), (2, 256, 128), {"v": (2, 256, 128)}),
        (("layers", "heads", "relpos_buckets"), (2, 4, 32), {"v": (2, 4, 32)}),
        (("layers", "embed"), (2, 256), {"v": (2, 256)}),
        (("embed", "mlp"), (8, 6), {"v": (8, 6)}),
    ],
)
def test_factor_small_stacks_factors_stacked_matrices_of_any_size_as_t5x(axes, shape, expected):
    assert moment_shapes(axes, shape, factor_small_stacks=True) == expected


def test_factor_dims_drop_the_dims_averaged_over():
    assert factor_dims(("layers", "embed", "heads", "kv")) == {"v_row": (0, 1), "v_col": (0, 2, 3)}
    assert factor_dims(("expert", "expert_mlp", "embed")) == {"v_row": (0, 1), "v_col": (0, 2)}
    assert factor_dims(("layers", "embed")) == factor_dims(("heads", "relpos_buckets")) == {}


@pytest.mark.parametrize("factored", [True, False])
def test_bfloat16_gradients_are_squared_and_summed_in_float32(factored):
    options = dataclasses.replace(TINY, factored=factored)
    gradients = [drawn((32, 300), seed, jnp.bfloat16) for seed in (1, 2)]
    param = drawn((32, 300))
    low = run(options, ("embed", "mlp"), param, gradients)[-1]
    high = run(options, ("embed", "mlp"), param, [gradient.astype(jnp.float32) for gradient in gradients])[-1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), low, high)


def test_bfloat16_parameters_get_float32_updates_and_stay_bfloat16():
    param, gradient = drawn((8, 8), dtype=jnp.bfloat16), drawn((8, 8), seed=1, dtype=jnp.bfloat16)
    transformation = adafactor_transformation(schedule, TINY, {"w": ("embed", "mlp")})
    updates: Any = transformation.update({"w": gradient}, transformation.init({"w": param}), {"w": param})[0]
    new: Any = optax.apply_updates({"w": param}, updates)
    assert (updates["w"].dtype, new["w"].dtype) == (jnp.float32, jnp.bfloat16)


def test_gradient_of_zeros_moves_nothing():
    param = drawn((3, 4, 6))
    axes = ("expert", "embed", "expert_mlp")
    for options in (TINY, dataclasses.replace(TINY, factored=False)):
        new, _ = run(options, axes, param, [jnp.zeros((3, 4, 6))] * 2)[-1]
        np.testing.assert_array_equal(new, param)


def test_global_norm_is_taken_over_all_parameters_together():
    axes = {"a": ("embed", "mlp"), "b": ("embed",)}
    params = {"a": drawn((4, 6)), "b": drawn((4,))}
    gradients = {"a": drawn((4, 6), 1), "b": drawn((4,), 2)}
    limit = 0.5 * float(optax.tree.norm(gradients))
    options = dataclasses.replace(TINY, epsilon1=1e-3, clip_by_global_norm=limit)
    clipping = adafactor_transformation(schedule, options, axes)
    plain = adafactor_transformation(schedule, dataclasses.replace(options, clip_by_global_norm=None), axes)
    halved = jax.tree.map(lambda gradient: 0.5 * gradient, gradients)
    actual = clipping.update(gradients, clipping.init(params), params)
    expected = plain.update(halved, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


@pytest.mark.parametrize("changes", [{}, {"factored": False}, {"clip_by_global_norm": 1.0}, {"weight_decay_rate": 0.1}])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_update_holds_nothing_as_large_as_a_gradient(changes, dtype):
    shape, axes = (16, 128, 256), ("expert", "embed", "expert_mlp")
    transformation = adafactor_transformation(schedule, AdafactorOptions(**changes), {"w": axes})
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    state = jax.eval_shape(transformation.init, params)

    def step(params, state, gradients):
        updates, state = transformation.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    gradients = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradients).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend tells nothing of its memory")
    assert analysis.temp_size_in_bytes < 0.2 * np.prod(shape) * 4


def test_parameters_and_axis_names_that_do_not_fit_are_refused_by_name():
    def init(params, axes):
        adafactor_transformation(schedule, TINY, axes).init(params)

    matrix = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="encoder/wi has no axis names"):
        init({"encoder": {"wi": matrix}}, {"encoder": {}})
    with pytest.raises(ValueError, match="encoder/wi of shape"):
        init({"encoder": {"wi": matrix}}, {"encoder": {"wi": ("embed",)}})
    with pytest.raises(ValueError, match="wo, which is no parameter"):
        init({"wi": matrix}, {"wi": ("embed", "mlp"), "wo": ("mlp", "embed")})
    with pytest.raises(ValueError, match=r"wi: its axes .* neither a vector nor a matrix"):
        init({"wi": jnp.zeros((2, 3, 4))}, {"wi": ("embed", "vocab", "mlp")})
    with pytest.raises(ValueError, match="wi: 'layers' must lead"):
        init({"wi": jnp.zeros((2, 3, 4))}, {"wi": ("embed", "layers", "mlp")})


def test_update_without_parameters_is_refused():
    transformation = adafactor_transformation(schedule, TINY, {"w": ("embed",)})
    params = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match="params"):
        transformation.update(params, transformation.init(params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_rate": 0}, "adafactor.decay_rate must be a number above 0, got 0."),
        ({"beta1": 1.0}, "adafactor.beta1 must be a number at least 0 and below 1 or None, got 1.0."),
        (
            {"min_dim_size_to_factor": 1.5},
            "adafactor.min_dim_size_to_factor must be an integer at least 1, got 1.5.",
        ),
        ({"factored": 1}, "adafactor.factored must be True or False, got 1."),
        (
            {"clipping_threshold": "1"},
            "adafactor.clipping_threshold must be a number above 0 or None, got '1'.",
        ),
    ],
)
def test_options_out_of_range_are_refused_in_one_sentence(changes, message):
    with pytest.raises(ConfigError) as error:
        AdafactorOptions(**changes)
    assert str(error.value) == message


def t5x_array(folder, name):
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / name)}}
    return np.asarray(tensorstore.open(spec).result().read().result())


def axes_of_t5x(name) -> tuple[str | None, ...]:
    """The axis names of an array of T5X's, but for the scanned axis, which is always its second."""
    if "rel_embedding" in name:
        return ("heads", "relpos_buckets")
    if "router" in name:
        return ("embed", None)
    if name.endswith("scale"):
        return ("embed",)
    if "/expert/" in name:
        return ("expert", "embed", "expert_mlp") if name.endswith("wi/kernel") else ("expert", "expert_mlp", "embed")
    return ("vocab", "embed") if "embedding" in name else ("embed", "mlp")


def scanned_first(name, array):
    """T5X's array in this project's layout."""
    return jnp.asarray(np.moveaxis(array, 1, 0) if "subblock" in name else array)


def moments_of_t5x(folder, name):
    """An array's second moments in a checkpoint, or None: factors of small matrices are kept in its index."""
    dotted = f"state.param_states.{name.replace('/', '.')}"
    if (folder / f"{dotted}.v").is_dir():
        return {"v": scanned_first(name, t5x_array(folder, f"{dotted}.v"))}
    if (folder / f"{dotted}.v_row").is_dir():
        kinds = ("v_row", "v_col") if axes_of_t5x(name)[1] == "embed" else ("v_col", "v_row")  # Its rows are "embed".
        factors = (scanned_first(name, t5x_array(folder, f"{dotted}.{kind}")) for kind in ("v_row", "v_col"))
        return dict(zip(kinds, factors, strict=True))
    return None


@pytest.mark.parity
@needs_golden
@pytest.mark.parametrize(("model", "num_whole"), [("switch_tiny", 45), ("switch_tiny_scan", 19)])
def test_sixth_update_is_that_of_t5x(model, num_whole):
    golden, folder = np.load(GOLDEN / f"{model}_golden.npz"), GOLDEN / model / "checkpoint_5"
    names = [key.removeprefix("train_grad/") for key in golden.files if key.startswith("train_grad/")]
    moments = {name: moments_of_t5x(folder, name) for name in names}
    moments = {name: moment for name, moment in moments.items() if moment is not None}
    assert sum("v" in moment for moment in moments.values()) == num_whole
    assert sum("v_row" in moment for moment in moments.values()) == 4
    params = {name: scanned_first(name, t5x_array(folder, f"target.{name.replace('/', '.')}")) for name in moments}
    gradients = {
        name: scanned_first(name, golden[f"train_grad/{name}"]) * (EXPERT_PARTITIONS if "/expert/" in name else 1)
        for name in moments
    }
    axes = {name: (("layers",) if "subblock" in name else ()) + axes_of_t5x(name) for name in moments}

    options = AdafactorOptions(factor_small_stacks=True)
    transformation = adafactor_transformation(optax.constant_schedule(0.01), options, axes)
    state: Any = transformation.init(params)
    assert jax.tree.map(jnp.shape, state.moments) == jax.tree.map(jnp.shape, moments)
    state = dataclasses.replace(state, count=jnp.asarray(5, jnp.int32), moments=moments)
    updates, _ = jax.jit(transformation.update)(gradients, state, params)
    new_params: Any = optax.apply_updates(params, updates)
    for name in params:
        before, after = (
            np.moveaxis(array, 0, 1) if "subblock" in name else array
            for array in (np.asarray(tree[name], np.float64) for tree in (params, new_params))
        )
        head, norm, total = (golden[f"step6_{kind}/{name}"] for kind in ("param_head", "update_l2", "param_sum"))
        np.testing.assert_allclose(after.reshape(-1)[:16], head, rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(np.linalg.norm(after - before), norm, rtol=2e-5)
        np.testing.assert_allclose(after.sum(), total, rtol=1e-5, atol=2e-4)
