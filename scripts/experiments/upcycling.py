"""Trains a small dense model on the embedded corpus, and then both goes on with it and upcycles it, at equal steps.

    python scripts/experiments/upcycling.py --seeds=0,1,2 --json=upcycling.json
    python scripts/experiments/upcycling.py --dense_steps=6000 --more_steps=2000 --gin.NUM_EXPERTS=16 --json=16.json

For each seed ``switch-t5 train`` trains a dense model (``--dense_steps``), in processes of their own one after the
other, on one device, with bytes for a vocabulary. From its checkpoint, the optimizer's state and the step included, two
runs then make ``--more_steps`` more: the dense model as it is, and one whose feed-forwards became experts
(``runs/upcycle.gin``). Both read the same text in the same order. Flags that begin with ``--gin.`` go to all of them.

- held-out loss: of the same validation text at ``--points`` steps, in nats a token; the mean over seeds, and its sample
  standard deviation. At step 0 nothing is learnt yet, and both must be the same.
- gain: dense - upcycled of each seed, likewise; above 0 where upcycling is better.

With ``--json=PATH`` a seed's losses are written as soon as they are known, and seeds that stand there already are not
trained again. It exits with 1 where a loss is not a finite number, or where the two losses at step 0 differ by more
than ``START_RTOL``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from program import (
    COMMON,
    TINY,
    as_json,
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

START_RTOL = 1e-5
"""Of the held-out losses at the start, upcycled and dense: no token is dropped, weights add to 1."""

QUICKSTART = "runs/quickstart.gin"
UPCYCLED = ("runs/upcycle.gin", QUICKSTART)
ARMS = ("dense", "upcycled")


@dataclasses.dataclass(frozen=True)
class Seed:
    """The losses of one seed.

    Attributes:
      held_out: by arm, and by steps since the start.
    """

    held_out: dict[str, dict[int, float]]

    @property
    def start_difference(self) -> float:
        """Of the losses before anything is learnt, relative to the dense one."""
        return abs(self.held_out["upcycled"][0] / self.held_out["dense"][0] - 1)


def main(argv: list[str] | None = None) -> int:
    """Runs the seeds that are not known yet and prints the table."""
    args, given = _parse(argv)
    settings = [*COMMON, *(TINY if args.quick else ()), *given]
    asked = {"dense_steps": args.dense_steps, "more_steps": args.more_steps, "settings": settings}
    by_seed = _known(args.json, asked)
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            if seed not in by_seed:
                folder = Path(args.model_dir or scratch) / f"seed_{seed}"
                by_seed[seed] = losses_of_seed(folder, args, [*settings, f"SEED={seed}"])
                if args.json not in (None, "-"):
                    Path(args.json).write_text(as_json(_result(asked, by_seed)))
    emit(_result(asked, by_seed), table(by_seed), args.json)
    sentences = complaints(by_seed)
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    return 1 if sentences else 0


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = flags(__doc__)
    parser.add_argument("--dense_steps", type=int, help="of the dense model at first, 4000 by default")
    parser.add_argument("--more_steps", type=int, help="of either model from there, 2000 by default")
    parser.add_argument("--points", type=int, default=5, help="of the curve; their distance should divide both")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    args, given = parse(parser, argv)
    args.dense_steps = args.dense_steps or (12 if args.quick else 4000)
    args.more_steps = args.more_steps or (6 if args.quick else 2000)
    args.seeds = seeds_of(parser, args.seeds)
    return args, given


def _known(path: str | None, asked: dict[str, Any]) -> dict[int, Seed]:
    """Seeds that stand in a result of the same configuration; ends the script where it is of another one."""
    if path is None or path == "-" or not Path(path).exists():
        return {}
    known = json.loads(Path(path).read_text())
    if {name: known.get(name) for name in asked} != asked:
        sys.exit(f"{path} holds the result of other steps or settings: name another file.")
    seeds = {int(seed): _from_json(losses) for seed, losses in known["by_seed"].items()}
    return {seed: losses for seed, losses in seeds.items() if all(0 in curve for curve in losses.held_out.values())}


def _from_json(losses: dict[str, Any]) -> Seed:
    return Seed(
        {arm: {int(step): float(loss) for step, loss in curve.items()} for arm, curve in losses["held_out"].items()}
    )


def losses_of_seed(folder: Path, args: argparse.Namespace, settings: list[str]) -> Seed:
    """Trains the dense model of one seed, and both that go on from it."""
    start = folder / "start"
    train(start, args.dense_steps, (QUICKSTART,), dense(settings))
    goes_on = (f"TrainConfig.initial_checkpoint_path={start}", "TrainConfig.initial_checkpoint_optimizer=True")
    period = max(1, args.more_steps // args.points)
    total = args.dense_steps + args.more_steps
    train(folder / "dense", total, (QUICKSTART,), [*dense(settings), *goes_on], period)
    train(folder / "upcycled", total, UPCYCLED, [*settings, f"INITIAL_CHECKPOINT_PATH={start}"], period)
    held_out = {}
    for arm in ARMS:
        evaluations = entries_of(folder / arm)[1]
        held_out[arm] = {entry["step"] - args.dense_steps: float(entry["loss"]) for entry in evaluations}
        points = ", ".join(f"{step}: {loss:.4f}" for step, loss in held_out[arm].items())
        print(f"{folder.name}/{arm}: held-out loss {points}", file=sys.stderr, flush=True)
    return Seed(held_out)


def _result(asked: dict[str, Any], by_seed: dict[int, Seed]) -> dict[str, Any]:
    seeds = {seed: dataclasses.asdict(losses) for seed, losses in by_seed.items()}
    return {**asked, "by_seed": seeds, "rows": summary(by_seed)}


def summary(by_seed: dict[int, Seed]) -> list[dict[str, Any]]:
    """A row a point of the curve: of each arm mean and deviation, and of each seed the gain."""
    rows = []
    seeds = list(by_seed.values())
    for step in seeds[0].held_out["dense"]:
        row: dict[str, Any] = {"step": step}
        losses = {arm: [seed.held_out[arm][step] for seed in seeds] for arm in ARMS}
        losses["gain"] = [one - other for one, other in zip(losses["dense"], losses["upcycled"], strict=True)]
        for name, values in losses.items():
            row[name], row[f"{name}_std"] = mean_and_deviation(values)
        rows.append(row | {"gain_by_seed": losses["gain"]})
    return rows


def complaints(by_seed: dict[int, Seed]) -> list[str]:
    """A sentence for each seed with a loss that is not finite, or whose upcycled model starts elsewhere."""
    sentences = []
    for seed, losses in by_seed.items():
        held_out = [loss for curve in losses.held_out.values() for loss in curve.values()]
        if not all(map(math.isfinite, held_out)):
            sentences.append(f"Seed {seed}: a loss is not finite.")
        elif losses.start_difference > START_RTOL:
            upcycled, of_dense = losses.held_out["upcycled"][0], losses.held_out["dense"][0]
            sentences.append(f"Seed {seed}: the upcycled model starts at {upcycled}, and the dense one at {of_dense}.")
    return sentences


def table(by_seed: dict[int, Seed]) -> str:
    """The curves as Markdown, and how near the starts are."""
    lines = ["| steps more | dense goes on | upcycled | gain |", "|---|---|---|---|"]
    for row in summary(by_seed):
        cells = [as_text(row[name], row[f"{name}_std"]) for name in (*ARMS, "gain")]
        lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    worst = max(losses.start_difference for losses in by_seed.values())
    lines += ["", f"At the start the losses differ by {worst:.1e} at the most, relative."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
