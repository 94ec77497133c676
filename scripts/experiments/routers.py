"""Trains one small model with each router, alike in all else, and compares them at equal steps.

    python scripts/experiments/routers.py --steps=200 --json=routers.json
    python scripts/experiments/routers.py --routers=top_k,expert_choice --model_dir=runs/routers
    python scripts/experiments/routers.py --gin.NUM_EXPERTS=16 --gin.TransformerConfig.emb_dim=256

Each run is ``switch-t5 train`` on the quickstart's file, in processes of their own one after the other, on one device,
with bytes for a vocabulary: the same text in the same order, the same seed, sizes and number of steps. Flags that
begin with ``--gin.`` go to all of them. What the columns say of training is the mean of the last logged steps
(``AVERAGED``), and over sparse layers:

- loss: the cross-entropy alone, in nats a token, since the routers' own losses differ; held-out is that of the end.
- dropped: tokens that no expert served.
- largest load: choices of the most popular expert, before capacity, over the mean of all; 1 is perfect balance.
- s / step: the median over logged periods; compilation, evaluations and the first period are left out.

It exits with 1 where a loss is not a finite number.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from program import COMMON, TINY, emit, entries_of, flags, parse, train

TOP_1_DECODER = (
    "TransformerConfig.decoder_moe=@decoder/MoEConfig()",
    "decoder/RouterConfig.router=top_k",
)
"""For a router that looks at later tokens, which a decoder must not do."""

TWO_CHOICES = ("MoEConfig.train_capacity_factor=2.5", "MoEConfig.eval_capacity_factor=4.0")
"""As many slots for each choice as a router of one choice has."""

ROUTERS: dict[str, tuple[str, ...]] = {
    "top_k": (),
    "sample": ("RouterConfig.exploration=sample", "MoEConfig.jitter_noise=0"),
    "gaussian": ("RouterConfig.exploration=gaussian", "MoEConfig.jitter_noise=0"),
    "dropless": ("MoEConfig.dispatch=dropless",),
    "shared_expert": ("MoEConfig.num_shared_experts=1",),
    "no_token_left_behind": ("RouterConfig.router=no_token_left_behind",),
    "sinkhorn": ("RouterConfig.router=sinkhorn", *TOP_1_DECODER),
    "expert_choice": ("RouterConfig.router=expert_choice", *TOP_1_DECODER),
    "hash": ("RouterConfig.router=hash", "LossConfig.load_balance_loss_weight=0"),
    "random": ("RouterConfig.router=random", "LossConfig.load_balance_loss_weight=0"),
    "top_2": ("RouterConfig.num_selected_experts=2", *TWO_CHOICES),
    "top_2_renormalized": (
        "RouterConfig.num_selected_experts=2",
        "RouterConfig.renormalize_weights=True",
        *TWO_CHOICES,
    ),
    "top_2_batch_prioritized": (
        "RouterConfig.num_selected_experts=2",
        "RouterConfig.batch_prioritized=True",
        "TransformerConfig.decoder_moe=@decoder/MoEConfig()",
        "decoder/RouterConfig.batch_prioritized=False",
        *TWO_CHOICES,
    ),
    "gshard_top_2": ("RouterConfig.router=gshard_top_2", *TWO_CHOICES),
    "sigmoid_top_k": (
        "RouterConfig.router=sigmoid_top_k",
        "RouterConfig.num_selected_experts=2",
        "LossConfig.load_balance_loss_weight=0",
        *TWO_CHOICES,
    ),
    "sigmoid_top_k_limited": (
        "RouterConfig.router=sigmoid_top_k",
        "RouterConfig.num_selected_experts=2",
        "RouterConfig.num_expert_groups=2",
        "RouterConfig.num_limited_groups=1",
        "LossConfig.load_balance_loss_weight=0",
        *TWO_CHOICES,
    ),
}
"""Each router as flags of gin, over the quickstart's ``top_k`` with one choice. Tests read it too."""

QUICK = (*COMMON, *TINY, "NUM_EXPERTS=4")
"""A model of seconds, for ``--quick`` and for the tests."""

QUICK_ROUTERS = ("top_k", "dropless", "expert_choice")
AVERAGED = 10


