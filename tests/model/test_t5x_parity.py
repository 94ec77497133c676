"""The model against T5X with Flaxformer's Switch layers: capacity, drops, packing, decoding."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.losses import cross_entropy
from switch_t5.types import Array, Params

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "t5x"
CHECKPOINT = GOLDEN / "switch_tiny" / "checkpoint_5"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"there is no golden checkpoint at {CHECKPOINT}"),
]

CONFIG = TransformerConfig(
    vocab_size=64,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=64,
    num_encoder_layers=2,
    num_decoder_layers=2,
    # It ran with four expert partitions, and so with four groups: one a sequence.
    moe=MoEConfig(4, group_size=16, capacity_rounding="round", jitter_noise=0.0),
)

SOWN = {
    "auxiliary_loss": "load_balance_loss",
    "router_z_loss": "router_z_loss",
    "fraction_tokens_left_behind": "fraction_dropped",
}
"""Their names of a sparse layer's statistics, and ours."""


def from_t5x(config: TransformerConfig) -> Params:
    """Our parameters from a T5X checkpoint: a Zarr folder for each."""

    def read(name: str) -> np.ndarray:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(CHECKPOINT / f"target.{name}")}}
        return tensorstore.open(spec, read=True).result().read().result()

    def attention(prefix: str) -> Params:
        heads = (config.emb_dim, config.num_heads, config.head_dim)
        kernels = {name: read(f"{prefix}.{name}.kernel").reshape(heads) for name in ("query", "key", "value")}
        return kernels | {"out": read(f"{prefix}.out.kernel").reshape(*heads[1:], config.emb_dim)}

    def block(prefix: str, sparse: bool, decoder: bool) -> Params:
        own = "self_attention" if decoder else "attention"
        layers = {own: "self_attention"} | ({"encoder_decoder_attention": "cross_attention"} if decoder else {})
        params: Params = {ours: attention(f"{prefix}.{theirs}") for theirs, ours in layers.items()}
        norms = {own: "self_attention", "mlp": "mlp"} | ({"cross_attention": "cross_attention"} if decoder else {})
        for theirs, ours in norms.items():
            params[f"{ours}_norm"] = {"scale": read(f"{prefix}.pre_{theirs}_layer_norm.scale")}
        if sparse:
            experts = {name: read(f"{prefix}.mlp.expert.{name}.kernel") for name in ("wi", "wo")}
            params["mlp"] = {"router": read(f"{prefix}.mlp.router.router_weights.w.kernel"), "experts": experts}
        else:
            params["mlp"] = {name: read(f"{prefix}.mlp.{name}.kernel") for name in ("wi", "wo")}
        return params

    def coder(name: str) -> Params:
        return {
            "relative_position": {"embedding": read(f"{name}.relpos_bias.rel_embedding")},
            "stack": {
                "blocks": {f"layers_{i}": block(f"{name}.layers_{i}", i == 1, name == "decoder") for i in range(2)}
            },
            "norm": {"scale": read(f"{name}.{name}_norm.scale")},
        }

    table = read("token_embedder.embedding")
    return {"embedding": {"table": table}} | {name: coder(name) for name in ("encoder", "decoder")}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "switch_tiny_golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def params() -> Params:
    return jax.tree.map(jnp.asarray, from_t5x(CONFIG))


def batch_of(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): jnp.asarray(value) for name, value in golden.items() if name.startswith(prefix)}


@functools.cache
def forward(capacity_factor: float) -> Any:
    assert CONFIG.moe is not None
    moe = dataclasses.replace(CONFIG.moe, eval_capacity_factor=capacity_factor)
    model = Model(dataclasses.replace(CONFIG, moe=moe))

    @jax.jit
    def run(params: Params, batch: dict[str, Array]) -> tuple[Array, Array, tuple[Array, Array]]:
        module = model.bind(params)
        hidden, stats = module(batch)
        dropped = sum((jnp.sum(stack.dropped) for stack in stats.stacks().values()), jnp.zeros(()))
        targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        sums = cross_entropy(hidden, module.output_kernel(), targets, weights, z_loss=1e-4)
        return logits(hidden, module.output_kernel()), dropped, sums

    return run


def test_packed_logits_and_their_drops_agree(golden: dict[str, np.ndarray], params: Params) -> None:
    batch = batch_of(golden, "packed_in_")
    assert (np.asarray(batch["encoder_input_tokens"]) > 0).all()
    ours, dropped, _ = forward(2.0)(params, batch)
    np.testing.assert_allclose(ours, golden["packed_eval_logits"], rtol=1e-5, atol=5e-5)
    assert dropped > 0


@pytest.mark.parametrize(("kind", "capacity_factor"), [("eval", 2.0), ("train", 1.25)])
def test_logits_and_losses_of_padded_sequences_agree_where_there_is_a_target(
    golden: dict[str, np.ndarray], params: Params, kind: str, capacity_factor: float
) -> None:
    """There padding is routed, but after the sequence's own tokens, so that it takes no slot from them."""
    ours, dropped, (nats, z_loss) = forward(capacity_factor)(params, batch_of(golden, "in_"))
    real = golden["in_decoder_target_tokens"] > 0
    np.testing.assert_allclose(ours[real], golden[f"{kind}_logits"][real], rtol=1e-5, atol=5e-5)
    assert dropped > 0
    np.testing.assert_allclose(nats / real.sum(), golden[f"{kind}_cross_ent_loss"], rtol=2e-6)
    np.testing.assert_allclose(z_loss / real.sum(), golden[f"{kind}_z_loss"], rtol=1e-5)


@pytest.mark.parametrize(("kind", "train"), [("eval", False), ("train", True)])
def test_zeroed_padding_gives_their_router_losses_and_drops(
    golden: dict[str, np.ndarray], params: Params, kind: str, train: bool
) -> None:
    """Padding is zero there when it reaches the router: its logits are 0, and it takes slots of the first expert."""
    batch = batch_of(golden, "in_")
    assert CONFIG.moe is not None
    # As there, a group is a sequence in the decoder too.
    model = Model(dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, padding="zeroed")))
    _, stats = jax.jit(lambda params, batch: model.bind(params)(batch, train=train))(params, batch)
    for stack, tokens in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        assert not (np.asarray(batch[tokens]) > 0).all()
        means = stats.stacks()[stack].means()
        for theirs, ours in SOWN.items():
            expected = golden[f"{kind}_sown/{stack}/layers_1/mlp/{theirs}"]
            np.testing.assert_allclose(means[ours], expected, rtol=1e-5, atol=1e-6, err_msg=f"{stack} {ours}")
