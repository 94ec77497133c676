"""A plan as tables for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from switch_t5.planning.communication import Transfer
from switch_t5.planning.compiled import Comparison
from switch_t5.planning.flops import step_flops
from switch_t5.planning.memory import DeviceMemory
from switch_t5.planning.plan import MeshPlan, Plan

SHOWN_MESHES = 12
_MESH = "data x expert x model (x fsdp)"


def show(plan: Plan, active: int) -> None:
    """Prints the plan on standard error."""
    print("\n".join(_heading(plan, active)), file=sys.stderr)
    best = _best(plan)
    if best is not None:
        _show_best(best, plan)
    _show_meshes(plan)


def as_json(plan: Plan, active: int) -> dict[str, Any]:
    """The plan in JSON's types; ``bytes_per_device`` and the like are of the best mesh, null where there is none."""
    flops = step_flops(plan.workload)
    best = _best(plan)
    return {
        "topology": plan.topology.name,
        "devices": plan.topology.num_devices,
        "memory_per_device": plan.topology.chip.memory,
        "batch": plan.workload.batch,
        "lengths": [plan.workload.encoder_length, plan.workload.decoder_length],
        "parameters": parameters(plan),
        "active_parameters": active,
        "flops_per_step": flops.model,
        "flops_per_token": flops.per_token,
        "executed_flops_per_step": flops.executed,
        "bytes_per_device": None if best is None else best.memory.total,
        "fits": bool(plan.fitting),
        "smallest_change": None if plan.change is None else plan.change.words,
        "meshes": [
            *(_mesh_json(one) for one in (*plan.fitting, *plan.too_large)),
            *({"mesh": mesh._asdict(), "fits": False, "reason": reason} for mesh, reason in plan.refused),
        ],
    }


def show_comparison(rows: Sequence[Comparison], best: MeshPlan, seconds: float, host_bytes: int) -> None:
    """Prints a compiled step beside its plan on standard error."""
    cells = [
        (
            one.name,
            *(size(value) if one.unit == "bytes" else f"{value:.4g}" for value in (one.planned, one.compiled)),
            "–" if one.difference is None else f"{one.difference:+.1%}",
        )
        for one in rows
    ]
    print(
        f"\nCompiled for the mesh {best.mesh} in {seconds:.0f} s, with {size(host_bytes)} of this machine's memory:\n\n"
        + table(("a device", "plan", "XLA", "difference"), cells),
        file=sys.stderr,
    )


def comparison_json(rows: Sequence[Comparison], best: MeshPlan, seconds: float, host_bytes: int) -> dict[str, Any]:
    """The same in JSON's types."""
    return {
        "mesh": best.mesh._asdict(),
        "compile_seconds": seconds,
        "host_peak_bytes": host_bytes,
        "rows": [{**dataclasses.asdict(one), "difference": one.difference} for one in rows],
    }


