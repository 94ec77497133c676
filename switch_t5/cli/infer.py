"""``switch-t5 infer``: a trained model fills in what is masked."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.cli.build import Run
    from switch_t5.data.pipeline import DataConfig
    from switch_t5.types import Params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument(
        "--text", action="append", metavar="TEXT", help="a text with ___ for what is missing; repeatable"
    )
    parser.add_argument("--count", type=int, default=3, help="held-out examples to fill in where there is no --text")
    parser.add_argument("--checkpoint", metavar="PATH", help="one checkpoint; by default MODEL_DIR's latest")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Fills in the texts, or held-out examples, prints them and returns 0."""
    from switch_t5.cli.trained import load_params, open_run
    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.data.vocabularies import count_sentinels, decode
    from switch_t5.inference.fill_in import encode_blanks, filled, spans

    if args.count < 1:
        raise UserError(f"--count must be at least 1, got {args.count}.")
    run = open_run(args.gin_file, args.gin_bindings, args.gin_search_paths)
    vocabulary = get_vocabulary(run.spec.data)
    targets: list[np.ndarray | None]
    if args.text:
        length = run.spec.data.task_feature_lengths["inputs"]
        try:
            inputs = [encode_blanks(text, vocabulary, count_sentinels(vocabulary), length) for text in args.text]
        except ValueError as error:
            raise UserError(f"--text {error}.") from None
        targets = [None] * len(inputs)
    else:
        inputs, targets = _held_out(run.spec.data, args.count)
    params, step = load_params(run, args.checkpoint or run.spec.train.model_dir)

    results = []
    for tokens, target, output in zip(inputs, targets, _decode(run, params, inputs), strict=True):
        masked = decode(vocabulary, tokens.tolist())
        written = decode(vocabulary, output.tolist())
        result = {"step": step, "input": masked, "output": written, "filled": filled(masked, spans(written))}
        if target is not None:
            result["target"] = filled(masked, spans(decode(vocabulary, target.tolist())))
        results.append(result)
    if args.json != "-":
        print("\n\n".join(_told(result) for result in results))
    write_json(results, args.json)
    return 0


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


def _decode(run: Run, params: Params, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Greedy outputs, a training batch's worth of inputs at a time."""
    import jax

    from switch_t5.data.pipeline import get_vocabulary
    from switch_t5.inference.decoding import greedy_decode
    from switch_t5.partitioning.rules import partitioned

    data = run.spec.data
    eos_id = get_vocabulary(data).eos_id
    assert eos_id is not None
    decode = jax.jit(
        functools.partial(
            greedy_decode,
            run.model,
            max_length=data.task_feature_lengths["targets"],
            eos_id=eos_id,
        )
    )
    outputs: list[np.ndarray] = []
    for start in range(0, len(inputs), data.batch_size):
        rows = np.stack(inputs[start : start + data.batch_size])
        padded = np.pad(rows, ((0, data.batch_size - len(rows)), (0, 0)))
        with partitioned(run.mesh):
            tokens = decode(params, run.place({"tokens": padded})["tokens"])
        outputs += list(np.asarray(tokens)[: len(rows)])
    return outputs
