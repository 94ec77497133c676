"""The model against Hugging Face's T5 v1.1 and Switch Transformers, from the same weights and inputs."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.cli.config_files import packaged_configs
from switch_t5.cli.configuration import Configuration
from switch_t5.inference.config import DecodingConfig
from switch_t5.inference.decoding import decode
from switch_t5.inference.independence import independent
from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.losses import LossConfig, batch_totals
from switch_t5.training.step import batch_loss
from switch_t5.types import Array, Params
from tests.checkpoint.golden import HUGGING_FACE as GOLDEN
from tests.checkpoint.golden import huggingface_folder, params_of

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"there are no golden models at {GOLDEN}"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "emb_dim": 32,
    "num_heads": 4,
    "head_dim": 8,
    "mlp_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
}
CONFIGS = {
    "t5v11": TransformerConfig(**SIZES, mlp_activations=("gelu", "linear"), tied_logits=False),
    # No expert is ever full.
    "switch": TransformerConfig(**SIZES, moe=MoEConfig(4, eval_capacity_factor=4.0)),
}


def read(name: str, weights: str = "weights") -> Params:
    """Our parameters (or gradients) from theirs."""
    with tempfile.TemporaryDirectory() as folder:
        return params_of(huggingface_folder(Path(folder), name, weights), CONFIGS[name])


@functools.cache
def case(name: str) -> tuple[Model, Params, dict[str, np.ndarray], dict[str, Array]]:
    """The model, its parameters, what Hugging Face computed, and the batch that it read."""
    model = Model(CONFIGS[name])
    params = read(name)
    with np.load(GOLDEN / f"{name}_io.npz") as arrays:
        golden = dict(arrays)
    np.testing.assert_array_equal(golden["attention_mask"], golden["input_ids"] > 0)
    real = golden["labels"] >= 0
    batch = {
        "encoder_input_tokens": golden["input_ids"].astype(np.int32),
        "decoder_input_tokens": golden["decoder_input_ids"].astype(np.int32),
        "decoder_target_tokens": np.where(real, golden["labels"], 0).astype(np.int32),
        "decoder_loss_weights": real.astype(np.float32),
    }
    return model, jax.tree.map(jnp.asarray, params), golden, jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize(("name", "prefix"), [("t5v11", ""), ("switch", "cap64/")])
def test_logits_and_encoder_outputs_agree(name: str, prefix: str) -> None:
    model, params, golden, batch = case(name)

    @jax.jit
    def forward(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        module = model.bind(params)
        encoded, _ = module.encode(batch["encoder_input_tokens"])
        hidden, _ = module(batch)
        return encoded, logits(hidden, module.output_kernel())

    encoded, ours = forward(params, batch)
    # Where something is padding we attend to nothing, and they as if it were not.
    inputs, targets = golden["input_ids"] > 0, golden["labels"] >= 0
    np.testing.assert_allclose(encoded[inputs], golden[f"{prefix}enc_hidden_2"][inputs], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours[targets], golden[f"{prefix}logits"][targets], rtol=1e-5, atol=2e-5)


@functools.cache
def loss_and_gradients(name: str) -> tuple[dict[str, Any], Params]:
    model, params, _, batch = case(name)
    config = LossConfig(z_loss=0.0, load_balance_loss_weight=0.0)
    loss = functools.partial(batch_loss, model=model, config=config)
    totals = batch_totals(batch, config, model.config)
    gradients, metrics = jax.jit(jax.grad(loss, has_aux=True))(params, batch, None, totals)
    return metrics, gradients


@pytest.mark.parametrize(("name", "prefix"), [("t5v11", ""), ("switch", "cap64/")])
def test_the_cross_entropy_agrees(name: str, prefix: str) -> None:
    metrics, _ = loss_and_gradients(name)
    np.testing.assert_allclose(metrics["cross_entropy"], case(name)[2][f"{prefix}ce_loss"], rtol=2e-6)


def assert_gradients_agree(ours: Params, theirs: Params) -> None:
    def compare(path: jax.tree_util.KeyPath, one: np.ndarray, other: np.ndarray) -> None:
        largest = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


def test_the_gradient_of_every_dense_parameter_agrees() -> None:
    _, gradients = loss_and_gradients("t5v11")
    expected = read("t5v11", "grads")
    assert_gradients_agree(gradients, expected)


def test_the_gradient_of_the_last_experts_agrees() -> None:
    """Their gradients include the router's losses, which count padding; these do not reach past the last router."""
    _, gradients = loss_and_gradients("switch")
    expected = read("switch", "grads_cap64")
    ours, theirs = gradients["decoder"], expected["decoder"]
    assert_gradients_agree(ours["norm"], theirs["norm"])
    last, reference = (tree["stack"]["blocks"]["layers_1"]["mlp"]["experts"] for tree in (ours, theirs))
    assert_gradients_agree(last, reference)


