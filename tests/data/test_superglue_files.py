"""The submission files against the format of the benchmark's server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switch_t5.data.superglue_files import submission_lines, write_submission
from switch_t5.data.text_to_text import Example
from switch_t5.errors import UserError


def example(idx: Any, targets: str = "<unk>") -> Example:
    return Example("inputs", targets, {"idx": idx})


@pytest.mark.parametrize(
    ("config", "predictions", "labels"),
    [
        ("boolq", ["True", "False", "what"], ["true", "false", "false"]),
        ("cb", ["neutral", "contradiction", ""], ["neutral", "contradiction", "entailment"]),
        ("copa", ["choice2", "choice1", "x"], [1, 0, 0]),
        ("rte", ["not_entailment", "entailment", "x"], ["not_entailment", "entailment", "entailment"]),
        ("wic", ["True", "False", "x"], ["true", "false", "false"]),
        ("axb", ["not_entailment", "entailment", "x"], ["not_entailment", "entailment", "entailment"]),
        ("axg", ["not_entailment", "entailment", "x"], ["not_entailment", "entailment", "entailment"]),
    ],
)
def test_a_line_has_the_rows_number_and_the_label(config: str, predictions: list[str], labels: list[Any]) -> None:
    lines = submission_lines(config, [example(idx) for idx in (5, 6, 7)], predictions)
    assert lines == [{"idx": idx, "label": label} for idx, label in zip((5, 6, 7), labels, strict=True)]


def test_wsc_says_whether_the_candidate_is_meant() -> None:
    lines = submission_lines("wsc", [example(0, "Bob Smith"), example(1, "Ann")], ["Smith", "Bob"])
    assert lines == [{"idx": 0, "label": "True"}, {"idx": 1, "label": "False"}]


def test_record_gives_text_by_the_querys_number() -> None:
    lines = submission_lines("record", [example({"passage": 1, "query": 9})], ["Ann"])
    assert lines == [{"idx": 9, "label": "Ann"}]


def test_multirc_nests_answers_in_questions_in_paragraphs() -> None:
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 2), (3, 2, 3)]
    rows = [example({"paragraph": p, "question": q, "answer": a}) for p, q, a in places]
    first = [
        {"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]},
        {"idx": 1, "answers": [{"idx": 2, "label": 0}]},
    ]
    assert submission_lines("multirc", rows, ["True", "False", "?", "True"]) == [
        {"idx": 0, "passage": {"questions": first}},
        {"idx": 3, "passage": {"questions": [{"idx": 2, "answers": [{"idx": 3, "label": 1}]}]}},
    ]


def test_files_have_the_servers_names_and_a_line_each(tmp_path: Path) -> None:
    path = write_submission(
        tmp_path / "made", "axb", [{"idx": 0, "label": "entailment"}, {"idx": 1, "label": "entailment"}]
    )
    assert path.name == "AX-b.jsonl"
    assert [json.loads(line)["idx"] for line in path.read_text().splitlines()] == [0, 1]


def test_rows_without_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The rows of cb have no 'idx'"):
        write_submission(tmp_path, "cb", [{"idx": None, "label": "neutral"}])
