"""The lengths of span corruption."""

from __future__ import annotations

import pytest

from switch_t5.data.lengths import SpanCorruptionLengths, corrupted_lengths, span_corruption_lengths
from switch_t5.errors import ConfigError


def test_t5_lengths_are_568_raw_tokens_512_inputs_and_114_targets() -> None:
    # 15% of 568 is 85.2, so 85 noise tokens in round(85 / 3) = 28 spans:
    # inputs 568 - 85 + 28 + 1 = 512, targets 85 + 28 + 1 = 114.
    expected = SpanCorruptionLengths(raw=568, inputs=512, targets=114, spans=28)
    assert span_corruption_lengths(512) == expected
    assert corrupted_lengths(568) == expected


@pytest.mark.parametrize(
    ("inputs", "raw", "targets"),
    [(10, 10, 4), (64, 70, 14), (128, 141, 29), (256, 284, 58), (1024, 1137, 229)],
)
def test_lengths_at_other_sizes(inputs: int, raw: int, targets: int) -> None:
    lengths = span_corruption_lengths(inputs)
    assert (lengths.raw, lengths.targets) == (raw, targets)


def test_raw_text_is_the_longest_that_fits() -> None:
    for inputs in range(10, 4000):
        lengths = span_corruption_lengths(inputs)
        assert lengths.inputs <= inputs < corrupted_lengths(lengths.raw + 1).inputs


def test_at_half_noise_targets_are_no_longer_than_inputs() -> None:
    lengths = span_corruption_lengths(512, noise_density=0.5)
    assert lengths.targets <= 512


def test_inputs_too_short_to_corrupt_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        span_corruption_lengths(9)
    assert str(error.value) == ("DataConfig.task_feature_lengths has inputs=9; span corruption needs 10 or more.")
