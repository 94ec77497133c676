"""What is longer than a model reads, and so is cut: inputs of evaluation and inference, and a run's examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from switch_t5.data.pipeline import DataConfig, get_vocabulary
from switch_t5.data.rows import read_rows
from switch_t5.data.text_to_text import get_task, task_names_of

if TYPE_CHECKING:
    import seqio

EXAMINED = 1000
"""Rows of a split that are looked at: encoding all of a large one would take minutes."""


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is cut of the examples of a task's first rows.

    Attributes:
      task: its name.
      examples: how many were looked at.
      cut: for ``inputs`` and ``targets``, how many have more tokens than the configuration's lengths.
    """

    task: str
    examples: int
    cut: dict[str, int]


def is_cut(tokens: Sequence[int], length: int) -> bool:
    """Whether a text's tokens and their end of sequence are more than ``length``."""
    return len(tokens) >= length


def cut_and_ended(vocabulary: seqio.Vocabulary, tokens: Sequence[int], length: int) -> np.ndarray:
    """The first of a text's tokens and the end of sequence, ``[at most length]`` int32."""
    return np.asarray([*tokens[: length - 1], vocabulary.eos_id], np.int32)


def find_truncation(config: DataConfig) -> list[Truncation]:
    """Counts, for each labelled task that a configuration reads, what is cut of its first rows' examples.

    Raises:
      UserError: a task's rows are absent or malformed.
    """
    vocabulary, found = get_vocabulary(config), []
    for task in map(get_task, task_names_of(config.mixture_or_task_name)):
        if config.split not in task.splits:
            continue
        examples = [example for row in read_rows(task, config.split, EXAMINED) for example in task.examples(row)]
        cut = {}
        for feature, length in config.task_feature_lengths.items():
            tokens = (vocabulary.encode(getattr(example, feature)) for example in examples)
            cut[feature] = sum(is_cut(of_example, length) for of_example in tokens)
        found.append(Truncation(task.name, len(examples), cut))
    return found
