"""The model against T5X with Flaxformer's Switch layers: capacity, drops, packing, decoding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.inference.config import DecodingConfig
from switch_t5.inference.decoding import decode
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.losses import cross_entropy
from switch_t5.types import Array, Params
from tests.checkpoint.golden import T5X as GOLDEN
from tests.checkpoint.golden import params_of

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


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "switch_tiny_golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def params() -> Params:
    return params_of(CHECKPOINT, CONFIG)


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


SCANNED = dataclasses.replace(
    CONFIG,
    emb_dim=16,
    head_dim=4,
    mlp_dim=32,
    num_encoder_layers=4,
    num_decoder_layers=4,
    relpos_per_layer=True,
)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(("kind", "capacity_factor"), [("eval", 2.0), ("train", 1.25)])
def test_a_scanned_checkpoint_gives_its_logits_and_losses_scanned_or_not(
    kind: str, capacity_factor: float, scan_layers: bool
) -> None:
    with np.load(GOLDEN / "switch_tiny_scan_golden.npz") as arrays:
        golden = dict(arrays)
    assert CONFIG.moe is not None
    moe = dataclasses.replace(CONFIG.moe, eval_capacity_factor=capacity_factor, padding="zeroed")
    config = dataclasses.replace(SCANNED, scan_layers=scan_layers, moe=moe)
    model = Model(config)
    params = params_of(GOLDEN / "switch_tiny_scan" / "checkpoint_5", config)
    batch = batch_of(golden, "in_")
    hidden, stats = jax.jit(lambda params, batch: model.bind(params)(batch))(params, batch)
    ours = logits(hidden, model.bind(params).output_kernel())
    real = golden["in_decoder_target_tokens"] > 0
    np.testing.assert_allclose(ours[real], golden[f"{kind}_logits"][real], rtol=1e-5, atol=5e-5)
    nats, z_loss = cross_entropy(
        hidden, model.bind(params).output_kernel(), batch["decoder_target_tokens"], jnp.asarray(real), z_loss=1e-4
    )
    np.testing.assert_allclose(nats / real.sum(), golden[f"{kind}_cross_ent_loss"], rtol=5e-6)
    np.testing.assert_allclose(z_loss / real.sum(), golden[f"{kind}_z_loss"], rtol=1e-5)
    for stack in ("encoder", "decoder"):
        means = stats.stacks()[stack].means()
        theirs = [golden[key] for key in sorted(golden) if f"{kind}_sown/{stack}" in key and "auxiliary_loss" in key]
        assert theirs, [key for key in golden if "sown" in key]
        np.testing.assert_allclose(np.sort(means["load_balance_loss"]), np.sort(np.ravel(theirs)), rtol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("switch_tiny", CONFIG), ("switch_tiny_scan", SCANNED)])
def test_greedy_decodes_beams_and_scores_agree(name: str, config: TransformerConfig) -> None:
    """The decodes are one token again and again, or the end at once: they show little. The scores are of targets.

    The stored beams of ``switch_tiny`` are its greedy decodes, to which two beams are not held.
    """
    with np.load(GOLDEN / f"{name}_golden.npz") as arrays:
        golden = dict(arrays)
    # The encoder's tokens compete; of the decoder's there is one at a time, and a slot for each.
    assert CONFIG.moe is not None
    config = dataclasses.replace(config, decoder_moe=dataclasses.replace(CONFIG.moe, dispatch="dropless"))
    params, batch = params_of(GOLDEN / name / "checkpoint_5", config), batch_of(golden, "in_")
    tokens = batch["encoder_input_tokens"]
    kinds = {"greedy": DecodingConfig()} | ({} if name == "switch_tiny" else {"beam": DecodingConfig(num_beams=2)})
    for kind, how in kinds.items():
        expected = golden[f"{kind}_predict_tokens"]
        call = functools.partial(decode, Model(config), config=how, max_length=expected.shape[1], eos_id=1)
        found = jax.jit(call)(params, tokens, np.arange(len(tokens))).tokens[:, 0]
        np.testing.assert_array_equal(found, expected, err_msg=kind)

    @jax.jit
    def score(params: Params, batch: dict[str, Array]) -> Array:
        module = Model(dataclasses.replace(config, decoder_moe=None)).bind(params)
        hidden, _ = module(batch)
        by_target = jax.nn.log_softmax(logits(hidden, module.output_kernel()))
        chosen = jnp.take_along_axis(by_target, batch["decoder_target_tokens"][..., None], axis=-1)[..., 0]
        return jnp.sum(chosen * batch["decoder_loss_weights"], axis=-1)

    np.testing.assert_allclose(score(params, batch), golden["score_batch"], rtol=2e-6)
