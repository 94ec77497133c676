"""Scores of tasks: rows to inputs, outputs to texts, files of predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switch_t5.data.pipeline import DataConfig
from switch_t5.data.rows import FOLDER_VARIABLE
from switch_t5.data.text_to_text import get_task
from switch_t5.errors import ConfigError, UserError
from switch_t5.inference.config import EvaluationConfig
from switch_t5.inference.predictor import Output, buckets
from switch_t5.inference.task_scores import TaskScorer, read_predictions, score, scored_tasks, write_predictions

ROWS = [
    {"passage": "It is wet.", "question": "is it wet", "label": 1, "idx": 0},
    {"passage": "It is dry.", "question": "is it wet", "label": 0, "idx": 1},
    {"passage": "No one knows whether it is " + "very " * 40 + "wet.", "question": "is it wet", "label": 0, "idx": 2},
]
DATA = DataConfig("super_glue_boolq_v102", {"inputs": 100, "targets": 8}, 4)


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "super_glue" / "boolq"
    folder.mkdir(parents=True)
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "test.jsonl").write_text(json.dumps(ROWS[0] | {"label": -1}) + "\n")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


class SaysTrueToWet:
    """A predictor that reads its bytes."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, params: Any, inputs: list[np.ndarray]) -> list[list[Output]]:
        self.seen += inputs
        said = [b"True" if b"is wet." in bytes(int(token) - 3 for token in row[:-1]) else b"no" for row in inputs]
        return [[Output(np.asarray([*(byte + 3 for byte in text), 1]), -1.0, -1.0)] for text in said]


def test_a_task_is_decoded_and_scored() -> None:
    predictor = SaysTrueToWet()
    scorer = TaskScorer(DATA, EvaluationConfig(), lambda: predictor)  # pyright: ignore[reportArgumentType]
    result = scorer.results({})["super_glue_boolq_v102"]
    assert result.predictions == ["True", "no", "no"]
    third = pytest.approx(100 / 3)
    assert result.scores == {"accuracy": third, "score": third, "examples": 3, "truncated": 1, "unparsed": 2}
    assert scorer.scores({}) == {"super_glue_boolq_v102": result.scores}
    # Cut to the inputs' length, and ended all the same.
    assert [len(row) for row in predictor.seen[:3]] == [46, 46, 100]
    assert {row[-1] for row in predictor.seen} == {1}


def test_secret_labels_are_predicted_without_metrics() -> None:
    scorer = TaskScorer(DATA, EvaluationConfig(split="test"), SaysTrueToWet)  # pyright: ignore[reportArgumentType]
    assert scorer.scores({}) == {"super_glue_boolq_v102": {"examples": 1}}
    (task,) = scorer.tasks
    assert score(task.task, task.examples, ["maybe"]) == {"examples": 1, "unparsed": 1}


def test_a_misspelt_split_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"split must be one of train, validation, test, got 'tset'. Did you mean 'test'"
    ):
        EvaluationConfig(split="tset")


def test_the_first_examples_alone() -> None:
    scorer = TaskScorer(DATA, EvaluationConfig(num_examples=1), SaysTrueToWet)  # pyright: ignore[reportArgumentType]
    assert scorer.scores({})["super_glue_boolq_v102"] == {"accuracy": 100, "score": 100, "examples": 1}


def test_a_file_of_predictions_is_scored_as_they_were(tmp_path: Path) -> None:
    scorer = TaskScorer(DATA, EvaluationConfig(), SaysTrueToWet)  # pyright: ignore[reportArgumentType]
    (name, result), *_ = scorer.results({}).items()
    path = write_predictions(tmp_path / "made", name, result)
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {
        "inputs": "boolq passage: It is wet. question: is it wet",
        "target": "True",
        "prediction": "True",
    }
    assert read_predictions(path) == result.predictions
    task = get_task(name)
    assert score(task, result.examples, read_predictions(path))["accuracy"] == pytest.approx(100 / 3)
    with pytest.raises(UserError, match="has 3 examples, but there are 2 predictions"):
        score(task, result.examples, ["True", "False"])
    path.write_text('{"prediction": 3}\n')
    with pytest.raises(UserError, match=r"jsonl:1 lacks the text field 'prediction'"):
        read_predictions(path)


def test_which_tasks_are_scored() -> None:
    assert scored_tasks(DATA, EvaluationConfig()) == ("super_glue_boolq_v102",)
    assert scored_tasks(DATA, EvaluationConfig(tasks=())) == ()
    pretraining = DataConfig("sotu_span_corruption", {"inputs": 32, "targets": 16}, 4)
    assert scored_tasks(pretraining, EvaluationConfig()) == ()
    assert scored_tasks(pretraining, EvaluationConfig(tasks=("super_glue_cb_v102",))) == ("super_glue_cb_v102",)
    mixture = DataConfig("super_glue_v102_proportional", {"inputs": 32, "targets": 16}, 4)
    names = scored_tasks(mixture, EvaluationConfig())
    assert "super_glue_wsc_v102_simple_eval" in names
    assert "super_glue_wsc_v102_simple_train" not in names
    with pytest.raises(UserError, match="Did you mean 'super_glue_cb_v102'"):
        scored_tasks(DATA, EvaluationConfig(tasks=("superglue_cb_v102",)))


def test_inputs_are_padded_to_few_lengths() -> None:
    assert buckets(512) == (16, 32, 64, 128, 256, 512)
    assert buckets(100) == (16, 32, 64, 100)
    assert buckets(8) == (8,)
