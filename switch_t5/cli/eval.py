"""``switch-t5 eval``: the held-out loss of a trained model, beside that of word frequencies."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys

from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument("--checkpoint", metavar="PATH", help="one checkpoint; by default MODEL_DIR's latest")
    parser.add_argument(
        "--unigram_batches", type=int, default=200, metavar="N", help="training batches to count words in"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints a table, and returns 0."""
    from switch_t5.cli.trained import load_params, open_run
    from switch_t5.data.pipeline import unigram_counts, unigram_loss

    run = open_run(args.gin_file, args.gin_bindings, args.gin_search_paths)
    data, train = run.spec.data, run.spec.train
    if not train.eval_batches:
        raise UserError("TrainConfig.eval_batches is 0, which evaluates nothing: give a number of batches.")
    if args.unigram_batches < 1:
        raise UserError(f"--unigram_batches must be at least 1, got {args.unigram_batches}.")
    params, step = load_params(run, args.checkpoint or train.model_dir)
    result = {"step": step, "task": data.mixture_or_task_name, **run.evaluate(params)}
    held_out = dataclasses.replace(data, split="validation")
    words = unigram_counts(held_out, train.eval_batches)
    result["perplexity"] = math.exp(result["loss"])
    result["unigram_loss"] = unigram_loss(unigram_counts(data, args.unigram_batches), words)
    for name, value in result.items():
        print(f"{name:13} {value:.4f}" if isinstance(value, float) else f"{name:13} {value}", file=sys.stderr)
    write_json(result, args.json)
    return 0
