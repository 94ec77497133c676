"""Layouts of sparse layers, and the sentences for numbers that make no model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from switch_t5.errors import ConfigError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import LayerLayout, TransformerConfig, sparse_layers

CONFIG = TransformerConfig(
    vocab_size=32,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=4,
    num_decoder_layers=3,
    moe=MoEConfig(4),
)


@pytest.mark.parametrize(
    ("layout", "num_layers", "sparse"),
    [
        (1, 3, {0, 1, 2}),
        (2, 4, {1, 3}),
        (2, 5, {1, 3}),
        (2, 12, {1, 3, 5, 7, 9, 11}),  # The paper's every other layer, as released.
        (3, 7, {2, 5}),
        (4, 4, {3}),
        ("none", 3, set()),
        ("first:1", 3, {0}),
        ("first:3", 3, {0, 1, 2}),
        ("last:2", 5, {3, 4}),
        ((0, 3), 4, {0, 3}),
        ((3, 0), 4, {0, 3}),
        ((), 4, set()),
    ],
)
def test_a_layout_says_which_layers_are_sparse(layout: LayerLayout, num_layers: int, sparse: set[int]) -> None:
    pattern = sparse_layers(layout, num_layers)
    assert len(pattern) == num_layers
    assert {index for index, is_sparse in enumerate(pattern) if is_sparse} == sparse


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (0, "must be from 1 to 4 where it is a frequency, got 0."),
        (5, "must be from 1 to 4 where it is a frequency, got 5."),
        ((1, 4), "names block 4, but the blocks are 0 to 3."),
        ((-1,), "names block -1, but the blocks are 0 to 3."),
        *[
            (
                layout,
                "must be a frequency, 'none', 'first:n', 'last:n' (n from 1 to 4) or a tuple of indices, "
                f"got {layout!r}.",
            )
            for layout in ("first", "first:", "first:0", "last:5", "middle:2", "last:-1", "all", "")
        ],
    ],
)
def test_a_layout_that_is_none_is_refused_by_name(layout: LayerLayout, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, encoder_sparse_layers=layout, decoder_sparse_layers=1)
    assert str(caught.value) == f"TransformerConfig.encoder_sparse_layers {message}"


def test_encoder_and_decoder_have_layouts_of_their_own() -> None:
    config = dataclasses.replace(CONFIG, encoder_sparse_layers="last:1", decoder_sparse_layers=(0,))
    assert config.encoder_pattern == (False, False, False, True)
    assert config.decoder_pattern == (True, False, False)


def test_a_dense_model_has_no_sparse_layer_whatever_its_layout() -> None:
    config = dataclasses.replace(CONFIG, moe=None, encoder_sparse_layers=99)
    assert config.encoder_pattern == (False,) * 4
    assert config.decoder_pattern == (False,) * 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            (field, 0, "must be at least 1, got 0.")
            for field in (
                "vocab_size",
                "emb_dim",
                "num_heads",
                "head_dim",
                "mlp_dim",
                "num_encoder_layers",
                "num_decoder_layers",
            )
        ],
        ("emb_dim", "768", "must be an integer, got '768'."),
        ("emb_dim", True, "must be an integer, got True."),
        ("scan_layers", 1, "must be True or False, got 1."),
        ("dropout_rate", 1.0, "must be in [0, 1), got 1.0."),
        ("dropout_rate", -0.5, "must be in [0, 1), got -0.5."),
        ("dtype", "float16", "must be one of 'float32', 'bfloat16', got 'float16'. Did you mean 'bfloat16'?"),
        ("initialization", "flax", "must be one of 'paper', 't5x', 't5x_switch', got 'flax'."),
        (
            "mlp_activations",
            ("tanh",),
            "must be one or two of 'relu', 'gelu', 'silu', 'linear', got ('tanh',).",
        ),
        ("mlp_activations", "relu", "must be a sequence of strings, got 'relu'."),
        ("mlp_activations", (), "must be one or two of 'relu', 'gelu', 'silu', 'linear', got ()."),
        (
            "mlp_activations",
            ("relu", "relu", "relu"),
            "must be one or two of 'relu', 'gelu', 'silu', 'linear', got ('relu', 'relu', 'relu').",
        ),
        ("relpos_num_buckets", 31, "must be even and at least 4, got 31."),
        ("relpos_num_buckets", 2, "must be even and at least 4, got 2."),
        ("relpos_max_distance", 16, "must be above half of relpos_num_buckets, 16, got 16."),
    ],
)
def test_a_wrong_number_is_refused_by_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **{field: value})
    assert caught.value.parameter == f"TransformerConfig.{field}"
    assert str(caught.value) == f"TransformerConfig.{field} {message}"


def test_a_decoders_variant_of_no_sparse_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^TransformerConfig\.decoder_moe has no effect without .*\.moe, "):
        dataclasses.replace(CONFIG, moe=None, decoder_moe=MoEConfig(4))
    with pytest.raises(ConfigError, match=r"^TransformerConfig\.decoder_moe has no effect: no block of the decoder "):
        dataclasses.replace(CONFIG, moe=MoEConfig(4), decoder_moe=MoEConfig(4), decoder_sparse_layers="none")


@pytest.mark.parametrize(
    ("field", "value"), [("attention_sparse_projections", ("out",)), ("attention_expert_dtype", "bfloat16")]
)
def test_a_setting_of_sparse_attention_that_there_is_not_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^TransformerConfig\.{field} has no effect without .*\.attention_moe; "):
        dataclasses.replace(CONFIG, attention_moe=None, **{field: value})


def test_activations_may_be_a_list() -> None:
    activations: Any = ["gelu", "linear"]
    assert dataclasses.replace(CONFIG, mlp_activations=activations).mlp_activations == ("gelu", "linear")