def parameters(plan: Plan) -> int:
    """Of the model, all of them."""
    return sum(number * kind.nbytes // kind.dtype.itemsize for kind, number, _ in plan.workload.params.kinds)


def size(nbytes: float) -> str:
    """Bytes in words, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def _best(plan: Plan) -> MeshPlan | None:
    """The best that fits, or what comes nearest to it."""
    return next(iter((*plan.fitting, *plan.too_large)), None)


def _heading(plan: Plan, active: int) -> list[str]:
    work, flops, chip = plan.workload, step_flops(plan.workload), plan.topology.chip
    recomputed = f", {flops.executed:.3e} with what is recomputed" if flops.recomputed else ""
    return [
        f"devices     {plan.topology.name}: {plan.topology.num_devices} of {size(chip.memory)}, "
        f"{chip.peak_flops[work.config.dtype] / 1e12:.4g} TFLOP/s in {work.config.dtype}, "
        f"{size(chip.memory_bandwidth)}/s of memory, {size(chip.link_bandwidth)}/s of links",
        f"parameters  {parameters(plan):,} in all, {active:,} for one token",
        f"batch       {work.batch} x ({work.encoder_length} + {work.decoder_length}) = {work.tokens:,} tokens a step"
        + (f", in {work.microbatches} microbatches" if work.microbatches > 1 else ""),
        f"work        {flops.model:.3e} floating-point operations a step, {flops.per_token:.3e} a token{recomputed}",
    ]


def _show_best(best: MeshPlan, plan: Plan) -> None:
    sizes = dataclasses.asdict(best.memory)
    rows = [(name.replace("_", " "), size(count)) for name, count in sizes.items()]
    rows += [("all at once", size(best.memory.total)), ("a device has", size(plan.topology.chip.memory))]
    rows += [("host, loading", size(best.host.loading)), ("host, saving", size(best.host.saving))]
    print(f"\nThe mesh {best.mesh} of {_MESH}, a device:\n", file=sys.stderr)
    print(table(("memory", "bytes"), rows), file=sys.stderr)
    if best.transfers:
        print("\n" + table(("on the wire", "by", "over", "sent", "at the least"), _wire(best)), file=sys.stderr)
    print(
        f"\nA step takes {best.seconds:.4g} s at the least, limited by {best.limited_by}: "
        f"{best.compute_seconds:.4g} s of products, {best.memory_seconds:.4g} s of memory "
        f"({best.intensity:.0f} FLOPs a byte), {best.communication_seconds:.4g} s on the wire. "
        f"MFU is at most {best.mfu_bound:.0%}.",
        file=sys.stderr,
    )


def _wire(best: MeshPlan) -> list[tuple[str, ...]]:
    ordered = sorted(best.transfers, key=lambda one: -one.sent)
    rows = [(one.purpose, one.collective, one.axis, size(one.sent), size(one.minimum)) for one in ordered]
    sums = (sum(one.sent for one in ordered), sum(one.minimum for one in ordered))
    return [*rows, ("all", "", "", *map(size, sums))]


def _show_meshes(plan: Plan) -> None:
    header = (_MESH, "a device", "step at least", "limited by", "MFU at most", "fits")
    rows = [_mesh_row(one) for one in plan.fitting[:SHOWN_MESHES]]
    rows += [_mesh_row(one) for one in plan.too_large[:SHOWN_MESHES]]
    if rows:
        print("\n" + table(header, rows), file=sys.stderr)
    hidden = max(0, len(plan.fitting) - SHOWN_MESHES) + max(0, len(plan.too_large) - SHOWN_MESHES)
    if hidden:
        print(f"\n{hidden} more meshes are in the JSON.", file=sys.stderr)
    reasons: dict[str, list[str]] = defaultdict(list)
    for mesh, reason in plan.refused:
        reasons[reason].append(str(mesh))
    if reasons:
        print("\nImpossible:", file=sys.stderr)
    for reason, meshes in reasons.items():
        print(f"  {', '.join(meshes)}: {reason}", file=sys.stderr)


def _mesh_row(one: MeshPlan) -> tuple[str, ...]:
    fits = "yes" if not one.excess else f"{size(one.excess)} too much"
    times = (f"{one.seconds:.4g} s", one.limited_by, f"{one.mfu_bound:.0%}")
    return (str(one.mesh), size(one.memory.total), *times, fits)


def _mesh_json(one: MeshPlan) -> dict[str, Any]:
    return {
        "mesh": one.mesh._asdict(),
        "fits": not one.excess,
        "reason": f"needs {one.excess} bytes more than a device has" if one.excess else None,
        "bytes_per_device": one.memory.total,
        "memory": _memory_json(one.memory),
        "host": dataclasses.asdict(one.host),
        "communication": [_transfer_json(transfer) for transfer in one.transfers],
        "seconds": one.seconds,
        "limited_by": one.limited_by,
        "compute_seconds": one.compute_seconds,
        "memory_seconds": one.memory_seconds,
        "communication_seconds": one.communication_seconds,
        "flops_per_byte": one.intensity,
        "mfu_bound": one.mfu_bound,
    }


def _memory_json(memory: DeviceMemory) -> dict[str, int]:
    return dataclasses.asdict(memory)


def _transfer_json(transfer: Transfer) -> dict[str, Any]:
    return dataclasses.asdict(transfer)
