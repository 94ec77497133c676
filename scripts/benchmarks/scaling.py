"""Compiles a training step for ever more virtual devices, each with as much work, and counts what it holds and sends.

    python scripts/benchmarks/scaling.py --json=scaling.json
    python scripts/benchmarks/scaling.py --axes=expert,fsdp --devices=1,8,64 --gin.TransformerConfig.mlp_dim=1024

Nothing is run: XLA compiles for ``--devices`` virtual CPU devices, each row in a process of its own, and its memory
analysis and HLO stand beside the plan's numbers. A device has one routing group of 4096 tokens and, along ``expert``,
two experts a layer, so that the model grows with the mesh; along ``data`` and ``fsdp`` it stays.

- *held*: parameters and optimizer state of a device. Flat along ``data``, and along ``expert`` but for the routers'
  kernels, which have a column for each expert; 1 / devices along ``fsdp``.
- *sent*: bytes from a device in a step. All but flat: (n - 1) / n of a constant, and the routers' gradients.
- *other*: XLA's temporary memory. Flat, but for routers' logits along ``expert``, and gradients along ``fsdp``.
- *compile*: seconds. One program for all devices, though more of them, and more experts, are more to plan for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

from timing import in_process, report

MODEL = ("models/switch_base_e8.gin", "runs/pretrain.gin")
AXES = ("expert", "data", "fsdp")
LENGTHS = {"inputs": 512, "targets": 128}
SEQUENCES = 8
"""Of a device: one routing group."""
EMB = 512
"""Which the most devices along ``fsdp`` divide."""
EXPERTS = 2
"""Of a device along ``expert``, and of the whole model along the other axes times eight."""


def main() -> int:
    """Runs the rows that the flags ask for and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--axes", default=",".join(AXES), help="of the mesh; each grows alone")
    parser.add_argument("--devices", default="1,2,4,8,64,512", help="of each axis")
    parser.add_argument("--quick", action="store_true", help="1 and 4 devices of one axis, to see that it runs")
    parser.add_argument("--json", help="where to write the rows; - is standard output")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args, bindings = parser.parse_known_args()
    if wrong := [flag for flag in bindings if not flag.startswith("--gin.")]:
        parser.error(f"does not know {wrong[0]}.")
    if args.row is not None:
        axis, devices = json.loads(args.row)
        print(json.dumps(measure(axis, devices, [flag.removeprefix("--gin.") for flag in bindings])))
        return 0
    for axis in args.axes.split(","):
        if axis not in AXES:
            parser.error(f"--axes must be some of {', '.join(AXES)}, got {axis!r}.")
    if args.quick:
        args.axes, args.devices = "expert", "1,4"
    rows = [
        in_process(__file__, f"--row={json.dumps(row)}", *bindings)
        for row in itertools.product(args.axes.split(","), map(int, args.devices.split(",")))
    ]
    report(rows, table(rows), args.json)
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; each of XLA's numbers, and how far the plan's is from it."""
    lines = [
        "| axis | devices | parameters | held MB | plan | sent MB | plan | other MB | plan | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["axis"], f"{row['devices']:,}", f"{row['parameters']:,}"]
        for name in ("held", "sent", "other"):
            planned, compiled = row[name]
            beside = f"{planned / compiled - 1:+.1%}" if compiled else "–"
            cells += [f"{compiled / 1e6:,.1f}", beside]
        lines.append("| " + " | ".join([*cells, f"{row['compile_seconds']:.1f}"]) + " |")
    return "\n".join(lines)


def measure(axis: str, devices: int, bindings: list[str]) -> dict[str, Any]:
    """One row: the plan's numbers and XLA's of one mesh, as pairs."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)

    from switch_t5.cli.build import Run, RunSpec
    from switch_t5.cli.plan import load, spec_on, workload_of
    from switch_t5.planning.chips import parse_devices
    from switch_t5.planning.compiled import compare
    from switch_t5.planning.plan import plan_mesh
    from switch_t5.planning.workload import MeshShape

    experts = EXPERTS * (devices if axis == "expert" else 8)
    sizes = [f"BATCH_SIZE={SEQUENCES * devices}", f"NUM_EXPERTS={experts}", f"TASK_FEATURE_LENGTHS={LENGTHS}"]
    sizes += [f"MoEConfig.group_size={SEQUENCES * LENGTHS['inputs']}", "MoEConfig.min_expert_capacity=1"]
    sizes += ["TransformerConfig.dtype=float32", "TransformerConfig.scan_layers=True"]
    sizes += ["TransformerConfig.num_encoder_layers=4", "TransformerConfig.num_decoder_layers=4"]
    sizes += [f"TransformerConfig.emb_dim={EMB}"]
    arguments = argparse.Namespace(gin_file=MODEL, gin_search_paths=(), gin_bindings=[*sizes, *bindings])
    spec = RunSpec.read(load(arguments))
    workload, _ = workload_of(spec)
    mesh = MeshShape(1, 1, 1)._replace(**{axis: devices})
    planned = plan_mesh(workload, parse_devices(f"cpu:{devices}"), mesh)
    run = Run(spec_on(spec, workload, mesh))
    start = time.perf_counter()
    program = run.compile_train_step()
    seconds = time.perf_counter() - start
    rows = {row.name: (row.planned, row.compiled) for row in compare(planned, program)}
    return {
        "axis": axis,
        "devices": devices,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.model.abstract_params)),
        "held": rows["parameters and optimizer (XLA: and batch)"],
        "other": rows["everything else"],
        "sent": rows["on the wire"],
        "compile_seconds": seconds,
    }


if __name__ == "__main__":
    raise SystemExit(main())
