"""Distills a sparse teacher into a dense student on the embedded corpus: the four rows of the paper's table 6.

    python scripts/experiments/distillation.py --steps=2000 --seeds=0,1,2 --json=distillation.json
    python scripts/experiments/distillation.py --rows=mixture --gin.NUM_EXPERTS=32 --gin.TransformerConfig.emb_dim=256

For each seed it trains a teacher, a dense model alone (``plain``), and the students, by ``switch-t5 train`` in
processes of their own one after the other, on one device, with bytes for a vocabulary: the same text in the same order,
and the same number of steps for each, or for each but the teacher (``--teacher_steps``): then its gain is that of
longer training too, which students that start from its weights have had already. Flags that begin with ``--gin.`` go to
all of them.

- held-out loss: of the last evaluation, in nats a token; the mean over seeds, and its sample standard deviation.
- share kept: of the teacher's gain over the plain model, (plain - student) / (plain - teacher), of each seed's own
  three losses; a mean over seeds. Where a teacher gained nothing there is no share, and the script says so.

``--temperature`` is of the soft loss. It exits with 1 where a loss is not a finite number.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from program import (
    COMMON,
    DENSE,
    TINY,
    as_text,
    dense,
    emit,
    entries_of,
    flags,
    mean_and_deviation,
    parse,
    seeds_of,
    train,
)

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
    args, given = _parse(argv)
    settings = [*COMMON, *(TINY if args.quick else ()), *given]
    by_seed: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            folder = Path(args.model_dir or scratch) / f"seed_{seed}"
            by_seed[seed] = losses_of_seed(folder, args, [*settings, f"SEED={seed}"])
    result = {"steps": args.steps, "teacher_steps": args.teacher_steps, "seeds": args.seeds, "rows": summary(by_seed)}
    emit(result, table(result["rows"]), args.json)
    sentences = complaints(by_seed)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if any("finite" in sentence for sentence in sentences) else 0


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = flags(__doc__)
    parser.add_argument("--rows", default=",".join(SHORT), help=f"some of {','.join(SHORT)}; all by default")
    parser.add_argument("--steps", type=int, help="of each run, 2000 by default")
    parser.add_argument("--teacher_steps", type=int, help="of the teacher, where they are others")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the soft loss")
    args, given = parse(parser, argv)
    args.steps = args.steps or (12 if args.quick else 2000)
    args.teacher_steps = args.teacher_steps or args.steps
    args.rows = args.rows.split(",")
    for row in args.rows:
        if row not in SHORT:
            parser.error(f"There is no row {row!r}; choose from {', '.join(SHORT)}.")
    args.seeds = seeds_of(parser, args.seeds)
    return args, given


def losses_of_seed(folder: Path, args: argparse.Namespace, settings: Sequence[str]) -> dict[str, float]:
    """Trains teacher, plain model and students of one seed; the held-out loss of each."""
    teacher = folder / "teacher"
    losses = {"teacher": held_out(teacher, args.teacher_steps, ("runs/quickstart.gin",), settings)}
    losses["plain"] = held_out(folder / "plain", args.steps, ("runs/quickstart.gin",), dense(settings))
    for short in args.rows:
        row = SHORT[short]
        files = ("runs/distill.gin", "runs/quickstart.gin")
        more = (*DENSE, *STUDENTS[row], f"TEACHER_CHECKPOINT_PATH={teacher}", f"TEMPERATURE={args.temperature}")
        losses[row] = held_out(folder / short, args.steps, files, [*settings, *more])
    return losses


def held_out(model_dir: Path, steps: int, files: Sequence[str], settings: Iterable[str]) -> float:
    """Trains one model; its last held-out loss."""
    train(model_dir, steps, files, settings)
    loss = float(entries_of(model_dir)[1][-1]["loss"])
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
        mean, std = mean_and_deviation(losses)
        finite = mean is not None
        rows.append(
            {
                "model": name,
                "held_out_loss": losses,
                "mean": mean,
                "std": std,
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
        share = f"{row['share_kept']:.0%}" if row["share_kept"] is not None else "–"
        lines.append(f"| {row['model']} | {as_text(row['mean'], row['std'])} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
