"""The sparse layer beside the oracle: every router, dispatch, dtype and mesh, compared in every quantity.

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
from switch_t5.conformance.routers import ROUTERS
from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import named_sharding, partitioned
from switch_t5.routing.dispatch import DISPATCHERS, DispatchMethod
from switch_t5.routing.router import RouterConfig

BATCH, LENGTH, FEATURES, HIDDEN, EXPERTS = 4, 10, 4, 4, 8
CAPACITY_FACTOR = 1.0
CAPACITY = 2
"""Of a group of one sequence: 10 x 1.0 / 8, raised to the least capacity; tokens are dropped all the same."""

DataType = Literal["float32", "bfloat16"]
BOUNDS: dict[DataType, float] = {"float32": 2e-5, "bfloat16": 3e-2}
"""Relative to the largest entry. bfloat16 has 8 bits, and the experts two products in a row."""

LOSS_WEIGHTS = {"load_balance_loss": 0.5, "router_z_loss": 0.25, "importance_loss": 0.125}
"""Of the losses, in the scalar whose gradient is compared; large, so that none can hide."""

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


@dataclasses.dataclass(frozen=True)
class Result:
    """What a cell showed.

    Attributes:
      cell: which.
      errors: the worst error of each quantity, relative to its largest entry.
      bound: what they may be.
    """

    cell: Cell
    errors: dict[str, float]
    bound: float

    @property
    def worst(self) -> tuple[str, float]:
        """The quantity with the largest error."""
        return max(self.errors.items(), key=lambda item: item[1])

    @property
    def is_green(self) -> bool:
        """Whether every quantity is within the bound."""
        return all(error <= self.bound for error in self.errors.values())


def cells(device_count: int) -> Iterator[Cell]:
    """Every cell that so many devices can run."""
    for mesh, config in MESHES.items():
        if (config.num_devices or 1) > device_count:
            continue
        for router in ROUTERS:
            for dispatch in dispatches(router):
                for dtype in BOUNDS:
                    yield Cell(router, dispatch, dtype, mesh)


def dispatches(router: str) -> tuple[DispatchMethod, ...]:
    """The methods that a router can do with."""
    return tuple(DISPATCHERS) if ROUTERS[router].config.needs_capacity else (*DISPATCHERS, "dropless")


def check(cell: Cell) -> Result:
    """Runs a cell's layer and its gradient, and compares them with the oracle's."""
    inputs = example_inputs(cell.dtype)
    expected = expected_values(cell.router, cell.dtype, None if cell.dispatch == "dropless" else CAPACITY)
    actual = actual_values(cell, inputs)
    errors = {name: relative_error(actual[name], value) for name, value in expected.items()}
    return Result(cell, errors, BOUNDS[cell.dtype])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected entry; infinite where something is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    difference = np.abs(actual - expected)
    if actual.shape != expected.shape or not np.isfinite(difference).all():
        return np.inf
    scale = np.abs(expected).max()
    return float(difference.max() / (scale if scale > 0 else 1.0))


def example_inputs(dtype: DataType) -> dict[str, np.ndarray]:
    """Arrays that overflow experts, with padding and a sequence of padding alone, exact in ``dtype``."""
    random = np.random.default_rng(0)

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(values, jnp.float32).astype(dtype).astype(jnp.float32), np.float64)

    mask = np.arange(LENGTH) < np.array([10, 7, 0, 9])[:, None]
    return {
        "x": rounded(random.normal(size=(BATCH, LENGTH, FEATURES)) + 0.5),
        "router": rounded(random.normal(size=(FEATURES, EXPERTS))),
        "wi": rounded(random.normal(size=(EXPERTS, FEATURES, HIDDEN)) / 2),
        "wo": rounded(random.normal(size=(EXPERTS, HIDDEN, FEATURES)) / 2),
        "cotangent": rounded(random.normal(size=(BATCH, LENGTH, FEATURES))),
        "mask": mask,
        "tokens": random.integers(1, 100, (BATCH, LENGTH)),
    }


@functools.cache
def expected_values(router: str, dtype: DataType, capacity: int | None = CAPACITY) -> dict[str, np.ndarray]:
    """The oracle's output, losses, statistics and gradients on :func:`example_inputs`."""
    inputs = example_inputs(dtype)
    spec, mask, tokens = ROUTERS[router], inputs["mask"], inputs["tokens"]

    def evaluate(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], np.ndarray, list[oracle.Route]]:
        logits = arrays["x"] @ arrays["router"]
        routes = spec.routes(logits, mask, tokens, capacity, BIAS)
        output = oracle.combine(arrays["x"], routes, (arrays["wi"],), arrays["wo"], ("relu",))
        return {"output": output, **spec.losses(logits, mask, routes)}, logits, routes

    def scalar(arrays: dict[str, np.ndarray]) -> Any:
        values, _, _ = evaluate(arrays)
        losses = sum(weight * values[name] for name, weight in LOSS_WEIGHTS.items())
        return (values["output"] * inputs["cotangent"]).sum() + losses

    arrays = {name: inputs[name] for name in ("x", "router", "wi", "wo")}
    values, logits, routes = evaluate(arrays)
    gradients = oracle.gradients(scalar, arrays)
    if spec.probs is None:
        del gradients["router"]
    return {
        **values,
        **spec.statistics(logits, mask, routes),
        **{f"gradient of {name}": value for name, value in gradients.items()},
    }


