"""Masked text in, the model's words for the masks out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

BLANK = re.compile(r"_{3,}")
"""What a user writes for a masked span."""

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def encode_blanks(text: str, vocabulary: Any, sentinels: int, length: int) -> np.ndarray:
    """Tokens of a text whose ``___`` are masked spans.

    Args:
      text: with at least one blank.
      vocabulary: a seqio vocabulary, whose last entries are the sentinels.
      sentinels: how many it has.
      length: of the result.

    Returns:
      ``[length]`` int32, ended and padded.

    Raises:
      ValueError: the text has no blank, more than there are sentinels, or does not fit.
    """
    parts = BLANK.split(text)
    if len(parts) == 1:
        raise ValueError("has no blank; write ___ where words are missing")
    if len(parts) - 1 > sentinels:
        raise ValueError(f"has {len(parts) - 1} blanks, more than the vocabulary's {sentinels} sentinels")
    tokens: list[int] = []
    for index, part in enumerate(parts):
        tokens += vocabulary.encode(part)
        if index < len(parts) - 1:
            tokens.append(vocabulary.vocab_size - 1 - index)
    tokens.append(vocabulary.eos_id)
    if len(tokens) > length:
        raise ValueError(f"takes {len(tokens)} tokens, more than the {length} of the model's inputs")
    return np.pad(np.asarray(tokens, np.int32), (0, length - len(tokens)))


def spans(text: str) -> dict[int, str]:
    """The words behind each sentinel of a decoded target, by the sentinel's number."""
    pieces = _SENTINEL.split(text)
    return {int(number): words.strip() for number, words in zip(pieces[1::2], pieces[2::2], strict=True)}


def filled(masked: str, words: dict[int, str]) -> str:
    """A masked text with each sentinel replaced by the words for it, in brackets; ``...`` where there are none."""
    return _SENTINEL.sub(lambda match: f"[{words.get(int(match[1]), '...')}]", masked)
