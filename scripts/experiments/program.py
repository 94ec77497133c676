"""What the experiments share: a small model, how the program trains it, and what is read of a run."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

COMMON = (
    "VOCABULARY_PATH=bytes",
    "TransformerConfig.vocab_size=384",
    "NUM_EXPERT_PARTITIONS=1",
    "NUM_MODEL_PARTITIONS=1",
)
"""What all runs change in the quickstart's file."""

TINY = (
    "TransformerConfig.emb_dim=32",
    "TransformerConfig.num_heads=2",
    "TransformerConfig.head_dim=16",
    "TransformerConfig.mlp_dim=64",
    "MoEConfig.group_size=128",
    "BATCH_SIZE=8",
    "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 24}",
)
"""A model of seconds, for ``--quick`` and for the tests."""

DENSE = ("TransformerConfig.moe=None",)
_OF_EXPERTS = ("MoEConfig.", "RouterConfig.", "NUM_EXPERTS=", "EXPERT_DROPOUT_RATE=")


def dense(settings: Iterable[str]) -> list[str]:
    """Settings of a model without experts: those that would have no effect, and be refused, are left out."""
    return [*(setting for setting in settings if not setting.startswith(_OF_EXPERTS)), *DENSE]


def flags(description: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that every experiment has, by the first line of its module's description."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model_dir", help="where the runs are kept, each in a folder of its own")
    parser.add_argument("--quick", action="store_true", help="few steps of a tiny model, to see that it runs")
    parser.add_argument("--json", help="where to write the result; - is standard output")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the settings that those beginning with ``--gin.`` give; every other one is refused."""
    args, gin_flags = parser.parse_known_args(argv)
    for flag in gin_flags:
        if not flag.startswith("--gin."):
            parser.error(f"{flag} is not a flag of this script.")
    return args, [flag.removeprefix("--gin.") for flag in gin_flags]


def seeds_of(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """The numbers of a flag such as ``--seeds=0,1,2``."""
    seeds = text.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        parser.error(f"--seeds={text} is no list of numbers such as 0,1,2.")
    return [int(seed) for seed in seeds]


def switch_t5(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the program of this checkout in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "switch_t5", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def train(model_dir: Path, steps: int, files: Sequence[str], settings: Iterable[str], eval_period: int = 0) -> None:
    """Trains one model by ``switch-t5 train`` on one device; ends the script where that fails."""
    run = (
        f"MODEL_DIR={model_dir}",
        f"TRAIN_STEPS={steps}",
        f"LOG_PERIOD={max(1, steps // 40)}",
        f"EVAL_PERIOD={eval_period}",
        "CHECKPOINT_PERIOD=0",
        "TrainConfig.eval_batches=16",
        "NUM_CPU_DEVICES=1",
    )
    # The user's own flags, which are among the settings, come last and count.
    gin = [f"--gin.{setting}" for setting in (*run, *settings)]
    done = switch_t5("train", *(f"--gin_file={file}" for file in files), *gin)
    if done.returncode:
        sys.exit(f"{done.stderr}\nThe run in {model_dir} ended with exit code {done.returncode}.")


def entries_of(model_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A run's ``metrics.jsonl``: what was logged in training, and the evaluations."""
    entries = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "task" not in entry], [entry for entry in entries if "task" in entry]


def mean_and_deviation(losses: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, None where a loss is not finite, and the sample standard deviation, None of one loss too."""
    finite = all(map(math.isfinite, losses))
    mean = statistics.fmean(losses) if finite else None
    return mean, statistics.stdev(losses) if finite and len(losses) > 1 else None


def as_text(mean: float | None, deviation: float | None, digits: int = 4) -> str:
    """A mean with its deviation, as it stands in a table."""
    if mean is None:
        return "not finite"
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def as_json(result: Any) -> str:
    """JSON with the numbers that it lacks as texts, as in ``metrics.jsonl``."""
    return json.dumps(_writable(result), indent=1) + "\n"


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_writable(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def emit(result: Any, table: str, destination: str | None) -> None:
    """Prints the table, and writes the result where ``--json`` says; with ``-`` it prints that instead."""
    if destination == "-":
        sys.stdout.write(as_json(result))
        return
    print(table)
    if destination:
        Path(destination).write_text(as_json(result))
