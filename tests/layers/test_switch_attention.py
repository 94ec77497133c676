"""Sparse attention against a walk over its tokens in float64, and against the dense layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.attention import PROJECTIONS, Attention, Projection, mask_bias
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.switch_attention import SPARSE_PROJECTIONS, SwitchAttention, routed_together
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import named_sharding, partitioned
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array

BATCH, LENGTH, FEATURES, HEADS, KV, EXPERTS = 4, 6, 5, 2, 3, 4
SEQUENCES = 2
CONFIG = MoEConfig(EXPERTS, group_size=12, train_capacity_factor=1.0, eval_capacity_factor=8.0, min_expert_capacity=1)
CAPACITY = 3
PAPER: tuple[Projection, ...] = ("query", "key", "value")
SUBSETS: list[tuple[Projection, ...]] = [PAPER, ("value", "query"), ("key", "out"), ("out", "value", "key", "query")]


def make_layer(
    sparse: tuple[Projection, ...] = PAPER,
    config: MoEConfig = CONFIG,
    *,
    sizes: tuple[int, int, int] = (FEATURES, HEADS, KV),
    **fields: Any,
) -> SwitchAttention:
    """A layer whose routers are decided enough to load their experts unevenly."""
    layer = SwitchAttention(config, sparse, *sizes, "t5x", rngs=nnx.Rngs(0), **fields)
    random = np.random.default_rng(1)
    for names in layer.routed:
        router = getattr(layer, "_".join(names)).router
        router[...] = jnp.asarray(random.normal(size=router[...].shape), jnp.float32)
    return layer


def given(dtype: Any = jnp.float32, features: int = FEATURES, heads: int = HEADS) -> tuple[Array, Array, Array]:
    """Tokens, which of them are real, and a position bias."""
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH, LENGTH, features)) + 0.3
    real = np.arange(LENGTH) < np.asarray([[LENGTH], [4], [1], [LENGTH - 1]])
    positions = random.normal(size=(1, heads, LENGTH, LENGTH))
    return jnp.asarray(x, dtype), jnp.asarray(real), jnp.asarray(positions, jnp.float32)


def apply(
    layer: SwitchAttention,
    x: Array,
    real: Array,
    positions: Array,
    *,
    train: bool = True,
    rate: float = 0.0,
    rng: Array | None = None,
) -> tuple[Array, tuple[RouterStats, ...]]:
    return layer(
        x,
        mask_bias(real, real, causal=True),
        positions,
        real=real,
        tokens=jnp.ones(real.shape, jnp.int32),
        sequences=SEQUENCES,
        train=train,
        dropout_rate=rate,
        rng=rng,
    )


jitted = nnx.jit(apply, static_argnames=("train", "rate"))


def walk_projection(layer: Any, x: np.ndarray, real: np.ndarray, capacity: int) -> tuple[list[np.ndarray], int]:
    """Each kernel's ``[B, L, ...]`` and the dropped tokens: the tokens of a group in turn, in float64."""
    router = np.asarray(layer.router[...], np.float64)
    kernels = [np.asarray(getattr(layer.experts, name)[...], np.float64) for name in layer.experts.names]
    kernels = [kernel.reshape(EXPERTS, x.shape[-1], -1) for kernel in kernels]
    outputs = [np.zeros((*x.shape[:2], kernel.shape[-1])) for kernel in kernels]
    dropped = 0
    for first in range(0, BATCH, SEQUENCES):
        used = [0] * EXPERTS
        for row in range(first, first + SEQUENCES):
            for place in np.flatnonzero(real[row]):
                logits = x[row, place] @ router
                probs = np.exp(logits) / np.exp(logits).sum()
                expert = int(np.argmax(probs))
                if used[expert] == capacity:
                    dropped += 1
                    continue
                used[expert] += 1
                for output, kernel in zip(outputs, kernels, strict=True):
                    output[row, place] = probs[expert] * (x[row, place] @ kernel[expert])
    return outputs, dropped


