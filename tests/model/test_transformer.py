"""What the whole model may and may not see."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import ModelStats, logits
from switch_t5.partitioning.rules import LOGICAL_AXIS_RULES
from switch_t5.types import Array, Params
from tests.model.small import examples, packed, random_params, unpacked

DENSE = TransformerConfig(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=2,
    num_decoder_layers=2,
    mlp_activations=("gelu", "linear"),
)
# Every expert has room for a whole group.
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig(3, group_size=64, eval_capacity_factor=3.0))
CONFIGS = {"dense": DENSE, "sparse": SPARSE}
SPARSE_BY_DEFAULT = [pytest.param("dense", marks=pytest.mark.slow), "sparse"]


@functools.cache
def model_and_params(config: TransformerConfig) -> tuple[Model, Params]:
    model = Model(config)
    return model, random_params(model)


@functools.cache
def forward(config: TransformerConfig) -> Any:
    model, params = model_and_params(config)

    @jax.jit
    def run(batch: dict[str, Array]) -> tuple[Array, Array, ModelStats]:
        module = model.bind(params)
        encoded, _ = module.encode(batch["encoder_input_tokens"], batch.get("encoder_segment_ids"))
        hidden, stats = module(batch)
        return encoded, hidden, stats

    return run


@pytest.mark.parametrize("kind", SPARSE_BY_DEFAULT)
def test_examples_packed_into_a_row_have_the_hidden_states_that_they_have_apart(kind: str) -> None:
    lengths = [(6, 4), (3, 5), (9, 3), (2, 2), (4, 6)]
    content = examples(lengths)
    rows = [content[:2], content[2:4], content[4:]]
    encoded, hidden, _ = forward(CONFIGS[kind])(packed(rows, 12, 10))
    apart = forward(CONFIGS[kind])(unpacked(content, 9, 6))
    number = 0
    for row, of_row in enumerate(rows):
        starts = [0, 0]
        for example in of_row:
            for side, result in enumerate((encoded, hidden)):
                length = len(example[side])
                together = result[row, starts[side] : starts[side] + length]
                np.testing.assert_allclose(together, apart[side][number, :length], rtol=2e-5, atol=1e-5)
                starts[side] += length
            number += 1


@pytest.mark.parametrize("kind", SPARSE_BY_DEFAULT)
def test_more_padding_changes_nothing(kind: str) -> None:
    content = examples([(6, 4), (3, 5), (9, 2)])
    tight, loose = unpacked(content, 9, 5), unpacked(content, 12, 8)
    run = forward(CONFIGS[kind])
    encoded, hidden, stats = run(tight)
    encoded_loose, hidden_loose, stats_loose = run(loose)
    inputs, targets = np.asarray(tight["encoder_input_tokens"]) > 0, np.asarray(tight["decoder_target_tokens"]) > 0
    np.testing.assert_allclose(encoded[inputs], encoded_loose[:, :9][inputs], rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(hidden[targets], hidden_loose[:, :5][targets], rtol=2e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(stats), jax.tree.leaves(stats_loose), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("padding", ["ignored", "counted", "routed", "zeroed"])
def test_one_row_of_mask_for_all_queries_changes_nothing_that_is_read(padding: Any) -> None:
    # Without segments padding attends to something, where nobody reads what it gets; with them, to nothing.
    moe = MoEConfig(3, group_size=64, eval_capacity_factor=0.5, min_expert_capacity=1, padding=padding)
    model, params = model_and_params(dataclasses.replace(DENSE, moe=moe))
    tokens = unpacked(examples([(6, 4), (3, 5), (9, 2)]), 9, 5)["encoder_input_tokens"]

    @jax.jit
    def encode(tokens: Array) -> Any:
        module, segments = model.bind(params), (tokens > 0).astype(jnp.int32)
        return module.encode(tokens), module.encode(tokens, segments)

    (encoded, stats), (expected, expected_stats) = encode(tokens)
    real = np.asarray(tokens) > 0
    np.testing.assert_allclose(encoded[real], expected[real], rtol=2e-5, atol=1e-5)
    for one, other in zip(jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def other_token(tokens: Array) -> Array:
    """Another real token in the place of each."""
    return (tokens - 1) % 30 + 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_decoder_sees_no_later_input_and_the_encoder_sees_all(kind: str) -> None:
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)
    run = forward(CONFIGS[kind])
    _, hidden, _ = run(batch)
    inputs = batch["decoder_input_tokens"]
    changed_input = batch | {"decoder_input_tokens": inputs.at[:, 3].set(other_token(inputs[:, 3]))}
    _, later, _ = run(changed_input)
    np.testing.assert_array_equal(later[:, :3], hidden[:, :3])
    assert (np.abs(np.asarray(later - hidden)[:, 3:]).max(-1) > 1e-4).all()
    inputs = batch["encoder_input_tokens"]
    last_token = batch | {"encoder_input_tokens": inputs.at[:, -1].set(other_token(inputs[:, -1]))}
    encoded, _, _ = run(batch)
    encoded_changed, hidden_changed, _ = run(last_token)
    assert (np.abs(np.asarray(encoded_changed - encoded)).max(-1) > 1e-5).all()
    assert (np.abs(np.asarray(hidden_changed - hidden)).max(-1) > 1e-5).all()


def test_the_targets_values_do_not_reach_the_hidden_states() -> None:
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)
    other = batch | {"decoder_target_tokens": batch["decoder_target_tokens"] % 7 + 1}
    for one, another in zip(
        jax.tree.leaves(forward(SPARSE)(batch)), jax.tree.leaves(forward(SPARSE)(other)), strict=True
    ):
        np.testing.assert_array_equal(one, another)


def test_one_sequence_does_not_see_another() -> None:
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)
    other = batch | {
        "encoder_input_tokens": other_token(batch["encoder_input_tokens"]).at[1:].set(batch["encoder_input_tokens"][1:])
    }
    _, hidden, _ = forward(SPARSE)(batch)
    _, changed, _ = forward(SPARSE)(other)
    np.testing.assert_array_equal(changed[1:], hidden[1:])
    assert (np.asarray(changed[0]) != np.asarray(hidden[0])).any()


def test_statistics_count_the_real_tokens_of_each_stack() -> None:
    _, _, stats = forward(SPARSE)(unpacked(examples([(6, 4), (3, 5), (9, 2)]), 9, 5))
    stacks = stats.stacks()
    assert set(stacks) == {"encoder", "decoder"}
    np.testing.assert_array_equal(stacks["encoder"].tokens, [18])
    np.testing.assert_array_equal(stacks["decoder"].tokens, [11])
    np.testing.assert_array_equal(stacks["encoder"].expert_load.sum(-1), [18])
    np.testing.assert_array_equal(stacks["decoder"].dropped, [0])


def test_a_dense_model_has_no_statistics() -> None:
    _, _, stats = forward(DENSE)(unpacked(examples([(9, 5)] * 3), 9, 5))
    assert stats.stacks() == {}


def test_tied_logits_are_the_embedding_scaled_by_the_root_of_its_size() -> None:
    tied, params = model_and_params(DENSE)
    untied = Model(dataclasses.replace(DENSE, tied_logits=False))
    assert set(untied.abstract_params) == set(tied.abstract_params) | {"logits_dense"}
    table = params["embedding"]["table"]
    untied_params = params | {"logits_dense": {"kernel": table.T}}
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)

    @jax.jit
    def run(batch: dict[str, Array]) -> tuple[Array, Array]:
        modules = tied.bind(params), untied.bind(untied_params)
        results = [logits(module(batch)[0], module.output_kernel()) for module in modules]
        return results[0], results[1]

    of_tied, of_untied = run(batch)
    assert of_tied.shape == (3, 5, 32)
    np.testing.assert_allclose(of_tied * np.sqrt(8), of_untied, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_has_float32_parameters_and_logits_and_rounds_between() -> None:
    model, params = model_and_params(dataclasses.replace(SPARSE, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.abstract_params)} == {jnp.dtype("float32")}
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)
    encoded, hidden, stats = forward(model.config)(batch)
    assert encoded.dtype == jnp.bfloat16
    assert hidden.dtype == jnp.float32
    assert logits(hidden, model.bind(params).output_kernel()).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    _, exact, _ = forward(SPARSE)(batch)
    error = float(jnp.linalg.norm(hidden - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.1


def test_a_float32_model_stays_in_float32() -> None:
    batch = unpacked(examples([(9, 5)] * 3), 9, 5)
    assert {leaf.dtype for leaf in jax.tree.leaves(forward(SPARSE)(batch))} == {jnp.dtype("float32")}


def test_binding_parameters_and_reading_them_back_is_the_identity() -> None:
    model, params = model_and_params(SPARSE)
    back = nnx.to_pure_dict(nnx.state(model.bind(params), nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_every_parameter_has_an_axis_for_each_dimension_and_a_rule_for_each_axis() -> None:
    for config in (SPARSE, dataclasses.replace(DENSE, tied_logits=False)):
        model = Model(config)

        def check(leaf: Any, axes: tuple[str | None, ...]) -> None:
            assert len(axes) == leaf.ndim
            assert {axis for axis in axes if axis is not None} <= set(LOGICAL_AXIS_RULES)

        jax.tree.map(check, model.abstract_params, model.axes)


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    size = {"emb_dim": 2, "num_heads": 2, "head_dim": 2, "mlp_dim": 2}
    model = Model(dataclasses.replace(SPARSE, **size, vocab_size=2, relpos_num_buckets=4, relpos_max_distance=8))
    first, again, other = (model.init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(lambda leaf: leaf.shape, model.abstract_params)
    flat = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(first)]
    drawn = [leaf for leaf in flat if (leaf != 1).any()]
    # No two parameters start from the same draw.
    assert len({leaf[0] for leaf in drawn}) == len(drawn)
    different = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(other)]
    assert all((one != two).all() for one, two in zip(flat, different, strict=True) if (one != 1).any())
