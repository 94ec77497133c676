"""Feed-forwards against their formula in float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.dense import FeedForward
from switch_t5.layers.row_blocks import Load
from switch_t5.types import Array

HIDDEN_AXES = ("batch", "length", "mlp")


@pytest.mark.usefixtures("compiled_as_users_do")
def test_a_cpu_does_not_draw_dropout_anew_for_each_entry_of_a_turned_gradient() -> None:
    layer = FeedForward(32, 128, ("relu",), "paper", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def loss(params: nnx.State, x: Array, rng: Array) -> Array:
        return jnp.sum(nnx.merge(graph, params)(x, hidden_axes=HIDDEN_AXES, dropout_rate=0.1, rng=rng) ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = gradient.lower(params, jnp.ones((4, 64, 32)), jax.random.key(0)).compile().as_text()
    assert program is not None
    bodies = re.findall(r"^%?fused_computation[^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    assert any("shift-right-logical" in body for body in bodies)
    assert not any("shift-right-logical" in body and " copy(" in body for body in bodies)


def gelu(x: np.ndarray) -> np.ndarray:
    """T5's, the approximation by a hyperbolic tangent."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


NUMPY = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "linear": lambda x: x,
}


def expected_output(layer: FeedForward, x: np.ndarray) -> np.ndarray:
    kernels = {name: np.asarray(kernel[...], np.float64) for name, kernel in vars(layer).items() if name[0] == "w"}
    hidden = 1.0
    for name, activation in zip(sorted(kernels.keys() - {"wo"}), layer.activations, strict=True):
        hidden = hidden * NUMPY[activation](x @ kernels[name])
    return hidden @ kernels["wo"]


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear"), ("silu", "linear")])
def test_a_feed_forward_equals_its_float64_formula(activations: tuple[str, ...]) -> None:
    layer = FeedForward(6, 10, activations, "t5x", rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 6))
    result = layer(jnp.asarray(x, jnp.float32), hidden_axes=HIDDEN_AXES, dropout_rate=0.5, rng=None)
    np.testing.assert_allclose(result, expected_output(layer, x), rtol=1e-5, atol=1e-6)


def test_a_gated_feed_forward_has_two_input_matrices_and_a_plain_one_has_one() -> None:
    plain = FeedForward(2, 3, ("relu",), "t5x", rngs=nnx.Rngs(0))
    gated = FeedForward(2, 3, ("gelu", "linear"), "t5x", rngs=nnx.Rngs(0))
    assert {name for name in vars(plain) if name[0] == "w"} == {"wi", "wo"}
    assert {name for name in vars(gated) if name[0] == "w"} == {"wi_0", "wi_1", "wo"}


def test_each_expert_multiplies_by_its_own_matrices() -> None:
    layer = FeedForward(6, 10, ("gelu", "linear"), "t5x", num_experts=3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 5, 6))
    axes = ("expert", "expert_batch", "expert_mlp")
    result = layer(jnp.asarray(x, jnp.float32), hidden_axes=axes, dropout_rate=0, rng=None)
    np.testing.assert_allclose(result, expected_output(layer, x), rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_the_hidden_activation_and_is_shared_along_the_length() -> None:
    layer = FeedForward(4, 4, ("linear",), "t5x", rngs=nnx.Rngs(0))
    layer.wi[...], layer.wo[...] = jnp.eye(4), jnp.eye(4)
    x = jnp.ones((8, 3, 4))
    result = np.asarray(layer(x, hidden_axes=HIDDEN_AXES, dropout_rate=0.5, rng=jax.random.key(0)))
    np.testing.assert_array_equal(np.unique(result), [0.0, 2.0])
    np.testing.assert_array_equal(result, np.broadcast_to(result[:, :1], result.shape))


def test_a_bfloat16_input_is_multiplied_in_bfloat16_by_float32_parameters() -> None:
    layer = FeedForward(4, 8, ("relu",), "t5x", rngs=nnx.Rngs(0))
    assert layer.wi[...].dtype == jnp.float32
    x = jnp.ones((1, 2, 4), jnp.bfloat16)
    result = layer(x, hidden_axes=HIDDEN_AXES, dropout_rate=0, rng=None)
    assert result.dtype == jnp.bfloat16
    rounded = jax.nn.relu(x @ layer.wi[...].astype(jnp.bfloat16)) @ layer.wo[...].astype(jnp.bfloat16)
    np.testing.assert_array_equal(result, rounded)


SIZES = (5, 0, 7, 3)
"""Rows of each expert; the others are nobody's."""


LOADS = Load(most=8), Load(share=3)
"""Of 4 experts SIZES fill 9 of 12 places of shares of 3, and so are taken evenly."""


def expert_loss(params: nnx.State, graph: nnx.GraphDef, x: Array, sizes: Array, load: Load) -> Array:
    rows = {"numbers": jnp.arange(len(x)), "sizes": sizes, "load": load}
    return jnp.sum(jnp.sin(nnx.merge(graph, params)(x, dropout_rate=0.0, rng=None, **rows)))


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_expert_gradients_are_those_of_each_experts_own_product(load: Load) -> None:
    layer = FeedForward(6, 10, ("gelu", "linear"), "t5x", num_experts=4, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    graph, params = nnx.split(layer)
    gradients = jax.grad(expert_loss, argnums=(0, 2))(params, graph, x, jnp.asarray(SIZES), load)
    expert = np.repeat(np.arange(4), SIZES)

    def reference(params: dict[str, Array], x: Array) -> Array:
        own = {name: kernel[expert] for name, kernel in params.items()}
        x = x[: len(expert)]
        hidden = jax.nn.gelu(jnp.einsum("nd,ndf->nf", x, own["wi_0"])) * jnp.einsum("nd,ndf->nf", x, own["wi_1"])
        return jnp.sum(jnp.sin(jnp.einsum("nf,nfd->nd", hidden, own["wo"])))

    expected = jax.grad(reference, argnums=(0, 1))(nnx.to_pure_dict(params), x)
    for name, gradient in nnx.to_pure_dict(gradients[0]).items():
        np.testing.assert_allclose(gradient, expected[0][name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert not np.asarray(gradient[1]).any()
    np.testing.assert_allclose(gradients[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", [("relu",), ("gelu", "linear")], ids=str)
@pytest.mark.parametrize("load", [Load(), *LOADS, Load(share=70)], ids=str)
def test_an_update_on_one_device_copies_neither_kernels_nor_hidden_rows(
    load: Load, activations: tuple[str, ...]
) -> None:
    layer = FeedForward(16, 24, activations, "t5x", num_experts=4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def update(params: nnx.State, x: Array, sizes: Array) -> tuple[nnx.State, Array]:
        # The gradient of the input, which reads the kernels last, is wanted as it is inside a model.
        gradients, d_x = jax.grad(expert_loss, argnums=(0, 2))(params, graph, x, sizes, load)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), d_x

    arguments = params, jnp.ones((40, 16)), jnp.asarray(SIZES)
    text = jax.jit(update, donate_argnums=0).lower(*arguments).compile().as_text()
    assert text is not None
    assert "f32[4,16,24]" in text and f"f32[{len(activations)},40,24]" in text
    copied = re.findall(r"= f32\[((?:4,(?:16,24|24,16)|(?:\d,)?40,(?:16|24))\]\S* copy\(\S*\))", text)
    if len(activations) == 2:
        # Two kernels' gradients begin as zeros, one array that XLA copies instead of making it twice.
        copied = [copy for copy in copied if not re.match(r"4,16,24\]\S* copy\(%(wrapped_)?broadcast[.\d]*\)", copy)]
    assert not copied