def actual_values(cell: Cell, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layer's output, losses, statistics and gradients."""
    spec, mesh = ROUTERS[cell.router], make_mesh(MESHES[cell.mesh])
    layer = make_layer(spec.config, cell.dispatch, inputs)
    graph, params = nnx.split(layer)
    params = jax.tree.map(lambda leaf: _placed(mesh, leaf), params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    arrays = {
        name: _place(mesh, inputs[name], cell.dtype if name in ("x", "cotangent") else None)
        for name in ("x", "cotangent", "mask", "tokens")
    }

    def scalar(params: Any, x: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        output, stats = nnx.merge(graph, params)(
            x, arrays["mask"], tokens=arrays["tokens"], sequences=1, train=True, rng=None
        )
        losses = sum((weight * getattr(stats, name) for name, weight in LOSS_WEIGHTS.items()), jnp.zeros(()))
        product = output.astype(jnp.float32) * arrays["cotangent"].astype(jnp.float32)
        return jnp.sum(product) + losses, (output, stats)

    with partitioned(mesh):
        step = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
        (_, (output, stats)), (d_params, d_x) = step(params, arrays["x"], arrays)
    gradients = nnx.to_pure_dict(d_params)
    names = ["tokens", "expert_load", "dropped", "router_entropy", "router_confidence", *LOSS_WEIGHTS]
    return {
        "output": np.asarray(output, np.float64),
        **{name: np.asarray(getattr(stats, name)) for name in names},
        "gradient of x": np.asarray(d_x, np.float64),
        "gradient of wi": np.asarray(gradients["experts"]["wi"]),
        "gradient of wo": np.asarray(gradients["experts"]["wo"]),
        **({"gradient of router": np.asarray(gradients["router"])} if "router" in gradients else {}),
    }


def make_layer(config: RouterConfig, dispatch: DispatchMethod, inputs: dict[str, np.ndarray]) -> SwitchFeedForward:
    """The layer with the example's parameters."""
    moe = MoEConfig(
        EXPERTS,
        group_size=LENGTH,
        train_capacity_factor=CAPACITY_FACTOR,
        min_expert_capacity=CAPACITY,
        router=config,
        jitter_noise=0.0,
        dispatch=dispatch,
    )
    layer = SwitchFeedForward(moe, FEATURES, HIDDEN, ("relu",), "paper", rngs=nnx.Rngs(0))
    layer.experts.wi[...] = jnp.asarray(inputs["wi"], jnp.float32)
    layer.experts.wo[...] = jnp.asarray(inputs["wo"], jnp.float32)
    if config.has_kernel:
        layer.router[...] = jnp.asarray(inputs["router"], jnp.float32)
    if config.has_bias:
        layer.router_bias[...] = jnp.asarray(BIAS, jnp.float32)
    return layer


def _placed(mesh: Mesh, param: nnx.Param) -> Any:
    sharding = named_sharding(mesh, param.get_metadata()["axes"], param.shape)
    return param.replace(jax.device_put(param[...], sharding))


def _place(mesh: Mesh, values: np.ndarray, dtype: DataType | None) -> jax.Array:
    axes = ("batch", *[None] * (values.ndim - 1))
    array = jnp.asarray(values, dtype or (bool if values.dtype == bool else jnp.int32))
    return jax.device_put(array, named_sharding(mesh, axes, array.shape))
