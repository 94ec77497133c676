"""Models with sparse attention: statistics, losses, biases, scan, planning, decoding, and what is refused."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import ConfigError
from switch_t5.inference.config import DecodingConfig
from switch_t5.inference.decoding import decode
from switch_t5.inference.independence import independent
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.router_bias import update_router_biases
from switch_t5.model.transformer import logits
from switch_t5.partitioning.rules import partition_spec
from switch_t5.routing.balance import RouterStats
from switch_t5.routing.router import RouterConfig
from switch_t5.training.losses import LossConfig, batch_totals, router_losses
from tests.model.small import examples, random_params, unpacked

MOE = MoEConfig(4, group_size=12, train_capacity_factor=1.0, eval_capacity_factor=8.0, min_expert_capacity=1)
CONFIG = TransformerConfig(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=4,
    num_decoder_layers=1,
    moe=MOE,
    encoder_sparse_layers=2,
    decoder_sparse_layers="none",
    attention_moe=MOE,
    attention_sparse_projections=("query", "key", "value", "out"),
    encoder_sparse_attention=2,
    decoder_sparse_attention=1,
)
BATCH = unpacked(examples([(6, 4), (5, 3), (6, 2), (2, 4)]), 6, 4)


def run(config: TransformerConfig, params: Any, **options: Any) -> Any:
    return jax.jit(lambda params: Model(config).bind(params)(BATCH, train=True, **options))(params)


def test_each_router_is_a_sparse_layer_of_the_losses_and_statistics() -> None:
    _, stats = run(CONFIG, random_params(Model(CONFIG), scale=1.0))
    # Two sparse blocks: query, key and value, out, feed-forward; the decoder's one without the last.
    assert stats.encoder.expert_load.shape == (8, 4)
    assert stats.decoder.expert_load.shape == (3, 4)
    np.testing.assert_array_equal(stats.encoder.tokens, [19] * 8)
    np.testing.assert_array_equal(stats.decoder.tokens, [13] * 3)
    totals = batch_totals(BATCH, LossConfig(), CONFIG)
    assert (float(totals.encoder), float(totals.decoder)) == (19, 13)
    sums = [np.sum(stack.load_balance_loss) / stack.tokens[0] for stack in (stats.encoder, stats.decoder)]
    for reduction, expected in (
        ("sum", sum(sums)),
        ("mean", sum(sums) / 11),
        ("stack_mean", sums[0] / 8 + sums[1] / 3),
    ):
        _, losses = router_losses(stats, totals, LossConfig(sparse_layer_reduction=reduction))
        np.testing.assert_allclose(losses["load_balance_loss"], expected, rtol=1e-6)


def test_a_stack_with_sparse_attention_alone_counts_padding_as_that_says() -> None:
    config = dataclasses.replace(CONFIG, moe=None, attention_moe=dataclasses.replace(MOE, padding="routed"))
    totals = batch_totals(BATCH, LossConfig(), config)
    assert (float(totals.encoder), float(totals.decoder)) == (24, 16)
    assert config.sequences_per_group(6) == 2


@pytest.mark.slow
def test_scanned_equals_written_out_with_statistics_in_the_same_order() -> None:
    scanned = dataclasses.replace(CONFIG, scan_layers=True, remat_policy="full")
    params = random_params(Model(scanned), scale=0.5)
    blocks = params["encoder"]["stack"]["blocks"]
    assert set(blocks) == {"layers_0", "layers_1"}
    flat = {
        f"layers_{2 * repeat + index}": jax.tree.map(operator.itemgetter(repeat), blocks[f"layers_{index}"])
        for repeat in range(2)
        for index in range(2)
    }
    written = {**params, "encoder": {**params["encoder"], "stack": {"blocks": flat}}}
    one, other = run(scanned, params), run(CONFIG, written)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_bias_of_each_router_moves_against_its_own_load(scan_layers: bool) -> None:
    """Sigmoid feed-forwards and attention with a rate of its own; then attention without a bias."""
    sigmoid = RouterConfig(router="sigmoid_top_k", num_selected_experts=2, bias_update_rate=0.5)
    biased = dataclasses.replace(MOE, router=sigmoid)
    faster = dataclasses.replace(MOE, router=dataclasses.replace(sigmoid, bias_update_rate=2.0))
    loads = np.random.default_rng(0).permuted(np.tile([9.0, 1, 1, 1], (8, 1)), axis=1)
    zeros = jnp.zeros(8)
    names = [field.name for field in dataclasses.fields(RouterStats)]
    stats = RouterStats(**{name: jnp.asarray(loads) if name == "expert_load" else zeros for name in names})
    for attention, rate in ((faster, 2.0), (MOE, None)):
        config = dataclasses.replace(CONFIG, moe=biased, attention_moe=attention, scan_layers=scan_layers)
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), Model(config).abstract_params)
        blocks = update_router_biases(params, params, {"encoder": stats}, config)["encoder"]["stack"]["blocks"]
        rows = []
        for repeat in range(2):
            block = blocks["layers_1" if scan_layers else f"layers_{2 * repeat + 1}"]
            layers = [block["self_attention"][name] for name in ("query", "key_value", "out")] + [block["mlp"]]
            for layer in layers:
                bias = layer.get("router_bias", jnp.zeros((2, 4) if scan_layers else 4))
                rows.append(bias[repeat] if scan_layers else bias)
        rates = np.asarray([rate or 0, rate or 0, rate or 0, 0.5] * 2)
        np.testing.assert_array_equal(rows, rates[:, None] * np.sign(3 - loads))


@pytest.mark.slow
def test_greedy_decoding_says_what_teacher_forcing_finds_most_probable() -> None:
    model = Model(dataclasses.replace(CONFIG, num_encoder_layers=2))
    params = random_params(model, scale=0.7)
    inputs = BATCH["encoder_input_tokens"]
    alone, numbers, how = Model(independent(model.config)), jnp.arange(len(inputs)), DecodingConfig()
    said = jax.jit(
        lambda params: decode(alone, params, inputs, numbers, config=how, max_length=5, eos_id=31).tokens[:, 0]
    )(params)
    shifted = jnp.pad(said, ((0, 0), (1, 0)))[:, :-1]

    @jax.jit
    def best(params: Any) -> Any:
        module = model.bind(params)
        encoded, _ = module.encode(inputs)
        hidden, _ = module.decode(encoded, inputs, shifted, said > 0)
        return jnp.argmax(logits(hidden, module.output_kernel()), axis=-1)

    # In evaluation nobody is dropped, so what comes after a position does not matter to it.
    np.testing.assert_array_equal(np.where(said > 0, best(params), 0), said)
    assert len(np.unique(said)) > 2


def test_parameters_have_axes_that_the_rules_map() -> None:
    model = Model(dataclasses.replace(CONFIG, scan_layers=True))
    attention = model.axes["encoder"]["stack"]["blocks"]["layers_1"]["self_attention"]
    for name, axes in (("query", ("embed", "heads", "kv")), ("out", ("heads", "kv", "embed"))):
        found = attention[name]["experts"][name]
        assert found == ("layers", "expert", *axes)
        assert {"expert", "model"} <= set(partition_spec(found))
        assert attention[name]["router"] == ("layers", "embed", None)


def test_a_dense_models_parameters_are_what_they_were() -> None:
    dense = {"encoder_sparse_attention": "none", "decoder_sparse_attention": "none"}
    config = changed(attention_moe=None, attention_sparse_projections=("query", "key", "value"), **dense)
    blocks = Model(config).abstract_params["encoder"]["stack"]["blocks"]
    assert all(set(block["self_attention"]) == {"query", "key", "value", "out"} for block in blocks.values())
    assert blocks["layers_1"]["self_attention"]["query"].shape == (8, 2, 4)


def changed(**fields: Any) -> TransformerConfig:
    return dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"attention_sparse_projections": ("query", "valu")},
            "TransformerConfig.attention_sparse_projections must be some of 'query', 'key', 'value', 'out', got "
            "'valu'. Did you mean 'value'?",
        ),
        (
            {"attention_sparse_projections": ("key", "key")},
            "TransformerConfig.attention_sparse_projections must be some of 'query', 'key', 'value', 'out', each once, "
            "got ('key', 'key').",
        ),
        (
            {"attention_moe": None},
            "TransformerConfig.attention_moe is missing, but encoder_sparse_attention is 2: give attention_moe = "
            "@MoEConfig(), or encoder_sparse_attention = 'none'.",
        ),
        (
            {"encoder_sparse_attention": "none", "decoder_sparse_attention": "none"},
            "TransformerConfig.attention_moe has no effect: no block has sparse attention; set "
            "TransformerConfig.encoder_sparse_attention or decoder_sparse_attention, or attention_moe = None.",
        ),
        (
            {"attention_moe": dataclasses.replace(MOE, num_experts=8)},
            "TransformerConfig.attention_moe has num_experts 8 and the encoder's sparse feed-forwards 4, but their "
            "statistics are kept together: give both the same.",
        ),
        (
            {"attention_moe": dataclasses.replace(MOE, padding="routed")},
            "TransformerConfig.attention_moe has padding 'routed' and the encoder's sparse feed-forwards 'ignored', "
            "but their statistics are kept together: give both the same.",
        ),
        (
            {"attention_moe": dataclasses.replace(MOE, group_size=24)},
            "TransformerConfig.attention_moe has group_size 24, but all sparse layers of both stacks group the same "
            "sequences: give it that of TransformerConfig.moe, 12.",
        ),
        (
            {"attention_moe": dataclasses.replace(MOE, expert_dropout_rate=0.4)},
            "TransformerConfig.attention_moe has expert_dropout_rate 0.4, which is of feed-forward experts, and those "
            "of attention are single matrices: set it to 0, where attention_moe = @attention/MoEConfig() by "
            "attention/MoEConfig.expert_dropout_rate = 0.",
        ),
        (
            {"attention_moe": dataclasses.replace(MOE, router=RouterConfig(router="sinkhorn"))},
            "TransformerConfig.attention_moe cannot serve a decoder: the router 'sinkhorn' chooses a token's experts "
            "by later tokens, which leaks the future into training and has no meaning in decoding; give its "
            "RouterConfig another router, or allow_future_tokens = True.",
        ),
        ({"encoder_sparse_attention": (4,)}, "encoder_sparse_attention names block 4, but the blocks are 0 to 3."),
    ],
)
def test_a_mistake_is_told_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(**fields)
    assert str(caught.value).endswith(sentence)


def test_a_router_that_sees_later_tokens_may_serve_the_encoder_alone() -> None:
    sinkhorn = dataclasses.replace(MOE, router=RouterConfig(router="sinkhorn"))
    changed(attention_moe=sinkhorn, decoder_sparse_attention="none")


def test_different_experts_may_serve_stacks_apart() -> None:
    changed(attention_moe=dataclasses.replace(MOE, num_experts=8), encoder_sparse_attention="none")
