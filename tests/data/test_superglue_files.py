"""The submission files against the format of the benchmark's server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from switch_t5.data.superglue import TASKS
from switch_t5.data.superglue_files import FOLDERS, rows_of, submission_lines, write_submission
from switch_t5.data.text_to_text import Example
from switch_t5.errors import UserError
from switch_t5.inference.task_scores import score


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


def test_rows_of_one_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Some rows of cb have the same 'idx'"):
        write_submission(tmp_path, "cb", [{"idx": 3, "label": "neutral"}] * 2)


TEST_LINES: dict[str, dict[str, Any]] = {
    "boolq": {"question": "q", "passage": "p", "idx": 0},
    "cb": {"premise": "p", "hypothesis": "h", "idx": 0},
    "copa": {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "idx": 0},
    "multirc": {
        "idx": 0,
        "passage": {
            "text": "p",
            "questions": [{"question": "q", "idx": 0, "answers": [{"text": "a", "idx": 0}, {"text": "b", "idx": 1}]}],
        },
    },
    "record": {
        "idx": 0,
        "passage": {"text": "Bob met Ann.", "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}]},
        "qas": [{"query": "@placeholder ran", "idx": 7}],
    },
    "rte": {"premise": "p", "hypothesis": "h", "idx": 0},
    "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "idx": 0},
    "wsc": {
        "text": "Then the man saw that he won.",
        "target": {"span1_index": 1, "span1_text": "The man.", "span2_index": 5, "span2_text": "he"},
        "idx": 0,
    },
    "axb": {"sentence1": "a", "sentence2": "b", "idx": 0, "logic": ""},
    "axg": {"premise": "p", "hypothesis": "h", "idx": 0},
}


@pytest.mark.parametrize("config", FOLDERS)
def test_the_benchmarks_own_test_lines_are_answered_and_not_scored(config: str, tmp_path: Path) -> None:
    (task,) = (task for task in TASKS if task.dataset == f"super_glue/{config}" and "test" in task.splits)
    rows = list(rows_of(config, TEST_LINES[config]))
    for row in rows:
        task.check(row, labelled=False)
    examples = task.to_evaluate(rows)
    for text in ("", "True"):
        found = score(task, examples, [text] * len(examples))
        assert {key for key in found if key != "unparsed"} == {"examples"}
        path = write_submission(tmp_path, config, submission_lines(config, examples, [text] * len(examples)))
        assert len(path.read_text().splitlines()) == 1


def test_entities_are_sorted_and_spans_are_as_the_text_has_them() -> None:
    (record,) = rows_of("record", TEST_LINES["record"])
    assert record["entities"] == ["Ann", "Bob"]
    (wsc,) = rows_of("wsc", TEST_LINES["wsc"])
    assert (wsc["span1_text"], wsc["span2_text"]) == ("the man", "he")


def test_rows_without_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The rows of cb have no 'idx'"):
        write_submission(tmp_path, "cb", [{"idx": None, "label": "neutral"}])
