"""Parameters and floating-point operations against hand counts, the traced model, and the paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from switch_t5.layers import moe
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.planning.counts import active_parameter_count, forward_flops, parameter_count

TINY = TransformerConfig(
    vocab_size=11, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=5, num_encoder_layers=1, num_decoder_layers=1
)
SPARSE = dataclasses.replace(
    TINY,
    num_encoder_layers=2,
    num_decoder_layers=4,
    moe=MoEConfig(4, group_size=16, train_capacity_factor=1.0, eval_capacity_factor=2.0, min_expert_capacity=1),
)


@pytest.fixture(autouse=True)
def whole_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are of accelerators, which multiply every slot; one CPU device leaves the empty ones out."""
    monkeypatch.setattr(moe, "target_platform", lambda: "tpu")


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of one matrix product."""
    return 2 * rows * inner * columns


def traced_matrix_flops(config: TransformerConfig, batch: int, lengths: tuple[int, int], *, train: bool) -> int:
    """Operations of every matrix product in the traced forward pass, logits included."""
    model = Model(config)

    def forward(params: Any, features: dict[str, jax.Array]) -> jax.Array:
        module = model.bind(params)
        return logits(module(features, train=train)[0], module.output_kernel())

    shapes = zip(("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"), (0, 1, 1), strict=True)
    features = {name: jax.ShapeDtypeStruct((batch, lengths[which]), jnp.int32) for name, which in shapes}
    return sum(_matrix_products(jax.make_jaxpr(forward)(model.abstract_params, features).jaxpr))


def _matrix_products(jaxpr: Any) -> Iterator[int]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[dim] for dim in contracted)
            yield 2 * math.prod(equation.outvars[0].aval.shape) * inner
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for parameter in equation.params.values():
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                inner_jaxpr = getattr(parameter, "jaxpr", parameter)
                yield from (repeats * flops for flops in _matrix_products(inner_jaxpr))


def test_a_dense_models_parameters_are_counted_by_hand():
    attention = 4 * 8 * 6  # query, key, value: 8 x (2 x 3); out: (2 x 3) x 8
    feed_forward = 2 * 8 * 5
    encoder = attention + feed_forward + 2 * 8 + 2 * 32 + 8  # two norms, position biases, last norm
    decoder = 2 * attention + feed_forward + 3 * 8 + 2 * 32 + 8
    assert parameter_count(Model(TINY).abstract_params) == 11 * 8 + encoder + decoder
    gated = dataclasses.replace(TINY, mlp_activations=("gelu", "linear"), tied_logits=False)
    more = 2 * 8 * 5 + 11 * 8  # a third matrix in each feed-forward, and the logits'
    assert parameter_count(Model(gated).abstract_params) == 11 * 8 + encoder + decoder + more


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_token_passes_one_expert_of_each_sparse_layer(scan_layers: bool):
    model = Model(dataclasses.replace(SPARSE, scan_layers=scan_layers))
    dense = Model(dataclasses.replace(SPARSE, moe=None, scan_layers=scan_layers))
    sparse_layers, expert, router = 1 + 2, 2 * 8 * 5, 8 * 4
    without = parameter_count(dense.abstract_params)
    assert parameter_count(model.abstract_params) == without + sparse_layers * (3 * expert + router)
    assert active_parameter_count(model.config, model.abstract_params, model.axes) == without + sparse_layers * router
    assert active_parameter_count(dense.config, dense.abstract_params, dense.axes) == without


def test_a_dense_models_operations_are_counted_by_hand():
    encoder = [
        *[product(7, 8, 6)] * 3,  # 7 tokens of 8 features to queries, keys and values of 2 heads x 3
        *[product(7, 3, 7)] * 2,  # in each head, every query by every key
        *[product(7, 7, 3)] * 2,  # in each head, the weights by the values
        product(7, 6, 8),
        product(7, 8, 5),
        product(7, 5, 8),
    ]
    decoder = [
        *[product(4, 8, 6)] * 3,
        *[product(4, 3, 4)] * 2,
        *[product(4, 4, 3)] * 2,
        product(4, 6, 8),
        product(4, 8, 6),  # cross-attention: 4 queries,
        *[product(7, 8, 6)] * 2,  # 7 keys and values
        *[product(4, 3, 7)] * 2,
        *[product(4, 7, 3)] * 2,
        product(4, 6, 8),
        product(4, 8, 5),
        product(4, 5, 8),
        product(4, 8, 11),  # logits
    ]
    assert forward_flops(TINY, 3, 7, 4) == 3 * (sum(encoder) + sum(decoder))
    gated = dataclasses.replace(TINY, mlp_activations=("gelu", "linear"))
    assert forward_flops(gated, 3, 7, 4) == 3 * (sum(encoder) + sum(decoder) + product(7, 8, 5) + product(4, 8, 5))


@pytest.mark.parametrize(
    ("train", "encoder_slots", "decoder_slots"),
    # 4 sequences of 8 and 4 tokens, 2 in a group: 2 groups of 16 and of 8 tokens for 4 experts.
    [(True, 2 * 4 * 4, 2 * 4 * 2), (False, 2 * 4 * 8, 2 * 4 * 4)],
)
def test_experts_count_with_all_their_slots_and_routers_with_all_tokens(
    train: bool, encoder_slots: int, decoder_slots: int
):
    dense = forward_flops(dataclasses.replace(SPARSE, moe=None), 4, 8, 4)
    one_encoder_layer = product(32, 8, 4) + (encoder_slots - 32) * 2 * 2 * 8 * 5
    two_decoder_layers = 2 * (product(16, 8, 4) + (decoder_slots - 16) * 2 * 2 * 8 * 5)
    assert forward_flops(SPARSE, 4, 8, 4, train=train) == dense + one_encoder_layer + two_decoder_layers


def test_the_least_capacity_counts_where_it_is_more_than_the_factor_gives():
    def with_least(slots: int) -> TransformerConfig:
        assert SPARSE.moe is not None
        return dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, min_expert_capacity=slots))

    # At capacity 1 the decoder's experts have 2 slots for a group; 2 groups, 4 experts, 2 layers get 1 more.
    more = forward_flops(with_least(3), 4, 8, 4) - forward_flops(with_least(1), 4, 8, 4)
    assert more == 2 * 4 * 2 * 2 * 2 * 8 * 5


def test_an_absolute_capacity_counts_for_each_sequence():
    assert SPARSE.moe is not None
    moe = dataclasses.replace(SPARSE.moe, group_size="sequence", expert_capacity=6)
    dense = forward_flops(dataclasses.replace(SPARSE, moe=None), 4, 8, 4)
    # Four groups and four experts; 6 slots of an encoder's row of 8, 4 of a decoder's row of 4.
    encoder = product(32, 8, 4) + (4 * 4 * 6 - 32) * 2 * 2 * 8 * 5
    decoder = 2 * (product(16, 8, 4) + (4 * 4 * 4 - 16) * 2 * 2 * 8 * 5)
    assert forward_flops(dataclasses.replace(SPARSE, moe=moe), 4, 8, 4) == dense + encoder + decoder


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("moe", [pytest.param(None, marks=pytest.mark.slow), SPARSE.moe], ids=["dense", "sparse"])
def test_the_operations_are_those_of_the_traced_model(moe: MoEConfig | None, scan_layers: bool, train: bool):
    config = dataclasses.replace(
        SPARSE, moe=moe, scan_layers=scan_layers, mlp_activations=("gelu", "linear"), tied_logits=False
    )
    for batch, lengths in ((4, (8, 4)), (2, (16, 7)), (2, (24, 6))):
        once, twice = (traced_matrix_flops(config, size, lengths, train=train) for size in (batch, 2 * batch))
        # Routers sum their probabilities over tokens by products, for two losses, which are no work of the model.
        sums = sum(
            2 * 2 * config.moe.num_experts * batch * length * sum(pattern)
            for length, pattern in zip(lengths, (config.encoder_pattern, config.decoder_pattern), strict=True)
            if config.moe is not None
        )
        # The rest, which does not grow with the batch, makes the position biases.
        assert twice - once == forward_flops(config, batch, *lengths, train=train) + sums, (batch, lengths)
        assert once - (twice - once) < 0.1 * once


ATTENTIVE = dataclasses.replace(
    SPARSE,
    attention_moe=SPARSE.moe,
    attention_sparse_projections=("query", "key", "value", "out"),
    encoder_sparse_attention=1,
    decoder_sparse_attention=(0,),
)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_token_passes_one_expert_of_each_sparse_projection(scan_layers: bool):
    config = dataclasses.replace(ATTENTIVE, scan_layers=scan_layers)
    model, without = Model(config), Model(dataclasses.replace(SPARSE, scan_layers=scan_layers))
    layers, kernels = 2 + 1, 4 * 8 * 6
    routers = (8 + 8 + 6) * 4  # of the query, of key and value, and of the output, which sees 2 heads x 3
    more = parameter_count(model.abstract_params) - parameter_count(without.abstract_params)
    assert more == layers * (3 * kernels + routers)
    active, active_without = (
        active_parameter_count(one.config, one.abstract_params, one.axes) for one in (model, without)
    )
    assert active - active_without == layers * routers


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("projections", [("query", "key", "value"), ("out", "value")])
def test_the_operations_of_sparse_attention_are_those_of_the_traced_model(projections: tuple[str, ...], train: bool):
    config = dataclasses.replace(ATTENTIVE, attention_sparse_projections=projections)
    lengths, routers = (16, 7), 2
    once, twice = (traced_matrix_flops(config, size, lengths, train=train) for size in (2, 4))
    # Each router sums its probabilities over tokens by products, for two losses.
    sparse_layers = (sum(config.encoder_pattern) + 2 * routers, sum(config.decoder_pattern) + routers)
    sums = sum(2 * 2 * 4 * 2 * length * count for length, count in zip(lengths, sparse_layers, strict=True))
    assert twice - once == forward_flops(config, 2, *lengths, train=train) + sums


def test_without_capacity_a_row_counts_for_each_choice():
    assert SPARSE.moe is not None
    dropless = dataclasses.replace(SPARSE.moe, dispatch="dropless")
    dense = forward_flops(dataclasses.replace(SPARSE, moe=None), 4, 8, 4)
    routers = product(32, 8, 4) + 2 * product(16, 8, 4)
    assert forward_flops(dataclasses.replace(SPARSE, moe=dropless), 4, 8, 4) == dense + routers


def table_9(emb: int, mlp: int, heads: int, layers: int, matrices: int) -> TransformerConfig:
    """A dense model of the shape of a row of the paper's table 9."""
    return TransformerConfig(
        vocab_size=32128,
        emb_dim=emb,
        num_heads=heads,
        head_dim=64,
        mlp_dim=mlp,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_activations=("relu",) if matrices == 2 else ("gelu", "linear"),
    )


