"""Slots and groups by hand."""

from __future__ import annotations

from typing import Any

import pytest

from switch_t5.errors import ConfigError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.routing.capacity import Rounding, expert_capacity, group_shape, sequences_per_group


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "rounding", "slots"),
    [
        (10, 4, 1.25, "floor", 3),  # 3.125
        (10, 4, 1.25, "round", 3),
        (10, 4, 1.25, "ceil", 4),
        (24, 4, 1.25, "floor", 7),  # 7.5: half to even
        (24, 4, 1.25, "round", 8),
        (26, 4, 1.0, "round", 6),  # 6.5: half to even
        (26, 4, 1.0, "ceil", 7),
        (32, 4, 1.0, "ceil", 8),  # exactly 8
    ],
)
def test_capacity_is_tokens_over_experts_times_the_factor(
    tokens: int, experts: int, factor: float, rounding: Rounding, slots: int
) -> None:
    assert expert_capacity(tokens, experts, factor, min_expert_capacity=1, rounding=rounding) == slots


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "slots"),
    [(110, 11, 1.1, 11), (100, 10, 2.2, 22), (50, 5, 1.1, 11), (99, 7, 1, 15)],
)
def test_a_ceiling_is_that_of_the_quotient_and_not_of_its_rounding_error(
    tokens: int, experts: int, factor: float, slots: int
) -> None:
    assert expert_capacity(tokens, experts, factor, min_expert_capacity=1, rounding="ceil") == slots


def test_a_floor_and_a_rounding_are_those_of_the_sources_float_to_the_last_bit() -> None:
    # 100 x 1.15 is 114.99999999999999 as a float64: Mesh TensorFlow has 22 slots, where 23 would be exact.
    assert expert_capacity(100, 5, 1.15, min_expert_capacity=1) == int(100 * 1.15 / 5) == 22
    # 100 x 2.3 / 4 is 57.49999999999999: T5X has 57, where 57.5 would round to 58.
    assert expert_capacity(100, 4, 2.3, min_expert_capacity=1, rounding="round") == round(100 * 2.3 / 4) == 57


@pytest.mark.parametrize("field", ["train_capacity_factor", "eval_capacity_factor"])
def test_a_factor_beyond_any_number_of_experts_is_refused(field: str) -> None:
    factor: dict[str, Any] = {field: 1e38}
    with pytest.raises(ConfigError, match=rf"MoEConfig.{field} must be at most 1e\+06, got 1e\+38; num_experts, 8, is"):
        MoEConfig(8, **factor)
    largest = MoEConfig(8, **{field: 1e6})
    assert largest.capacity(4096, train=field.startswith("train")) == 4096


def test_capacity_of_the_published_models() -> None:
    # Tokens of a group, experts, and the factors of training and evaluation.
    assert expert_capacity(8192, 128, 1.25, rounding="round") == 80
    assert expert_capacity(8192, 128, 2.0, rounding="round") == 128
    assert expert_capacity(2048, 2048, 1.0, min_expert_capacity=2, rounding="round") == 2
    assert expert_capacity(1024, 32, 1.25) == 40


def test_capacity_is_never_below_its_minimum_nor_above_the_groups_tokens() -> None:
    assert expert_capacity(8, 8, 1.0) == 4
    assert expert_capacity(8, 8, 1.0, min_expert_capacity=2) == 2
    assert expert_capacity(8, 2, 8.0) == 8
    assert expert_capacity(2, 8, 1.0, min_expert_capacity=4) == 2


@pytest.mark.parametrize("rounding", ["floor", "round", "ceil"])
def test_an_expert_has_a_slot_however_small_the_factor(rounding: Rounding) -> None:
    for tokens in (1, 7, 4096):
        assert expert_capacity(tokens, 2048, 1e-9, min_expert_capacity=1, rounding=rounding) == 1


def test_a_group_holds_whole_encoder_sequences_and_one_at_the_least() -> None:
    assert sequences_per_group(4096, 512) == 8
    assert sequences_per_group(1000, 512) == 1
    assert sequences_per_group(100, 512) == 1


def test_encoder_and_decoder_group_the_same_sequences() -> None:
    sequences = sequences_per_group(32, 16)
    assert group_shape(8, 16, 32, sequences) == (4, 32)
    assert group_shape(8, 4, 32, sequences) == (4, 8)


def test_a_sequence_longer_than_the_group_is_cut_into_equal_parts() -> None:
    assert group_shape(2, 12, 8, 1) == (4, 6)
    assert group_shape(2, 16, 8, 1) == (4, 8)
    assert group_shape(2, 13, 8, 1) == (26, 1)


def test_a_batch_smaller_than_a_group_is_one_group() -> None:
    assert group_shape(3, 16, 64, 4) == (1, 48)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 4 sequences do not divide a batch of 6"):
        group_shape(6, 16, 64, 4)


@pytest.mark.parametrize(("length", "group_size"), [(16, 64), (16, 16), (16, 8), (12, 30)])
def test_a_group_does_not_depend_on_how_a_batch_is_split(length: int, group_size: int) -> None:
    sequences = sequences_per_group(group_size, length)
    groups, tokens = group_shape(8 * sequences, length, group_size, sequences)
    for parts in (2, 4, 8):
        share = group_shape(8 * sequences // parts, length, group_size, sequences)
        assert share == (groups // parts, tokens)


@pytest.mark.parametrize("length", [16, 3, 5000])
def test_a_sequence_may_be_a_group_whatever_its_length(length: int) -> None:
    assert sequences_per_group("sequence", 16) == 1
    assert group_shape(6, length, "sequence", 1) == (6, length)
