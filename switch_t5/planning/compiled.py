"""A compiled training step beside its plan: XLA's memory analysis, its operations, and the collectives of its HLO."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax

from switch_t5.planning.hlo import Program, read_program
from switch_t5.planning.plan import MeshPlan


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A quantity of one device by plan and by XLA.

    Attributes:
      name: what it is.
      unit: ``bytes`` or ``FLOPs``.
      planned: by arithmetic.
      compiled: by XLA.
    """

    name: str
    unit: str
    planned: float
    compiled: float

    @property
    def difference(self) -> float | None:
        """Of the plan from XLA, as a share of XLA's; None where XLA has nothing."""
        return (self.planned - self.compiled) / self.compiled if self.compiled else None


def compare(plan: MeshPlan, program: jax.stages.Compiled) -> list[Comparison]:
    """Compares a plan with the program that was compiled for its mesh."""
    memory, statistics = plan.memory, _memory(program)
    kept = memory.total - memory.parameters - memory.optimizer
    hlo = read_program(program.as_text() or "", plan.mesh.size)
    rows = [
        Comparison(
            "parameters and optimizer (XLA: and batch)",
            "bytes",
            memory.parameters + memory.optimizer,
            statistics["arguments"],
        ),
        Comparison("everything else", "bytes", kept, statistics["temporary"]),
        Comparison("all at once", "bytes", memory.total, statistics["peak"]),
        Comparison("products", "FLOPs", plan.executed_flops, float(hlo.product_flops)),
        Comparison("products (plan: the model's)", "FLOPs", plan.model_flops, float(hlo.product_flops)),
    ]
    return rows + _wire(plan, hlo)


def _memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of a device: arguments (the batch too), temporaries, and all of it, donated buffers counted once."""
    found: Any = program.memory_analysis()
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    peak = arguments + temporary + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"arguments": arguments, "temporary": temporary, "peak": peak}


def _wire(plan: MeshPlan, hlo: Program) -> list[Comparison]:
    planned: dict[tuple[str, str], float] = defaultdict(float)
    for one in plan.transfers:
        planned[one.axis, one.collective] += one.sent
    compiled = hlo.sent_by(plan.mesh.axes())
    keys = sorted({*planned, *compiled}, key=lambda key: -max(planned.get(key, 0), compiled.get(key, 0)))
    rows = [
        Comparison(f"{kind} over {axis}", "bytes", planned.get((axis, kind), 0), compiled.get((axis, kind), 0))
        for axis, kind in keys
    ]
    sent, least = sum(compiled.values()), math.fsum(one.minimum for one in plan.transfers)
    return [
        *rows,
        Comparison("on the wire", "bytes", sum(planned.values()), sent),
        Comparison("on the wire (plan: at the least)", "bytes", least, sent),
    ]