@pytest.mark.parametrize(
    ("config", "published", "ratio"),
    [
        (table_9(768, 2048, 12, 12, 3), 124e9, 1.145),
        (table_9(1024, 2816, 16, 24, 3), 425e9, 1.151),
        (table_9(4096, 10240, 64, 24, 3), 6.3e12, 1.106),
        (table_9(2080, 6144, 32, 15, 2), 890e9, 1.142),  # Switch-C: one expert of each layer
    ],
    ids=["base", "large", "xxl", "c"],
)
def test_the_papers_operations_a_sequence_lie_between_two_ways_of_counting_a_forward_pass(
    config: TransformerConfig, published: float, ratio: float
):
    """The paper's column "FLOPs/seq" is a forward pass over 512 inputs and 114 targets.

    Its definition is not given. The numbers of all four shapes lie between two plain counts in which every
    matrix, a cross-attention's keys and values too, meets the tokens of its own stack: without and with the
    attention's own products. Dense and sparse rows agree, so experts count once a token, without slack, and
    routers not at all. What runs is more: cross-attention makes keys and values of all 512 inputs.
    """
    inputs, targets = 512, 114
    width, layers = config.num_heads * config.head_dim, config.num_encoder_layers
    counted = forward_flops(config, 1, inputs, targets)
    extra_keys_and_values = layers * 2 * product(inputs - targets, config.emb_dim, width)
    pairs = inputs * inputs + targets * targets + inputs * targets
    attention_products = layers * 2 * product(pairs, width, 1)

    own_tokens = counted - extra_keys_and_values
    assert own_tokens - attention_products < published < own_tokens
    assert own_tokens - attention_products == pytest.approx(published, rel=0.05)
    assert own_tokens == pytest.approx(published, rel=0.06)
    assert counted / published == pytest.approx(ratio, abs=5e-4)