def main(argv: list[str] | None = None) -> int:
    """Runs the routers that the flags ask for and prints the table."""
    args, given = _parse(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for router in args.routers:
            model_dir = Path(args.model_dir or scratch) / router
            settings = [*(QUICK if args.quick else COMMON), f"SEED={args.seed}", *ROUTERS[router], *given]
            train(model_dir, args.steps, ("runs/quickstart.gin",), settings)
            rows.append({"router": router, "seed": args.seed, **measurements(model_dir)})
            print(f"{router}: {rows[-1]['steps']} steps, loss {rows[-1]['loss']:.4f}", file=sys.stderr, flush=True)
    emit(rows, table(rows), args.json)
    sentence = not_finite(rows)
    if sentence:
        print(sentence, file=sys.stderr)
    return 1 if sentence else 0


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = flags(__doc__)
    parser.add_argument("--routers", help=f"some of {','.join(ROUTERS)}; all by default")
    parser.add_argument("--steps", type=int, help="of each run, 200 by default")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, noise and the order of the text")
    args, given = parse(parser, argv)
    args.steps = args.steps or (12 if args.quick else 200)
    args.routers = args.routers.split(",") if args.routers else list(QUICK_ROUTERS if args.quick else ROUTERS)
    for router in args.routers:
        if router not in ROUTERS:
            parser.error(f"There is no router {router!r} here; choose from {', '.join(ROUTERS)}.")
    return args, given


def measurements(model_dir: Path) -> dict[str, Any]:
    """A row, from what a run wrote: ``metrics.jsonl``, and the times and the experts' loads of TensorBoard's file."""
    logged, evaluations = entries_of(model_dir)
    last = logged[-AVERAGED:]
    times, largest_loads = _from_tensorboard(model_dir / "tensorboard")
    laps = [(after - before) / (step - first) for (first, before), (step, after) in itertools.pairwise(times.items())]
    return {
        "steps": logged[-1]["step"],
        "loss": _mean(entry["cross_entropy"] for entry in last),
        "held_out_loss": float(evaluations[-1]["loss"]),
        "fraction_dropped": _mean(_of_layers(last, "fraction_dropped")),
        "largest_load": _mean(value for entry in last for value in largest_loads[entry["step"]]),
        "load_balance_loss": _mean(entry["load_balance_loss"] for entry in last),
        "router_entropy": _mean(_of_layers(last, "router_entropy")),
        "seconds_per_step": statistics.median(laps[1:] or laps) if laps else None,
        "curve": {entry["step"]: float(entry["loss"]) for entry in logged},
        "held_out_curve": {entry["step"]: float(entry["loss"]) for entry in evaluations},
    }


def _of_layers(entries: list[dict[str, Any]], name: str) -> list[float]:
    return [float(value) for entry in entries for key, value in entry.items() if key.endswith(f"/{name}")]


def _mean(values: Iterable[float | str]) -> float:
    return statistics.fmean(float(value) for value in values)


def _from_tensorboard(directory: Path) -> tuple[dict[int, float], dict[int, list[float]]]:
    """By logged step its time in seconds, and for each sparse layer the largest of the loads over their mean."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorBoard reads by TensorFlow, which greets at length.
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    times: dict[int, float] = {}
    largest: dict[int, list[float]] = {}
    for path in sorted(directory.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "train/loss":
                    times[event.step] = event.wall_time
                if value.tag.startswith("expert_load/"):
                    loads = list(value.histo.bucket)[1:]  # The first bucket is there for TensorBoard alone.
                    largest.setdefault(event.step, []).append(max(loads) * len(loads) / sum(loads))
    return times, largest


def not_finite(rows: list[dict[str, Any]]) -> str:
    """One sentence about losses that are not finite; empty where all are."""
    steps = {
        row["router"]: [
            step for name in ("curve", "held_out_curve") for step, loss in row[name].items() if not math.isfinite(loss)
        ]
        for row in rows
    }
    found = [f"{router} at step {min(when)}" for router, when in steps.items() if when]
    return f"The loss is not finite: {', '.join(found)}." if found else ""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| router | steps | loss | held-out loss | dropped | largest load | balance loss | entropy | s / step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["seconds_per_step"]
        lines.append(
            f"| `{row['router']}` | {row['steps']} | {row['loss']:.3f} | {row['held_out_loss']:.3f} | "
            f"{row['fraction_dropped']:.1%} | {row['largest_load']:.2f} | {row['load_balance_loss']:.2f} | "
            f"{row['router_entropy']:.2f} | {f'{seconds:.3f}' if seconds else '–'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
