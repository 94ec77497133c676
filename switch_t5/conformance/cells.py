"""The sparse layer beside the oracle: every router, form, dispatch, dtype and mesh, compared in every quantity.

A cell runs :class:`SwitchFeedForward` as a model does, compiled, on the devices at hand, and reports the worst error
of each quantity against :mod:`switch_t5.conformance.oracle`. All have to agree within a bound that
their dtype sets; a token that went elsewhere moves its output by far more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from switch_t5.conformance import oracle
from switch_t5.conformance.layers import (
    LAYERS,
    PLAIN,
    Draws,
    Evaluation,
    Example,
    Layer,
    evaluate,
    expected_places,
    found_places,
)
from switch_t5.conformance.routers import ROUTERS, Router
from switch_t5.layers.moe import SwitchFeedForward, layer_keys
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import named_sharding, partitioned
from switch_t5.routing.dispatch import DispatchMethod
from switch_t5.routing.router import RouterConfig

BATCH, LENGTH, FEATURES, HIDDEN, EXPERTS = 4, 10, 4, 2, 12
"""Experts in such number that a token of expert choice may have more of them than are gathered one by one."""
CAPACITY_FACTOR = 3.5
CAPACITY = 2
"""Of a group of 10 tokens: the floor of 10 x 3.5 / 12 = 2.9; tokens are dropped all the same."""
EVALUATION_CAPACITY_FACTOR = 1.0
EVALUATION_CAPACITY = 1

DataType = Literal["float32", "bfloat16"]
BOUNDS: dict[DataType, float] = {"float32": 2e-5, "bfloat16": 3e-2}
"""Relative to the largest entry. bfloat16 has 8 bits, and the experts two products in a row."""

COMPUTED_BY_EXPERTS = ("output", "gradient of ")
"""How the quantities begin that the layer's dtype rounds: a weight is cast to it before it multiplies an expert's
output, and so the gradients of tokens, router and experts come out of products in it. All others are the router's,
which is float32 in a layer of any dtype, and are held to float32's bound."""

LOSS_WEIGHTS = {"load_balance_loss": 0.5, "router_z_loss": 0.25, "importance_loss": 0.125, "load_loss": 0.25}
"""Of the losses, in the scalar whose gradient is compared; large, so that none can hide."""

KEY = jax.random.key(11)
"""Of all that a layer draws."""

