"""``switch-t5 eval``: scores of tasks, or the held-out loss of a pre-trained model beside that of word frequencies."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_t5.cli.output import add_json_flag, refuse_empty, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.cli.build import Run
    from switch_t5.data.text_to_text import Scores
    from switch_t5.inference.task_scores import TaskResult
    from switch_t5.types import Params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument("--checkpoint", metavar="PATH", help="one checkpoint; by default MODEL_DIR's latest")
    parser.add_argument(
        "--unigram_batches", type=int, default=200, metavar="N", help="training batches to count words in"
    )
    parser.add_argument(
        "--predictions", metavar="FOLDER", help="where to write TASK.jsonl: inputs, targets, predictions"
    )
    parser.add_argument(
        "--submission", metavar="FOLDER", help="where to write the benchmark's submission files, of its test rows"
    )
    parser.add_argument(
        "--score_file",
        metavar="FILE",
        help="score the field 'prediction' of these JSON lines, one for each example of the task; no model is read",
    )
    parser.add_argument(
        "--metrics",
        metavar="FOLDER",
        help="where to append to metrics.jsonl, and to draw TensorBoard's curves, as training does in its MODEL_DIR",
    )
    add_json_flag(parser)


_EXCLUDED = {
    "score_file": ("submission", "predictions", "checkpoint", "metrics"),
    "submission": ("json", "metrics"),
}
"""Flags that have no effect beside another."""


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table, and returns 0."""
    from switch_t5.cli.processes import if_first
    from switch_t5.cli.trained import load_params, open_run

    _check_flags(args)
    run = open_run(args.gin_file, args.gin_bindings, args.gin_search_paths)
    if args.metrics is not None and Path(args.metrics).resolve() == Path(run.spec.train.model_dir).resolve():
        raise UserError(f"--metrics={args.metrics} is MODEL_DIR, whose metrics are the run's own: name another folder.")
    if args.score_file is not None:
        return _score_file(run, args)
    if args.submission is not None:
        return _submit(run, args)
    scorer = run.scorer
    if scorer is None and args.predictions is not None:
        raise UserError(f"--predictions is of labelled tasks, and {run.spec.data.mixture_or_task_name} is none.")
    if scorer is None and not run.spec.train.eval_batches:
        raise UserError("TrainConfig.eval_batches is 0, which evaluates nothing: give a number of batches.")
    params, step = load_params(run, args.checkpoint or run.spec.train.model_dir)
    with _recorder(if_first(args.metrics)) as record:
        result: dict[str, Any] = {"step": step, "task": run.spec.data.mixture_or_task_name}
        if run.spec.train.eval_batches:
            held_out = _held_out(run, params, args.unigram_batches)
            record(step, result["task"], held_out)
            result |= held_out
        for name, value in result.items():
            print(f"{name:13} {value:.4f}" if isinstance(value, float) else f"{name:13} {value}", file=sys.stderr)
        if scorer is not None:
            results = scorer.results(params)
            print(table(results), file=sys.stderr)
            _write_predictions(if_first(args.predictions), results)
            result["tasks"] = {name: task.scores for name, task in results.items()}
            for name, scores in result["tasks"].items():
                record(step, name, scores)
    write_json(result, if_first(args.json))
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuses what cannot be used before anything is read.

    Raises:
      UserError: a flag is empty, names a file where a folder is wanted, or has no effect beside another.
    """
    refuse_empty(args, "checkpoint", "predictions", "submission", "score_file", "metrics")
    for flag in ("predictions", "submission", "metrics"):
        if getattr(args, flag) is not None and Path(getattr(args, flag)).is_file():
            raise UserError(f"--{flag}={getattr(args, flag)} is a file: name a folder.")
    if args.unigram_batches < 1:
        raise UserError(f"--unigram_batches must be at least 1, got {args.unigram_batches}.")
    for flag, excluded in _EXCLUDED.items():
        others = [name for name in excluded if getattr(args, name) is not None]
        if getattr(args, flag) is not None and others:
            raise UserError(f"--{others[0]} has no effect with --{flag}: give one of them.")


def table(results: dict[str, TaskResult]) -> str:
    """A line for each task: its metrics, and what was odd; the mean of the scores last where there are several.

    In the mean the tasks of one dataset, such as MNLI's two, count as one.
    """
    from switch_t5.data.text_to_text import get_task
    from switch_t5.inference.task_scores import SUMMARY

    width = max(len(name) for name in results)
    lines = []
    for name, result in results.items():
        told = [
            f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in result.scores.items()
        ]
        lines.append(f"{name:{width}}  {'  '.join(told)}")
    by_dataset: dict[str, list[float]] = {}
    for name, result in results.items():
        if SUMMARY in result.scores and get_task(name).in_the_mean:
            by_dataset.setdefault(get_task(name).dataset, []).append(result.scores[SUMMARY])
    if len(by_dataset) > 1:
        scores = [sum(scores) / len(scores) for scores in by_dataset.values()]
        lines.append(f"{'mean':{width}}  {SUMMARY} {sum(scores) / len(scores):.2f}")
    return "\n".join(lines)


def _held_out(run: Run, params: Params, unigram_batches: int) -> Scores:
    """The held-out loss, and that of word frequencies."""
    from switch_t5.data.pipeline import unigram_counts, unigram_loss

    data, train = run.spec.data, run.spec.train
    result: Scores = dict(run.evaluate(params))
    words = unigram_counts(dataclasses.replace(data, split="validation"), train.eval_batches)
    result["perplexity"] = math.exp(result["loss"])
    result["unigram_loss"] = unigram_loss(unigram_counts(data, unigram_batches), words)
    return result


@contextlib.contextmanager
def _recorder(folder: str | None) -> Iterator[Callable[[int, str, Scores], None]]:
    """What appends the scores of a step and a task to a folder's files; it does nothing without a folder.

    Raises:
      UserError: the folder cannot be written.
    """
    from switch_t5.storage import writable_directory
    from switch_t5.training.loop import record_evaluation
    from switch_t5.training.metrics_file import APPEND, MetricsFile
    from switch_t5.training.tensorboard import TensorBoard

    if folder is None:
        yield lambda step, task, scores: None
        return
    path = writable_directory(folder, "The metrics' folder")
    with (
        MetricsFile(path / "metrics.jsonl", APPEND) as metrics,
        TensorBoard(path / "tensorboard", APPEND) as tensorboard,
    ):
        yield partial(record_evaluation, metrics, tensorboard)


def _write_predictions(folder: str | None, results: dict[str, TaskResult]) -> None:
    from switch_t5.inference.task_scores import write_predictions

    if folder is not None:
        for name, result in results.items():
            print(f"wrote {write_predictions(Path(folder), name, result)}", file=sys.stderr)


def _score_file(run: Run, args: argparse.Namespace) -> int:
    """Scores predictions that stand in a file."""
    from switch_t5.cli.processes import if_first
    from switch_t5.inference.task_scores import TaskResult, read_predictions, score

    tasks = [] if run.scorer is None else run.scorer.tasks
    if len(tasks) != 1:
        raise UserError(
            f"--score_file is of one task, and here are {len(tasks)}: set EvaluationConfig.tasks to the one."
        )
    if not Path(args.score_file).is_file():
        raise UserError(f"--score_file={args.score_file} is not a file.")
    (task,) = tasks
    predictions = read_predictions(Path(args.score_file))
    result = TaskResult(score(task.task, task.examples, predictions), task.examples, predictions)
    print(table({task.task.name: result}), file=sys.stderr)
    write_json({"tasks": {task.task.name: result.scores}}, if_first(args.json))
    return 0


def _submit(run: Run, args: argparse.Namespace) -> int:
    """Predicts the test rows and writes them as SuperGLUE's server reads them."""
    from switch_t5.cli.processes import if_first, is_first
    from switch_t5.cli.trained import load_params
    from switch_t5.data.superglue import TASKS
    from switch_t5.data.superglue_files import submission_lines, write_submission
    from switch_t5.data.text_to_text import task_names_of
    from switch_t5.inference.task_scores import TaskScorer

    own = task_names_of(run.spec.data.mixture_or_task_name)
    # All of them of a mixture, for its diagnostics are no part of it.
    asked = run.spec.evaluation.tasks or (own if len(own) == 1 else None)
    names = tuple(task.name for task in TASKS if task.dataset.startswith("super_glue/") and "test" in task.splits)
    names = tuple(name for name in names if asked is None or name in asked)
    if not names:
        raise UserError(f"--submission is of SuperGLUE's tasks with test rows, none of which is in {asked}.")
    # The server wants an answer to every row.
    evaluation = dataclasses.replace(run.spec.evaluation, tasks=names, split="test", num_examples=None)
    scorer = TaskScorer(run.spec.data, evaluation, lambda: run.predictor)
    params, _ = load_params(run, args.checkpoint or run.spec.train.model_dir)
    results = scorer.results(params)
    for task in scorer.tasks if is_first() else ():
        config = task.task.dataset.partition("/")[2]
        result = results[task.task.name]
        lines = submission_lines(config, result.examples, result.predictions)
        unparsed = result.scores.get("unparsed")
        first = f", with the first label for {unparsed} predictions that are none" if unparsed else ""
        print(f"wrote {write_submission(Path(args.submission), config, lines)}{first}", file=sys.stderr)
    _write_predictions(if_first(args.predictions), results)
    return 0
