"""What is cut of the examples that a run trains on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from switch_t5.data import truncation
from switch_t5.data.pipeline import DataConfig, get_vocabulary
from switch_t5.data.rows import FOLDER_VARIABLE
from switch_t5.data.truncation import cut_and_ended, find_truncation, is_cut

TASK = "super_glue_boolq_v102"


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of 31, 32 and 33 tokens, and one of 131."""
    folder = tmp_path / "super_glue" / "boolq"
    folder.mkdir(parents=True)
    lines = [{"passage": "a" * length, "question": "x", "label": 1, "idx": 0} for length in (3, 4, 5, 103)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


def test_examples_longer_than_the_lengths_with_their_end_are_counted() -> None:
    (found,) = find_truncation(DataConfig(TASK, {"inputs": 32, "targets": 5}, 4))
    assert (found.task, found.examples, found.cut) == (TASK, 4, {"inputs": 2, "targets": 0})
    (found,) = find_truncation(DataConfig(TASK, {"inputs": 131, "targets": 4}, 4))
    assert found.cut == {"inputs": 0, "targets": 4}


def test_inputs_are_cut_before_their_end_and_counted_where_they_are() -> None:
    vocabulary = get_vocabulary(DataConfig(TASK, {"inputs": 32, "targets": 5}, 4))
    for length, tokens, cut in (
        (4, [7, 8, 9, 1], False),
        (3, [7, 8, 1], True),
        (1, [1], True),
        (5, [7, 8, 9, 1], False),
    ):
        made = cut_and_ended(vocabulary, [7, 8, 9], length)
        assert (made.tolist(), made.dtype, is_cut([7, 8, 9], length)) == (tokens, np.int32, cut)


def test_no_more_than_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "EXAMINED", 3)
    with (tmp_path / "super_glue" / "boolq" / "train.jsonl").open("a") as file:
        file.write("{\n")
    (found,) = find_truncation(DataConfig(TASK, {"inputs": 32, "targets": 5}, 4))
    assert (found.examples, found.cut["inputs"]) == (3, 1)


def test_text_without_labels_is_cut_to_fit_and_not_counted() -> None:
    assert find_truncation(DataConfig("sotu_span_corruption", {"inputs": 32, "targets": 16}, 4)) == []
