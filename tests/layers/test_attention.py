"""Attention against a plain softmax in float64, in value and gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers import attention
from switch_t5.layers.attention import MASKED, Attention, attend, mask_bias
from switch_t5.types import Array
from tests.jaxprs import equations

BATCH, HEADS, QUERIES, KEYS, FEATURES = 3, 2, 7, 9, 4


def plain_attend(query: Array, key: Array, value: Array, visible: Array, positions: Array | None) -> Array:
    """Softmax over the visible keys; a query that sees none gets zero."""
    logits = jnp.einsum("bhqk,bhtk->bhqt", query, key)
    logits = logits if positions is None else logits + positions
    some = visible.any(-1, keepdims=True)
    logits = jnp.where(visible, logits, jnp.where(some, -jnp.inf, 0.0))
    return jnp.einsum("bhqt,bhtk->bhqk", jax.nn.softmax(logits) * some, value)


def visibility(case: str, queries: int, keys: int) -> np.ndarray:
    """``[B, 1, Q, T]`` bool for one kind of mask."""
    random = np.random.default_rng(4)
    real_queries = np.arange(queries) < np.asarray([queries, queries - 2, 3])[:, None]
    real_keys = np.arange(keys) < np.asarray([keys, 4, 2])[:, None]
    visible = np.ones((BATCH, queries, keys), bool)
    if case in ("padded", "packed"):
        visible &= real_queries[:, :, None] & real_keys[:, None, :]
    if case == "packed":
        segments = np.sort(random.integers(1, 4, (BATCH, max(queries, keys))), axis=-1)
        visible &= segments[:, :queries, None] == segments[:, None, :keys]
    if case == "causal":
        visible &= np.tri(queries, keys, dtype=bool)
    return visible[:, None]


@pytest.mark.parametrize("case", ["everything", "padded", "packed", "causal"])
@pytest.mark.parametrize("copies", [0, 1, BATCH], ids=lambda copies: f"{copies} position biases")
def test_attend_equals_a_float64_softmax_in_value_and_gradient(case: str, copies: int) -> None:
    random = np.random.default_rng(0)
    queries, keys = (KEYS, KEYS) if case == "causal" else (QUERIES, KEYS)
    shapes = [(BATCH, HEADS, queries, FEATURES), *[(BATCH, HEADS, keys, FEATURES)] * 2, (copies, HEADS, queries, keys)]
    arrays = [random.normal(size=shape).astype(np.float32) for shape in shapes[: 4 if copies else 3]]
    visible = visibility(case, queries, keys)
    # Nothing is asked of the queries that see no key: they are padding.
    asked = visible.any(-1, keepdims=True)
    cotangent = random.normal(size=shapes[0]).astype(np.float32) * asked
    bias = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)

    def ours(*arrays: Array) -> Array:
        query, key, value = arrays[:3]
        return attend(query, key, value, bias, arrays[3] if copies else None)

    def plain(*arrays: Array) -> Array:
        query, key, value = arrays[:3]
        return plain_attend(query, key, value, jnp.asarray(visible), arrays[3] if copies else None)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, arrays, cotangent):
        value, pull = jax.vjp(function, *arrays)
        return value, pull(cotangent)

    value, gradients = value_and_gradients(ours, arrays, cotangent)
    with jax.enable_x64(True):
        arrays64 = [array.astype(np.float64) for array in arrays]
        expected, expected_gradients = value_and_gradients(plain, arrays64, cotangent.astype(np.float64))
        expected, expected_gradients = jax.device_get((expected, expected_gradients))
    assert expected.dtype == np.float64
    np.testing.assert_allclose(value * asked, expected, rtol=1e-5, atol=1e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copies", [0, 1], ids=lambda copies: f"{copies} position biases")
def test_without_a_derivative_a_cpu_attends_one_sequence_at_a_time(
    copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(2)
    shapes = [(BATCH, HEADS, QUERIES, FEATURES), *[(BATCH, HEADS, KEYS, FEATURES)] * 2, (1, HEADS, QUERIES, KEYS)]
    query, key, value, positions = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes)
    bias = jnp.where(visibility("padded", QUERIES, KEYS), 0.0, MASKED)
    arguments = query, key, value, bias, positions if copies else None

    def loops() -> bool:
        program = jax.make_jaxpr(lambda *arguments: attend(*arguments))(*arguments)  # Not one traced before.
        return any(equation.primitive.name == "scan" for equation in equations(program))

    expected, looped = attend(*arguments), loops()
    monkeypatch.setattr(attention, "_LARGE_LOGITS", HEADS * QUERIES * KEYS)
    assert (looped, loops()) == (False, True)
    np.testing.assert_allclose(attend(*arguments), expected, rtol=1e-6)


def test_a_query_that_sees_no_key_gets_the_finite_mean_of_all_values() -> None:
    random = np.random.default_rng(1)
    query, key, value = (jnp.asarray(random.normal(size=(1, 1, 3, 4)), jnp.float32) for _ in range(3))
    bias = jnp.full((1, 1, 3, 3), MASKED).at[0, 0, 0].set(0)
    context = attend(query, key, value, bias, None)
    np.testing.assert_allclose(context[0, 0, 1:], np.broadcast_to(value.mean(2)[0, 0], (2, 4)), rtol=1e-6)


def test_a_key_that_is_not_seen_gets_exactly_no_weight_and_no_gradient() -> None:
    random = np.random.default_rng(2)
    query, key, value = (jnp.asarray(random.normal(size=(1, 1, 3, 4)), jnp.float32) for _ in range(3))
    bias = jnp.zeros((1, 1, 3, 3)).at[..., 2].set(MASKED)
    value = value.at[:, :, 2].set(1e30)
    context, pull = jax.vjp(lambda k, v: attend(query, k, v, bias, None), key, value)
    assert np.abs(np.asarray(context)).max() < 1e3
    d_key, d_value = pull(jnp.ones_like(context))
    np.testing.assert_array_equal(d_value[:, :, 2], 0)
    np.testing.assert_array_equal(d_key[:, :, 2], 0)


def test_attention_is_not_divided_by_the_root_of_the_head_size() -> None:
    query = jnp.asarray([[[[2.0, 0.0]]]])
    key = jnp.asarray([[[[1.0, 0.0], [0.0, 0.0]]]])
    value = jnp.asarray([[[[1.0, 0.0], [0.0, 1.0]]]])
    context = attend(query, key, value, jnp.zeros((1, 1, 1, 2)), None)
    share = np.exp(2) / (np.exp(2) + 1)
    np.testing.assert_allclose(context[0, 0, 0], [share, 1 - share], rtol=1e-6)


def test_very_large_logits_neither_overflow_nor_lose_their_order() -> None:
    query, key = jnp.full((1, 1, 1, 1), 1e4), jnp.asarray([[[[1e4], [9.999e3]]]])
    context = attend(query, key, jnp.asarray([[[[1.0], [2.0]]]]), jnp.zeros((1, 1, 1, 2)), None)
    np.testing.assert_array_equal(context, [[[[1.0]]]])


def test_bfloat16_attention_takes_its_softmax_in_float32() -> None:
    """The sum of 1000 equal weights would stop at 256 in bfloat16."""
    keys = 1000
    query = jnp.zeros((1, 1, 1, 2), jnp.bfloat16)
    key, value = jnp.zeros((1, 1, keys, 2), jnp.bfloat16), jnp.ones((1, 1, keys, 2), jnp.bfloat16)
    context = attend(query, key, value, jnp.zeros((1, 1, 1, keys)), None)
    assert context.dtype == jnp.bfloat16
    np.testing.assert_array_equal(context, jnp.ones((1, 1, 1, 2), jnp.bfloat16))


def test_mask_bias_by_hand() -> None:
    queries, keys = jnp.asarray([[True, True, True, False]]), jnp.asarray([[True, True, True, False]])
    segments = jnp.asarray([[1, 1, 2, 0]])
    seen = mask_bias(queries, keys, query_segments=segments, key_segments=segments) == 0
    np.testing.assert_array_equal(seen[0, 0], [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    seen = mask_bias(queries, keys, causal=True) == 0
    np.testing.assert_array_equal(seen[0, 0], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    bias = mask_bias(queries, keys, query_segments=segments, key_segments=segments, causal=True)
    assert bias.shape == (1, 1, 4, 4)
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0, 0] == 0, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(np.unique(bias), np.asarray([MASKED, 0], np.float32))


def attention_layer(emb_dim: int = 6, num_heads: int = 2, head_dim: int = 3) -> Attention:
    return Attention(emb_dim, num_heads, head_dim, "t5x", rngs=nnx.Rngs(0))


def test_the_layer_projects_attends_and_projects_back() -> None:
    layer = attention_layer()
    random = np.random.default_rng(3)
    x, memory = random.normal(size=(2, 4, 6)), random.normal(size=(2, 5, 6))
    visible = random.random((2, 1, 4, 5)) < 0.7
    visible[..., 0] = True
    positions = random.normal(size=(1, 2, 4, 5))
    kernels = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("query", "key", "value", "out")}

    expected = np.zeros((2, 4, 6))
    for b, h, q in np.ndindex(2, 2, 4):
        query = x[b, q] @ kernels["query"][:, h]
        logits = np.asarray([query @ (memory[b, t] @ kernels["key"][:, h]) for t in range(5)]) + positions[0, h, q]
        weights = np.where(visible[b, 0, q], np.exp(logits), 0)
        context = (weights / weights.sum()) @ (memory[b] @ kernels["value"][:, h])
        expected[b, q] += context @ kernels["out"][h]

    bias = jnp.where(visible, 0.0, MASKED)
    given = (jnp.asarray(array, jnp.float32) for array in (x, memory, bias, positions))
    np.testing.assert_allclose(layer(*given, dropout_rate=0.5, rng=None), expected, rtol=1e-4, atol=1e-5)


def test_attention_dropout_drops_a_key_of_one_head_for_all_queries_at_once() -> None:
    batch, heads, keys = 8, 2, 4
    layer = attention_layer(8, heads, keys)
    # With a zero query every key weighs 1/4; key t carries its own number into feature t of each head.
    layer.query[...] = jnp.zeros((8, heads, keys))
    layer.value[...] = jnp.zeros((8, heads, keys)).at[:keys].set(jnp.eye(keys)[:, None])
    layer.out[...] = jnp.eye(heads * keys).reshape(heads, keys, 8)
    x = jnp.broadcast_to(jnp.eye(keys, 8), (batch, keys, 8))
    bias = jnp.zeros((batch, 1, keys, keys))
    result = layer(x, x, bias, None, dropout_rate=0.5, rng=jax.random.key(0))
    weights = np.asarray(result).reshape(batch, keys, heads, keys)
    np.testing.assert_array_equal(weights, np.broadcast_to(weights[:, :1], weights.shape))
    np.testing.assert_array_equal(np.unique(weights), [0.0, 0.5])
    assert (weights[0] != weights[1]).any()
    assert (weights[:, :, 0] != weights[:, :, 1]).any()
    still = layer(x, x, bias, None, dropout_rate=0.5, rng=None)
    np.testing.assert_array_equal(np.asarray(still), np.full((batch, keys, 8), 0.25))