@pytest.mark.parametrize(("name", "golden_name"), [("t5v11", "gen_greedy"), ("switch", "cap64/gen_greedy")])
def test_greedy_decoding_agrees(name: str, golden_name: str) -> None:
    model, params, golden, batch = case(name)
    # Theirs starts with the start token.
    expected = golden[golden_name][:, 1:]
    how = {"config": DecodingConfig(), "max_length": expected.shape[1], "eos_id": 1}
    greedy = jax.jit(functools.partial(decode, Model(independent(model.config)), **how))
    tokens = batch["encoder_input_tokens"]
    np.testing.assert_array_equal(greedy(params, tokens, np.arange(len(tokens))).tokens[:, 0], expected)


def convention(capacity: int, **fields: Any) -> MoEConfig:
    """The sparse layers of conventions/huggingface.gin, with the golden models' number of experts."""
    file = str(packaged_configs() / "conventions" / "huggingface.gin")
    flags = ("MoEConfig.num_experts=4", f"MoEConfig.expert_capacity={capacity}")
    return dataclasses.replace(Configuration.load([file], flags).get("MoEConfig"), **fields)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize(("capacity", "drops"), [(64, (0, 0)), (6, (22, 1)), (2, (69, 20))])
def test_the_convention_gives_their_slots_drops_and_losses(capacity: int, drops: tuple[int, int], stack: str) -> None:
    """Of the same router logits: an identity is the router, and experts return their input."""
    golden = case("switch")[2]
    ours = golden["input_ids"] > 0 if stack == "encoder" else golden["labels"] >= 0
    assert not ours.all()
    theirs = {name: golden[f"cap{capacity}/{stack}_l1_{name}"] for name in ("router_logits", "dispatch", "gate")}
    layer = SwitchFeedForward(convention(capacity), 4, 8, ("relu",), "t5x", rngs=nnx.Rngs(0))
    layer.router[...] = jnp.eye(4)
    # The sum of the rectified input and of its negative's, negated.
    both = jnp.concatenate([jnp.eye(4), -jnp.eye(4)], axis=1)
    layer.experts.wi[...] = jnp.broadcast_to(both, (4, 4, 8))
    layer.experts.wo[...] = jnp.broadcast_to(both.T, (4, 8, 4))
    x = jnp.asarray(theirs["router_logits"])
    output, stats = layer(x, jnp.asarray(ours), tokens=jnp.zeros(ours.shape, int), sequences=1, train=True, rng=None)
    kept = theirs["dispatch"].sum(-1) > 0
    np.testing.assert_allclose(output, (theirs["gate"] * kept)[..., None] * x, rtol=1e-5, atol=1e-6)
    assert float(stats.dropped) == drops[stack == "decoder"] == golden[f"cap{capacity}/{stack}_l1_dropped"].sum()
    means = stats.means()
    np.testing.assert_allclose(means["load_balance_loss"], golden[f"cap{capacity}/{stack}_aux_loss"], rtol=1e-5)
    np.testing.assert_allclose(means["router_z_loss"], golden[f"cap{capacity}/{stack}_z_loss"], rtol=1e-5)


@pytest.mark.parametrize("capacity", [6, 2])
def test_logits_agree_where_experts_overflow(capacity: int) -> None:
    _, params, golden, batch = case("switch")
    model = Model(dataclasses.replace(CONFIGS["switch"], moe=convention(capacity)))

    @jax.jit
    def forward(params: Params, batch: dict[str, Array]) -> Array:
        module = model.bind(params)
        return logits(module(batch)[0], module.output_kernel())

    real = golden["labels"] >= 0
    ours = forward(params, batch)
    np.testing.assert_allclose(ours[real], golden[f"cap{capacity}/logits"][real], rtol=1e-5, atol=5e-5)