def walk(
    layer: SwitchAttention, x: Array, real: Array, positions: Array, capacity: int
) -> tuple[np.ndarray, list[int]]:
    """The layer's output, and the tokens that each of its routers dropped."""
    tokens, mask = np.asarray(x, np.float64), np.asarray(real)
    made: dict[str, np.ndarray] = {}
    drops = []
    for names in layer.routed:
        if names != ("out",):
            outputs, dropped = walk_projection(getattr(layer, "_".join(names)), tokens, mask, capacity)
            made |= dict(zip(names, outputs, strict=True))
            drops.append(dropped)
    for name in ("query", "key", "value"):
        if name not in made:
            made[name] = tokens @ np.asarray(getattr(layer, name)[...], np.float64).reshape(tokens.shape[-1], -1)
    query, key, value = (made[name].reshape(BATCH, LENGTH, HEADS, KV) for name in ("query", "key", "value"))
    context = np.zeros((BATCH, LENGTH, HEADS, KV))
    for b, h, q in np.ndindex(BATCH, HEADS, LENGTH):
        seen = [t for t in range(q + 1) if mask[b, t] and mask[b, q]]
        if seen:
            logits = np.asarray([query[b, q, h] @ key[b, t, h] + float(positions[0, h, q, t]) for t in seen])
            weights = np.exp(logits - logits.max())
            context[b, q, h] = sum(w * value[b, t, h] for w, t in zip(weights / weights.sum(), seen, strict=True))
    joined = context.reshape(BATCH, LENGTH, -1)
    if layer.routed[-1] != ("out",):
        return joined @ np.asarray(layer.out[...], np.float64).reshape(HEADS * KV, -1), drops  # type: ignore[union-attr]
    outputs, dropped = walk_projection(layer.out, joined, mask, capacity)
    return outputs[0], [*drops, dropped]


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
@pytest.mark.parametrize("sparse", SUBSETS, ids="+".join)
def test_the_layer_equals_a_walk_over_its_tokens(sparse: tuple[Projection, ...], dispatch: Any) -> None:
    layer = make_layer(sparse, dataclasses.replace(CONFIG, dispatch=dispatch))
    x, real, positions = given()
    expected, drops = walk(layer, x, real, positions, BATCH * LENGTH if dispatch == "dropless" else CAPACITY)
    assert (sum(drops) == 0) == (dispatch == "dropless")
    output, stats = jitted(layer, x, real, positions)
    # Nothing is asked of padding, which sees no key.
    np.testing.assert_allclose(np.asarray(output)[real], expected[real], rtol=1e-4, atol=1e-5)
    assert [int(layer_stats.dropped) for layer_stats in stats] == drops
    assert [float(layer_stats.tokens) for layer_stats in stats] == [float(real.sum())] * len(layer.routed)


def test_key_and_value_share_a_router_and_come_in_the_stated_order() -> None:
    assert routed_together(("value", "out", "key", "query")) == (("query",), ("key", "value"), ("out",))
    assert routed_together(("out", "value")) == (("value",), ("out",))
    for sparse in SUBSETS:
        names = ["_".join(group) for group in routed_together(sparse)]
        assert names == [name for name in SPARSE_PROJECTIONS if name in names]
    layer = make_layer()
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert set(params) == {"query", "key_value", "out"}
    assert set(params["key_value"]) == {"router", "experts"}
    assert {name: kernel.shape for name, kernel in params["key_value"]["experts"].items()} == {
        "key": (EXPERTS, FEATURES, HEADS, KV),
        "value": (EXPERTS, FEATURES, HEADS, KV),
    }


@pytest.mark.parametrize("sparse", SUBSETS, ids="+".join)
def test_one_expert_with_room_for_all_is_plain_attention(sparse: tuple[Projection, ...]) -> None:
    layer = make_layer(sparse, MoEConfig(1, group_size=12, train_capacity_factor=2.0))
    plain = Attention(FEATURES, HEADS, KV, "t5x", rngs=nnx.Rngs(5))
    for name in PROJECTIONS:
        getattr(plain, name)[...] = (
            next(getattr(layer, "_".join(names)).experts for names in layer.routed if name in names).__dict__[name][0]
            if name in sparse
            else getattr(layer, name)[...]
        )
    x, real, positions = given()
    # The same dropout too; jitter only moves a probability that is 1.
    key = jax.random.key(3)
    output, _ = jitted(layer, x, real, positions, rate=0.5, rng=key)
    mask = mask_bias(real, real, causal=True)
    expected = nnx.jit(functools.partial(Attention.__call__, dropout_rate=0.5))(plain, x, x, mask, positions, rng=key)
    np.testing.assert_allclose(np.asarray(output)[real], np.asarray(expected)[real], rtol=1e-5, atol=1e-6)


def test_experts_start_as_plain_attention_does() -> None:
    sizes = (32, 4, 16)
    layer = SwitchAttention(CONFIG, PROJECTIONS, *sizes, "paper", rngs=nnx.Rngs(0))
    plain = Attention(*sizes, "paper", rngs=nnx.Rngs(1))
    for names in layer.routed:
        for name in names:
            experts = np.asarray(getattr(getattr(layer, "_".join(names)).experts, name)[...])
            np.testing.assert_allclose(experts.std((1, 2, 3)), np.asarray(getattr(plain, name)[...]).std(), rtol=0.1)


def test_a_later_token_changes_nothing_before_it() -> None:
    layer = make_layer(PROJECTIONS, dataclasses.replace(CONFIG, group_size="sequence", expert_capacity=2))
    x, real, positions = given()
    other = x.at[:, 3:].add(1.0)
    one, another = (jitted(layer, tokens, real, positions)[0] for tokens in (x, other))
    np.testing.assert_allclose(one[:, :3], another[:, :3], rtol=1e-6, atol=1e-7)
    assert not np.allclose(one[:, 3:], another[:, 3:])


