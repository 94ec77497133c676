"""Distills a sparse teacher into a dense student on the embedded corpus: the four rows of the paper's table 6.

    python scripts/experiments/distillation.py --steps=2000 --seeds=0,1,2 --json=distillation.json
    python scripts/experiments/distillation.py --rows=mixture --gin.NUM_EXPERTS=32 --gin.TransformerConfig.emb_dim=256

For each seed it trains a teacher, a dense model alone (``plain``), and the students, by ``switch-t5 train`` in
processes of their own one after the other, on one device, with bytes for a vocabulary: the same text in the same order,
and the same number of steps for each. Flags that begin with ``--gin.`` go to all of them.

- held-out loss: of the last evaluation, in nats a token; the mean over seeds, and its sample standard deviation.
- share kept: of the teacher's gain over the plain model, (plain - student) / (plain - teacher), of each seed's own
  three losses; a mean over seeds. Where a teacher gained nothing there is no share, and the script says so.

``--temperature`` is of the soft loss. It exits with 1 where a loss is not a finite number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

COMMON = (
    "VOCABULARY_PATH=bytes",
    "TransformerConfig.vocab_size=384",
    "NUM_CPU_DEVICES=1",
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
"""A model of seconds, for ``--quick``."""

DENSE = ("TransformerConfig.moe=None",)
OF_EXPERTS = ("MoEConfig.", "RouterConfig.", "NUM_EXPERTS=", "EXPERT_DROPOUT_RATE=")
"""How settings begin that would have no effect on the plain model, and be refused there."""
STUDENTS = {
    "distillation alone": ("INITIALIZE_STUDENT=False", "HARD_LOSS_WEIGHT=0.0", "SOFT_LOSS_WEIGHT=1.0"),
    "+ non-expert weights": ("INITIALIZE_STUDENT=True", "HARD_LOSS_WEIGHT=0.0", "SOFT_LOSS_WEIGHT=1.0"),
    "+ mixture 0.75 / 0.25": ("INITIALIZE_STUDENT=True", "HARD_LOSS_WEIGHT=0.75", "SOFT_LOSS_WEIGHT=0.25"),
    "weights alone": ("INITIALIZE_STUDENT=True", "HARD_LOSS_WEIGHT=1.0", "SOFT_LOSS_WEIGHT=0.0"),
}
"""Table 6's rows as macros of ``runs/distill.gin``. Tests read them too."""
SHORT = dict(zip(("alone", "weights", "mixture", "initialization"), STUDENTS, strict=True))
"""What ``--rows`` calls them."""


def main(argv: list[str] | None = None) -> int:
    """Runs what the flags ask for and prints the table."""
    args, gin_flags = _parse(argv)
    settings = [*COMMON, *(TINY if args.quick else ()), *gin_flags]
    by_seed: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            folder = Path(args.model_dir or scratch) / f"seed_{seed}"
            by_seed[seed] = losses_of_seed(folder, args, [*settings, f"SEED={seed}"])
    result = {"steps": args.steps, "seeds": args.seeds, "rows": summary(by_seed)}
    text = json.dumps(result, indent=1)
    if args.json == "-":
        print(text)
    else:
        print(table(result["rows"]))
        if args.json:
            Path(args.json).write_text(text + "\n")
    sentences = complaints(by_seed)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if any("finite" in sentence for sentence in sentences) else 0


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", default=",".join(SHORT), help=f"some of {','.join(SHORT)}; all by default")
    parser.add_argument("--steps", type=int, help="of each run, 2000 by default")
    parser.add_argument("--teacher_steps", type=int, help="of the teacher, where they are others")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the soft loss")
    parser.add_argument("--model_dir", help="where the runs are kept, a folder a seed and run")
    parser.add_argument("--quick", action="store_true", help="few steps of a tiny model, to see that it runs")
    parser.add_argument("--json", help="where to write the result; - is standard output")
    args, gin_flags = parser.parse_known_args(argv)
    for flag in gin_flags:
        if not flag.startswith("--gin."):
            parser.error(f"{flag} is not a flag of this script.")
    args.steps = args.steps or (12 if args.quick else 2000)
    args.teacher_steps = args.teacher_steps or args.steps
    args.rows, seeds = args.rows.split(","), args.seeds.split(",")
    for row in args.rows:
        if row not in SHORT:
            parser.error(f"There is no row {row!r}; choose from {', '.join(SHORT)}.")
    if not all(seed.isdecimal() for seed in seeds):
        parser.error(f"--seeds={args.seeds} is no list of numbers such as 0,1,2.")
    args.seeds = [int(seed) for seed in seeds]
    return args, [flag.removeprefix("--gin.") for flag in gin_flags]