BIAS = np.linspace(-0.3, 0.3, EXPERTS)
MESHES: dict[str, MeshConfig] = {
    "1 device": MeshConfig(num_devices=1),
    "expert 4": MeshConfig(num_devices=4, num_expert_partitions=4),
    "model 2": MeshConfig(num_devices=2, num_model_partitions=2),
    "2 x 2 x 2": MeshConfig(num_devices=8, num_expert_partitions=2, num_model_partitions=2),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination to check, by names."""

    router: str
    dispatch: DispatchMethod = "gather"
    dtype: DataType = "float32"
    mesh: str = "1 device"
    layer: str = PLAIN


FORMS_MESHES = ("1 device", "2 x 2 x 2")
"""Where the layer's other forms are tried: the second divides all that any mesh does."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a cell showed.

    Attributes:
      cell: which.
      errors: the worst error of each quantity, relative to its largest entry.
    """

    cell: Cell
    errors: dict[str, float]

    @property
    def bounds(self) -> dict[str, float]:
        """What the error of each quantity may be."""
        dtypes: dict[str, DataType] = {
            name: self.cell.dtype if name.startswith(COMPUTED_BY_EXPERTS) else "float32" for name in self.errors
        }
        return {name: BOUNDS[dtype] for name, dtype in dtypes.items()}

    @property
    def worst(self) -> str:
        """The quantity whose error is the largest part, or multiple, of its bound."""
        return max(self.errors, key=lambda name: self.errors[name] / self.bounds[name])

    @property
    def red(self) -> set[str]:
        """The quantities beyond their bounds."""
        return {name for name, error in self.errors.items() if not error <= self.bounds[name]}

    @property
    def is_green(self) -> bool:
        """Whether every quantity is within its bound."""
        return not self.red


def cells(device_count: int) -> Iterator[Cell]:
    """Every cell that so many devices can run."""
    for mesh, config in MESHES.items():
        if (config.num_devices or 1) > device_count:
            continue
        for name, layer in LAYERS.items():
            if name != PLAIN and mesh not in FORMS_MESHES:
                continue
            for router in ROUTERS if layer.router is None else [layer.router]:
                for dispatch in layer.dispatches(ROUTERS[router]):
                    for dtype in BOUNDS:
                        if dtype == "float32" or layer.in_bfloat16:
                            yield Cell(router, dispatch, dtype, mesh, name)


def check(cell: Cell) -> Result:
    """Runs a cell's layer and its gradient, and compares them with the oracle's."""
    expected = expected_values(cell.router, cell.dtype, cell.layer, has_capacity=cell.dispatch != "dropless")
    actual = actual_values(cell, example_inputs(cell.dtype, cell.layer))
    errors = {name: relative_error(actual.get(name, np.nan), value) for name, value in expected.items()}
    return Result(cell, errors)


def relative_error(actual: np.ndarray | float, expected: np.ndarray) -> float:
    """The largest difference over the largest expected entry; infinite where something is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    difference = np.abs(actual - expected)
    if actual.shape != expected.shape or not np.isfinite(difference).all():
        return np.inf
    scale = np.abs(expected).max()
    return float(difference.max() / (scale if scale > 0 else 1.0))


def example_inputs(dtype: DataType, layer: str = PLAIN) -> dict[str, np.ndarray]:
    """Arrays that overflow experts, with padding and a group of padding alone, exact in ``dtype``.

    Rows are groups. Where a group is of several sequences, each of them ends with its share of the padding.
    """
    random, form = np.random.default_rng(0), LAYERS[layer]
    # As even parts as there are of 10, 7, 0 and 9, the larger ones first.
    real = (np.array([10, 7, 0, 9])[:, None] + np.arange(form.sequences)[::-1]) // form.sequences

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(values, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)

    inputs = {
        "x": rounded(random.normal(size=(BATCH, LENGTH, FEATURES)) + 0.5),
        "router": rounded(random.normal(size=(FEATURES, EXPERTS))),
        "cotangent": rounded(random.normal(size=(BATCH, LENGTH, FEATURES))),
        "mask": (np.arange(LENGTH // form.sequences) < real[..., None]).reshape(BATCH, LENGTH),
        "tokens": random.integers(1, 100, (BATCH, LENGTH)),
    }
    shapes = {**dict.fromkeys(form.into, (FEATURES, HIDDEN)), "wo": (HIDDEN, FEATURES)}
    for name, shape in shapes.items():
        inputs[name] = rounded(random.normal(size=(EXPERTS, *shape)) / 2)
        if form.num_shared_experts:
            inputs[f"shared/{name}"] = rounded(random.normal(size=shape) / 2)
    return inputs


@functools.cache
def expected_values(
    router: str, dtype: DataType, layer: str = PLAIN, *, has_capacity: bool = True
) -> dict[str, np.ndarray]:
    """The oracle's output, losses, statistics, routes, slots and gradients on :func:`example_inputs`."""
    inputs = example_inputs(dtype, layer)
    capacity = None if not has_capacity else CAPACITY if LAYERS[layer].train else EVALUATION_CAPACITY
    spec: Router = ROUTERS[router]
    shape = (BATCH, LENGTH, EXPERTS)
    example = Example(inputs["mask"], inputs["tokens"], capacity, BIAS, draws())

    def evaluated(arrays: dict[str, np.ndarray]) -> Evaluation:
        return evaluate(LAYERS[layer], spec, arrays, example)

    def scalar(arrays: dict[str, np.ndarray]) -> Any:
        found = evaluated(arrays)
        losses = sum(LOSS_WEIGHTS[name] * value for name, value in found.losses.items())
        return (found.output * inputs["cotangent"]).sum() + losses

    arrays = {name: value for name, value in inputs.items() if name not in ("cotangent", "mask", "tokens")}
    found = evaluated(arrays)
    gradients = oracle.gradients(scalar, arrays)
    if spec.probs is None:
        del gradients["router"]
    return {
        "output": found.output,
        **expected_places(found.routes, shape, has_slots=has_capacity),
        **found.losses,
        **found.statistics,
        **{f"gradient of {name}": value for name, value in gradients.items()},
    }


@functools.cache
def draws() -> Draws:
    """What :data:`KEY` draws, by the functions that draw it in a layer."""
    keys, tokens = layer_keys(KEY), (BATCH, LENGTH)
    assert keys.choice is not None and keys.input is not None
    drawn = {
        "normal": jax.random.normal(keys.choice, (*tokens, EXPERTS)),
        "gumbel": jax.random.gumbel(keys.choice, (*tokens, EXPERTS)),
        "uniform": jax.random.uniform(keys.choice, tokens),
        "expert": jax.random.randint(keys.choice, tokens, 0, EXPERTS),
        "jitter": jax.random.uniform(keys.input, (*tokens, FEATURES), minval=-1.0, maxval=1.0),
    }
    return Draws(**{name: np.asarray(values, np.float64) for name, values in drawn.items()})


def actual_values(cell: Cell, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layer's output, losses, statistics, routes, slots and gradients."""
    form, mesh = LAYERS[cell.layer], make_mesh(MESHES[cell.mesh])
    graph, params = nnx.split(make_layer(ROUTERS[cell.router].config, cell.dispatch, inputs, form))
    params = jax.tree.map(lambda leaf: _placed(mesh, leaf), params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    shape = (BATCH * form.sequences, LENGTH // form.sequences)
    arrays = {
        name: _place(
            mesh,
            inputs[name].reshape(*shape, *inputs[name].shape[2:]),
            cell.dtype if name in ("x", "cotangent") else None,
        )
        for name in ("x", "cotangent", "mask", "tokens")
    }
    rng = None if form.drawn is None else KEY

    def scalar(params: Any, x: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        layer, mask, tokens = nnx.merge(graph, params), arrays["mask"], arrays["tokens"]
        output, stats = layer(x, mask, tokens=tokens, sequences=form.sequences, train=form.train, rng=rng)
        losses = sum((weight * getattr(stats, name) for name, weight in LOSS_WEIGHTS.items()), jnp.zeros(()))
        product = output.astype(jnp.float32) * arrays["cotangent"].astype(jnp.float32)
        seen = jnp.where(mask[..., None], x, 0) if form.padding == "zeroed" else x
        seen, mask, tokens = (array.reshape(BATCH, LENGTH, *array.shape[2:]) for array in (seen, mask, tokens))
        routing, _ = layer.route(seen, mask, tokens, train=form.train, keys=layer_keys(rng))
        return jnp.sum(product) + losses, (output, stats, routing.assignment)

    # Accelerators multiply float32 in fewer bits unless asked; what is compared here is the layer and not that choice.
    with partitioned(mesh), jax.default_matmul_precision("highest"):
        step = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
        (_, (output, stats, chosen)), (d_params, d_x) = step(params, arrays["x"], arrays)
    gradients = nnx.to_pure_dict(d_params)
    names = ["tokens", "expert_load", "dropped", "router_entropy", "router_confidence", *LOSS_WEIGHTS]
    return {
        "output": _by_group(output),
        **found_places(chosen),
        **{name: np.asarray(getattr(stats, name)) for name in names},
        "gradient of x": _by_group(d_x),
        **{f"gradient of {name}": np.asarray(value) for name, value in gradients["experts"].items()},
        **{f"gradient of shared/{name}": np.asarray(v) for name, v in gradients.get("shared_experts", {}).items()},
        **({"gradient of router": np.asarray(gradients["router"])} if "router" in gradients else {}),
    }


def make_layer(
    config: RouterConfig, dispatch: DispatchMethod, inputs: dict[str, np.ndarray], form: Layer = LAYERS[PLAIN]
) -> SwitchFeedForward:
    """The layer with the example's parameters."""
    moe = MoEConfig(
        EXPERTS,
        group_size=LENGTH,
        train_capacity_factor=CAPACITY_FACTOR,
        eval_capacity_factor=EVALUATION_CAPACITY_FACTOR,
        min_expert_capacity=1,
        router=config,
        dispatch=dispatch,
    )
    layer = SwitchFeedForward(form.adapt(moe), FEATURES, HIDDEN, form.activations, "paper", rngs=nnx.Rngs(0))
    for name in (*form.into, "wo"):
        getattr(layer.experts, name)[...] = jnp.asarray(inputs[name], jnp.float32)
        if form.num_shared_experts:
            getattr(layer.shared_experts, name)[...] = jnp.asarray(inputs[f"shared/{name}"], jnp.float32)
    if config.has_kernel:
        layer.router[...] = jnp.asarray(inputs["router"], jnp.float32)
    if config.has_bias:
        layer.router_bias[...] = jnp.asarray(BIAS, jnp.float32)
    return layer


def _by_group(rows: jax.Array) -> np.ndarray:
    return np.asarray(rows, np.float64).reshape(BATCH, LENGTH, -1)


def _placed(mesh: Mesh, param: nnx.Param) -> Any:
    sharding = named_sharding(mesh, param.get_metadata()["axes"], param.shape)
    return param.replace(jax.device_put(param[...], sharding))


def _place(mesh: Mesh, values: np.ndarray, dtype: DataType | None) -> jax.Array:
    axes = ("batch", *[None] * (values.ndim - 1))
    array = jnp.asarray(values, dtype or (bool if values.dtype == bool else jnp.int32))
    return jax.device_put(array, named_sharding(mesh, axes, array.shape))