@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
def test_gradients_reach_every_router_and_expert(dispatch: Any) -> None:
    layer = make_layer(PROJECTIONS, dataclasses.replace(CONFIG, dispatch=dispatch))
    graph, params = nnx.split(layer)
    x, real, positions = given()

    @jax.jit
    @jax.grad
    def gradient(params: nnx.State) -> Array:
        output, _ = apply(nnx.merge(graph, params), x, real, positions)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(output), 0))

    found = nnx.to_pure_dict(gradient(params))
    for names in layer.routed:
        of_layer = found["_".join(names)]
        assert np.abs(of_layer["router"]).sum() > 0
        for kernel in of_layer["experts"].values():
            assert (np.abs(np.asarray(kernel)).sum((1, 2, 3)) > 0).sum() > 1


def test_gradients_are_the_walks_differences() -> None:
    layer = make_layer(PROJECTIONS)
    graph, params = nnx.split(layer)
    x, real, positions = given()
    at = {**nnx.to_pure_dict(params), "x": x}

    def layer_of(values: dict[str, Any]) -> SwitchAttention:
        state = nnx.clone(params)
        nnx.replace_by_pure_dict(state, {name: value for name, value in values.items() if name != "x"})
        return nnx.merge(graph, state)

    def of_walk(values: dict[str, Any]) -> float:
        return float(np.sin(walk(layer_of(values), values["x"], real, positions, CAPACITY)[0])[np.asarray(real)].sum())

    @jax.jit
    @jax.grad
    def gradient(values: dict[str, Any]) -> Array:
        output, _ = apply(layer_of(values), values["x"], real, positions)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(output), 0))

    found, random = gradient(at), np.random.default_rng(2)
    for name in at:
        # So small a step that no token is routed elsewhere.
        step = jax.tree.map(lambda leaf: jnp.asarray(1e-3 * random.normal(size=leaf.shape), jnp.float32), at[name])
        before, after = ({**at, name: jax.tree.map(add, at[name], step)} for add in (jnp.subtract, jnp.add))
        moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), after, before)
        products = jax.tree.map(lambda slope, by: float(np.sum(np.asarray(slope, np.float64) * by)), found, moved)
        expected = of_walk(after) - of_walk(before)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-3, err_msg=name)


def test_experts_in_float32_round_once_in_a_bfloat16_model() -> None:
    x, real, positions = given(jnp.bfloat16)
    seen = {}
    for dtype in ("float32", "bfloat16"):
        layer = make_layer(("query",), dataclasses.replace(CONFIG, dispatch="gather"), expert_dtype=dtype)
        output, _ = jitted(layer, x, real, positions)
        assert output.dtype == jnp.bfloat16
        experts = layer.query.experts  # type: ignore[union-attr]
        rows = jnp.broadcast_to(x.reshape(-1, FEATURES), (EXPERTS, BATCH * LENGTH, FEATURES))
        seen[dtype] = np.asarray(experts(rows), np.float64)
        exact = np.einsum("end,edhk->enhk", np.asarray(rows, np.float64), np.asarray(experts.query[...], np.float64))
    exact = exact.reshape(seen["float32"].shape)
    errors = {dtype: np.abs(values - exact) / np.abs(exact) for dtype, values in seen.items()}
    # Half a unit of bfloat16's last place is 2**-9 of the number at the most; rounded kernels do worse.
    assert errors["float32"].max() <= 2**-8
    assert errors["bfloat16"].max() > 2**-8


MESHES = {
    "data 2, expert 2, model 2": MeshConfig(num_expert_partitions=2, num_model_partitions=2),
    "expert 4, model 2": MeshConfig(num_expert_partitions=4, num_model_partitions=2),
}


@pytest.mark.multidevice
@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
@pytest.mark.parametrize(
    "name", ["data 2, expert 2, model 2", pytest.param("expert 4, model 2", marks=pytest.mark.slow)]
)
def test_every_mesh_computes_what_one_device_does(name: str, dispatch: Any) -> None:
    config = dataclasses.replace(CONFIG, dispatch=dispatch, group_size="sequence")
    layer = make_layer(PROJECTIONS, config, sizes=(8, 4, 2))
    graph, params = nnx.split(layer)
    x, real, positions = given(features=8, heads=4)

    def loss(params: nnx.State, x: Array) -> tuple[Array, Any]:
        output, stats = apply(nnx.merge(graph, params), x, real, positions)
        balance = sum(layer_stats.load_balance_loss for layer_stats in stats)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(output), 0)) + balance, stats

    gradient = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    reference = jax.jit(gradient(loss))(params, x)
    mesh = make_mesh(MESHES[name])

    def place(param: nnx.Param) -> Any:
        sharding = named_sharding(mesh, param.get_metadata()["axes"], param.shape)
        return param.replace(jax.device_put(param[...], sharding))

    placed = jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    with partitioned(mesh):
        found = jax.jit(gradient(loss))(placed, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, reference)
