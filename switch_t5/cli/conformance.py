"""``switch-t5 conformance``: the sparse layer on these devices beside the float64 oracle, cell by cell."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from switch_t5.cli.output import STANDARD_OUTPUT, add_json_flag, write_json
from switch_t5.errors import UserError

GREEN, RED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument("--quick", action="store_true", help="one device, float32 and the default dispatch alone")
    parser.add_argument(
        "--num_cpu_devices", type=int, default=8, metavar="N", help="virtual devices, where there is no accelerator"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Checks every cell, prints a table, and returns 0 where all are within their bounds and 1 otherwise."""
    if args.num_cpu_devices < 1:
        raise UserError(f"--num_cpu_devices must be at least 1, got {args.num_cpu_devices}.")
    import jax

    jax.config.update("jax_num_cpu_devices", args.num_cpu_devices)  # Before the cells, whose keys wake the devices.
    from switch_t5.conformance.cells import MESHES, ROUTERS, Cell, cells, check

    chosen = [Cell(router) for router in ROUTERS] if args.quick else list(cells(jax.device_count()))
    device = jax.devices()[0].device_kind
    print(f"{len(chosen)} cells on {jax.device_count()} {device}, jax {jax.__version__}", file=sys.stderr)
    # A result that was asked for is on standard output, unless that is asked to be JSON.
    table = sys.stderr if args.json == STANDARD_OUTPUT else sys.stdout
    print(
        "| router | layer | dispatch | dtype | mesh | worst error | in | within |\n|---|---|---|---|---|---|---|---|",
        file=table,
    )
    rows, is_green = [], True
    for cell in chosen:
        result = check(cell)
        worst, is_green = result.worst, is_green and result.is_green
        verdict = f"{result.bounds[worst]:.0e}" if result.is_green else f"{result.bounds[worst]:.0e}: NO"
        names = cell.router, cell.layer, cell.dispatch, cell.dtype, cell.mesh
        print(f"| {' | '.join(names)} | {result.errors[worst]:.1e} | {worst} | {verdict} |", file=table, flush=True)
        rows.append(
            {
                **dataclasses.asdict(cell),
                "errors": result.errors,
                "bounds": result.bounds,
                "is_green": result.is_green,
            }
        )
    write_json({"device": device, "jax": jax.__version__, "cells": rows}, args.json)
    if left_out := [] if args.quick else [mesh for mesh in MESHES if mesh not in {cell.mesh for cell in chosen}]:
        print(f"not checked, for want of devices: the meshes {', '.join(left_out)}.", file=sys.stderr)
    print("all within their bounds." if is_green else "some cells are beyond their bound.", file=sys.stderr)
    return GREEN if is_green else RED
