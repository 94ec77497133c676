"""How many tokens of raw text make inputs and targets of given lengths under span corruption."""

from __future__ import annotations

from typing import NamedTuple

from switch_t5.errors import ConfigError

NOISE_DENSITY = 0.15
MEAN_NOISE_SPAN_LENGTH = 3.0

# With fewer tokens the mask's rule "at least one span of at least one token" overrules the rounding below,
# and an example could be a token longer than calculated.
_SHORTEST_INPUTS = 10


class SpanCorruptionLengths(NamedTuple):
    """Lengths in tokens of one example of span corruption.

    Attributes:
      raw: uncorrupted text cut from a document.
      inputs: the text with each noise span replaced by one sentinel, and the end-of-sequence token.
      targets: each noise span behind its sentinel, and the end-of-sequence token.
      spans: noise spans, thus sentinels needed.
    """

    raw: int
    inputs: int
    targets: int
    spans: int


def corrupted_lengths(
    raw: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> SpanCorruptionLengths:
    """Returns what `raw` tokens of text become."""
    noise = round(raw * noise_density)
    spans = round(noise / mean_noise_span_length)
    return SpanCorruptionLengths(raw=raw, inputs=raw - noise + spans + 1, targets=noise + spans + 1, spans=spans)


def span_corruption_lengths(
    inputs_length: int,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> SpanCorruptionLengths:
    """Returns the longest raw text whose corrupted inputs fit in `inputs_length` tokens.

    T5's calculation: `inputs_length=512` gives 568 raw tokens and 114 target tokens.

    Raises:
      ConfigError: `inputs_length` is too short to corrupt.
    """
    if inputs_length < _SHORTEST_INPUTS:
        raise ConfigError(
            "DataConfig.task_feature_lengths",
            f"has inputs={inputs_length}; span corruption needs {_SHORTEST_INPUTS} or more.",
        )
    lengths = corrupted_lengths(inputs_length - 1, noise_density, mean_noise_span_length)
    while True:
        longer = corrupted_lengths(lengths.raw + 1, noise_density, mean_noise_span_length)
        if longer.inputs > inputs_length:
            break
        lengths = longer
    # At half noise, inputs and targets are meant to be the same round number.
    if noise_density == 0.5 and lengths.targets > lengths.inputs:
        lengths = lengths._replace(raw=lengths.raw - 1, targets=lengths.targets - 1)
    return lengths