def losses_of_seed(folder: Path, args: argparse.Namespace, settings: Sequence[str]) -> dict[str, float]:
    """Trains teacher, plain model and students of one seed; the held-out loss of each."""
    teacher = folder / "teacher"
    losses = {"teacher": train(teacher, args.teacher_steps, ("runs/quickstart.gin",), settings)}
    plain = [setting for setting in settings if not setting.startswith(OF_EXPERTS)]
    losses["plain"] = train(folder / "plain", args.steps, ("runs/quickstart.gin",), [*plain, *DENSE])
    for short in args.rows:
        row = SHORT[short]
        files = ("runs/distill.gin", "runs/quickstart.gin")
        more = (*DENSE, *STUDENTS[row], f"TEACHER_CHECKPOINT_PATH={teacher}", f"TEMPERATURE={args.temperature}")
        losses[row] = train(folder / short, args.steps, files, [*settings, *more])
    return losses


def train(model_dir: Path, steps: int, files: Sequence[str], settings: Iterable[str]) -> float:
    """Trains one model by the program itself; its last held-out loss. Ends the script where that fails."""
    run = (
        f"MODEL_DIR={model_dir}",
        f"TRAIN_STEPS={steps}",
        f"LOG_PERIOD={max(1, steps // 40)}",
        "EVAL_PERIOD=0",
        "CHECKPOINT_PERIOD=0",
        "TrainConfig.eval_batches=16",
    )
    # The user's own flags, which are among the settings, come last and count.
    flags = [f"--gin.{setting}" for setting in (*run, *settings)]
    command = [sys.executable, "-m", "switch_t5", "train", *(f"--gin_file={file}" for file in files), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr}\nThe run in {model_dir} ended with exit code {done.returncode}.")
    entries = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    loss = float([entry for entry in entries if "task" in entry][-1]["loss"])
    print(f"{model_dir.parent.name}/{model_dir.name}: {steps} steps, held-out loss {loss:.4f}", file=sys.stderr)
    return loss


def share_kept(losses: dict[str, float], row: str) -> float | None:
    """Of the teacher's gain over the plain model the part that a student has; None where there was no gain."""
    gain = losses["plain"] - losses["teacher"]
    return (losses["plain"] - losses[row]) / gain if gain > 0 else None


def summary(by_seed: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    """A row a model: losses by seed, their mean and deviation, and the share kept."""
    rows = []
    for name in next(iter(by_seed.values())):
        losses = [losses[name] for losses in by_seed.values()]
        shares = [share_kept(losses, name) for losses in by_seed.values()]
        known = [share for share in shares if share is not None]
        finite = all(map(math.isfinite, losses))
        rows.append(
            {
                "model": name,
                "held_out_loss": [loss if math.isfinite(loss) else repr(loss) for loss in losses],
                "mean": statistics.fmean(losses) if finite else None,
                "std": statistics.stdev(losses) if finite and len(losses) > 1 else None,
                "share_kept": statistics.fmean(known) if finite and len(known) == len(shares) else None,
                "share_kept_by_seed": shares if finite else None,
            }
        )
    return rows


def complaints(by_seed: dict[int, dict[str, float]]) -> list[str]:
    """A sentence for each seed with a loss that is not finite, or with a teacher that gained nothing."""
    sentences = []
    for seed, losses in by_seed.items():
        wrong = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if wrong:
            sentences.append(f"Seed {seed}: the loss of {', '.join(wrong)} is not finite.")
        elif losses["teacher"] >= losses["plain"]:
            sentences.append(f"Seed {seed}: the teacher is no better than the plain model, so that no share is kept.")
    return sentences


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| model | held-out loss | share kept |", "|---|---|---|"]
    for row in rows:
        deviation = f" ± {row['std']:.4f}" if row["std"] is not None else ""
        loss = f"{row['mean']:.4f}{deviation}" if row["mean"] is not None else "not finite"
        share = f"{row['share_kept']:.0%}" if row["share_kept"] is not None else "–"
        lines.append(f"| {row['model']} | {loss} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
