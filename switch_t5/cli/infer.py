"""``switch-t5 infer``: a trained model answers a file of inputs, or fills in what is masked."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from switch_t5.cli.output import add_json_flag, refuse_empty, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.cli.build import Run
    from switch_t5.data.pipeline import DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="a text with ___ for what is missing; repeatable"
    )
    parser.add_argument("--count", type=int, help="held-out examples to fill in where nothing is given; 3 by default")
    parser.add_argument("--checkpoint", metavar="PATH", help="one checkpoint; by default MODEL_DIR's latest")
    parser.add_argument(
        "--input", metavar="PATH", help="a .jsonl or .txt file, an input a line; - is standard input, of JSON lines"
    )
    parser.add_argument("--output", metavar="PATH", help="the .jsonl file to write; one that is there is gone on with")
    parser.add_argument("--task", metavar="NAME", help="makes the rows of --input into text as this task does")
    parser.add_argument("--field", help="the field of a JSON line that holds the text; inputs by default")
    parser.add_argument(
        "--skip_malformed", action="store_true", help="leave out lines that cannot be read, and count them"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Answers a file, or fills in texts or held-out examples; returns 0."""
    from switch_t5.cli.processes import if_first
    from switch_t5.cli.trained import load_params, open_run

    refuse_empty(args, "checkpoint", "input", "output", "task", "field")
    if args.count is not None and args.count < 1:
        raise UserError(f"--count must be at least 1, got {args.count}.")
    if args.count is not None and (args.text or args.input is not None):
        raise UserError(f"--count is of held-out examples, which {'--text' if args.text else '--input'} replaces.")
    if args.input is not None:
        from switch_t5.cli.infer_file import check_arguments, infer_file

        check_arguments(args)
        run = open_run(args.gin_file, args.gin_bindings, args.gin_search_paths)
        return infer_file(run, args)
    for flag in ("output", "task", "field", "skip_malformed"):
        if getattr(args, flag):
            raise UserError(f"--{flag} needs --input: name the file of inputs.")
    run = open_run(args.gin_file, args.gin_bindings, args.gin_search_paths)
    inputs, targets = _masked(run, args)
    params, step = load_params(run, args.checkpoint or run.spec.train.model_dir)
    results = _filled_in(run, params, step, inputs, targets)
    if args.json != "-":
        print("\n\n".join(_told(result) for result in results))
    write_json(results, if_first(args.json))
    return 0


def _masked(run: Run, args: argparse.Namespace) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Inputs with sentinels, of the texts given or of held-out examples, and what is masked where it is known."""
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.vocabularies import count_sentinels
    from switch_t5.inference.fill_in import encode_blanks

    if not args.text:
        return _held_out(run.spec.data, args.count or 3)
    vocabulary = get_vocabulary(run.spec.data)
    length = run.spec.data.task_feature_lengths["inputs"]
    try:
        inputs = [encode_blanks(text, vocabulary, count_sentinels(vocabulary), length) for text in args.text]
    except ValueError as error:
        raise UserError(f"--text {error}.") from None
    return inputs, [None] * len(inputs)


def _filled_in(
    run: Run, params: Any, step: int, inputs: list[np.ndarray], targets: list[np.ndarray | None]
) -> list[dict[str, Any]]:
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.vocabularies import decode
    from switch_t5.inference.fill_in import filled, spans

    vocabulary = get_vocabulary(run.spec.data)
    results = []
    for tokens, target, outputs in zip(inputs, targets, run.predictor(params, inputs), strict=True):
        masked = decode(vocabulary, tokens.tolist())
        for output in outputs:
            written = decode(vocabulary, output.tokens.tolist())
            result = {"step": step, "input": masked, "output": written, "filled": filled(masked, spans(written))}
            if target is not None:
                result["target"] = filled(masked, spans(decode(vocabulary, target.tolist())))
            results.append(result)
    return results


def _told(result: dict[str, Any]) -> str:
    """A result for the eye."""
    lines = [f"masked  {result['input']}", f"model   {result['filled']}"]
    return "\n".join([*lines, f"truth   {result['target']}"] if "target" in result else lines)


def _held_out(data: DataConfig, count: int) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Inputs and targets of the first held-out examples."""
    from switch_t5.data.pipeline import evaluation_batches

    unpacked = dataclasses.replace(data, split="validation", pack=False)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray | None] = []
    for batch in evaluation_batches(unpacked):
        rows = zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
        for tokens, target in rows:
            if len(inputs) < count and target.any():
                inputs.append(tokens)
                targets.append(target)
        if len(inputs) == count:
            break
    return inputs, targets
