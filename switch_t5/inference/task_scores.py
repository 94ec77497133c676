"""Tasks scored as they are used: inputs decoded, and the texts compared with the targets.

The semantics are those of seqio's Evaluator: each task's rows are read and encoded once, in their order; predictions
are matched with their own examples, so that neither padding nor the order of batches reaches a score; a task's metrics
see all of its examples at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switch_t5.data.pipeline import DataConfig, get_vocabulary
from switch_t5.data.rows import numbered_rows, read_rows
from switch_t5.data.text_to_text import (
    UNKNOWN,
    Example,
    Scores,
    TextToTextTask,
    get_task,
    label_numbers,
    task_names_of,
)
from switch_t5.data.truncation import cut_and_ended, is_cut
from switch_t5.errors import UserError
from switch_t5.inference.config import EvaluationConfig
from switch_t5.inference.predictor import Output, Predictor
from switch_t5.storage import storage_errors, writable_directory
from switch_t5.types import Params

SUMMARY = "score"
"""The mean of a task's metrics, by which the benchmarks average and the best checkpoint is kept."""


@dataclasses.dataclass(frozen=True)
class EncodedTask:
    """A task's examples, ready to be decoded.

    Attributes:
      task: which.
      examples: in the order of the rows.
      inputs: int32 tokens of each, ended, and cut to the inputs' length.
      truncated: how many were cut.
    """

    task: TextToTextTask
    examples: list[Example]
    inputs: list[np.ndarray]
    truncated: int


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task's evaluation gave.

    Attributes:
      scores: the metrics, ``score`` (their mean), ``examples``, and where there are any ``truncated`` inputs and
        ``unparsed`` predictions, those that are no label. Without metrics where targets are secret.
      examples: what was asked.
      predictions: the text for each.
    """

    scores: Scores
    examples: list[Example]
    predictions: list[str]


def scored_tasks(data: DataConfig, config: EvaluationConfig) -> tuple[str, ...]:
    """The names of the tasks to score; none where the data has no labelled task.

    Raises:
      UserError: a name is no labelled task's.
    """
    if config.tasks is not None:
        return tuple(get_task(name).name for name in config.tasks)
    return tuple(name for name in task_names_of(data.mixture_or_task_name) if config.split in get_task(name).splits)


class TaskScorer:
    """Scores tasks with a predictor; rows are read when it is made.

    Attributes:
      tasks: what is scored.
    """

    def __init__(self, data: DataConfig, config: EvaluationConfig, predictor: Callable[[], Predictor]) -> None:
        """Reads and encodes.

        Raises:
          UserError: a task's data is absent or malformed.
        """
        self._vocabulary = get_vocabulary(data)
        self._predictor = predictor
        length = data.task_feature_lengths["inputs"]
        self.tasks = [
            encode_task(get_task(name), config, self._vocabulary, length) for name in scored_tasks(data, config)
        ]

    def results(self, params: Params) -> dict[str, TaskResult]:
        """Decodes every task's inputs and scores them, by the task's name."""
        predict = self._predictor()
        return {task.task.name: self._result(task, predict(params, task.inputs)) for task in self.tasks}

    def scores(self, params: Params) -> dict[str, Scores]:
        """The scores alone, as the training loop takes them."""
        return {name: result.scores for name, result in self.results(params).items()}

    def _result(self, task: EncodedTask, outputs: Sequence[Sequence[Output]]) -> TaskResult:
        texts = [self._vocabulary.decode(best[0].tokens.tolist()) for best in outputs]
        return TaskResult(score(task.task, task.examples, texts, task.truncated), task.examples, texts)


def encode_task(task: TextToTextTask, config: EvaluationConfig, vocabulary: Any, length: int) -> EncodedTask:
    """Reads a split and encodes its inputs.

    Raises:
      UserError: the data is absent or malformed, or the split is empty.
    """
    examples = task.to_evaluate(read_rows(task, config.split))[: config.num_examples]
    if not examples:
        raise UserError(f"{task.name} has no example in its split {config.split!r}.")
    inputs, truncated = [], 0
    for example in examples:
        tokens = vocabulary.encode(example.inputs)
        truncated += is_cut(tokens, length)
        inputs.append(cut_and_ended(vocabulary, tokens, length))
    return EncodedTask(task, examples, inputs, truncated)


def score(task: TextToTextTask, examples: Sequence[Example], predictions: Sequence[str], truncated: int = 0) -> Scores:
    """Scores texts; see :class:`TaskResult`.

    Raises:
      UserError: there is not one prediction for each example.
    """
    if len(examples) != len(predictions):
        raise UserError(f"{task.name} has {len(examples)} examples, but there are {len(predictions)} predictions.")
    scores: Scores = {}
    if not any(map(task.is_secret, examples)):
        scores = task.metrics(examples, predictions)
        scores[SUMMARY] = float(np.mean(list(scores.values())))
    scores["examples"] = len(examples)
    if truncated:
        scores["truncated"] = truncated
    words = {example.targets for example in examples}
    if task.labels is not None and words <= {*task.labels, UNKNOWN}:
        unparsed = sum(number < 0 for number in label_numbers(predictions, task.labels))
        scores |= {"unparsed": unparsed} if unparsed else {}
    return scores


def write_predictions(folder: Path, name: str, result: TaskResult) -> Path:
    """Writes ``<folder>/<task>.jsonl``, a line for each example: its inputs, target and prediction; returns the path.

    Raises:
      UserError: the folder cannot be written.
    """
    path = writable_directory(folder, "The predictions' folder") / f"{name}.jsonl"
    with storage_errors(f"Writing {path}"), open(path, "w", encoding="utf-8") as file:
        for example, text in zip(result.examples, result.predictions, strict=True):
            line = {"inputs": example.inputs, "target": example.targets, "prediction": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def read_predictions(path: Path) -> list[str]:
    """The predictions of a file that :func:`write_predictions` wrote, or any JSON lines with ``prediction``.

    Raises:
      UserError: a line is malformed.
    """
    predictions = []
    for number, row in numbered_rows(path):
        if not isinstance(row.get("prediction"), str):
            raise UserError(f"{path}:{number} lacks the text field 'prediction'.")
        predictions.append(row["prediction"])
    return predictions
