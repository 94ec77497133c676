"""Which meshes a model can be trained on, how long a step takes there at the least, and what does not fit.

The step's time is a roofline's: the longest of the time that its products take at the chip's peak, that its bytes
take of memory, and that its bytes take of the links, each as if the others were free.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from switch_t5.errors import ConfigError
from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.model.config import TransformerConfig
from switch_t5.planning.chips import Topology
from switch_t5.planning.communication import Transfer, transfers
from switch_t5.planning.flops import device_flops, step_flops
from switch_t5.planning.memory import DeviceMemory, HostMemory, device_memory, host_memory
from switch_t5.planning.workload import MeshShape, Workload

Check = Callable[[Workload, MeshShape], None]
"""Raises ConfigError where a batch or a layer cannot be divided over a mesh."""


@dataclasses.dataclass(frozen=True)
class MeshPlan:
    """What one mesh costs.

    Attributes:
      mesh: its shape.
      memory: of a device.
      host: of a process.
      transfers: what a device sends in a step.
      compute_seconds: of the products at the chip's peak.
      memory_seconds: of the bytes of memory.
      communication_seconds: of the bytes on the wire.
      memory_bytes: read and written in a step, at the least.
      model_flops: of a device in a step: its share of three forward passes.
      executed_flops: of a device in a step, with what is computed again and what several devices compute alike.
      mfu_bound: the model's FLOPs at the chip's peak, as a share of the step's time.
      excess: bytes beyond the chip's memory; 0 where it fits.
    """

    mesh: MeshShape
    memory: DeviceMemory
    host: HostMemory
    transfers: tuple[Transfer, ...]
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    memory_bytes: float
    model_flops: float
    executed_flops: float
    mfu_bound: float
    excess: int

    @property
    def seconds(self) -> float:
        """The roofline's step time."""
        return max(self.compute_seconds, self.memory_seconds, self.communication_seconds)

    @property
    def limited_by(self) -> str:
        """What takes that time."""
        times = {
            "compute": self.compute_seconds,
            "memory bandwidth": self.memory_seconds,
            "communication": self.communication_seconds,
        }
        return max(times, key=times.__getitem__)

    @property
    def intensity(self) -> float:
        """Executed FLOPs a byte of memory traffic."""
        return self.executed_flops / self.memory_bytes

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better: the step's time, and, of equals, what it would be if nothing overlapped."""
        total = self.compute_seconds + self.memory_seconds + self.communication_seconds
        return self.seconds, total


@dataclasses.dataclass(frozen=True)
class Change:
    """The smallest change with which a step fits.

    Attributes:
      words: what to do.
      plan: the mesh that it then fits on.
    """

    words: str
    plan: MeshPlan


@dataclasses.dataclass(frozen=True)
class Plan:
    """All meshes.

    Attributes:
      topology: the devices.
      workload: the step.
      fitting: those that fit, best first.
      too_large: those that do not, the least excess first.
      refused: those that cannot be, with the reason.
      change: what would fit, where nothing does and something would.
    """

    topology: Topology
    workload: Workload
    fitting: tuple[MeshPlan, ...]
    too_large: tuple[MeshPlan, ...]
    refused: tuple[tuple[MeshShape, str], ...]
    change: Change | None


def make_plan(workload: Workload, topology: Topology, check: Check) -> Plan:
    """Plans every mesh of the devices."""
    fitting, too_large, refused = _try_meshes(workload, topology, check)
    # Where nothing can be divided, less memory would not help.
    change = _smallest_change(workload, topology, check) if too_large and not fitting else None
    return Plan(topology, workload, tuple(fitting), tuple(too_large), tuple(refused), change)


def mesh_shapes(workload: Workload, num_devices: int) -> Iterator[MeshShape]:
    """Every way to divide the devices, with no more expert partitions than experts, nor model partitions than heads."""
    config = workload.config
    most = most_experts(config)
    for model in _divisors(num_devices):
        if model <= config.num_heads:
            for expert in _divisors(num_devices // model):
                if expert <= most:
                    rest = num_devices // model // expert
                    yield from (MeshShape(rest // fsdp, expert, model, fsdp) for fsdp in _divisors(rest))


def most_experts(config: TransformerConfig) -> int:
    """The experts of the layer that has most; 1 of a dense model."""
    sparse = (moe for decoder in (False, True) for moe in config.sparse_configs(decoder=decoder))
    return max((moe.num_experts for moe in sparse), default=1)


def plan_mesh(workload: Workload, topology: Topology, mesh: MeshShape) -> MeshPlan:
    """Plans one mesh.

    Raises:
      ConfigError: a parameter cannot be sharded so.
    """
    memory = device_memory(workload, mesh)
    sent = tuple(transfers(workload, mesh, merged=topology.chip.name != "cpu"))
    flops = device_flops(workload, mesh)
    compute = math.fsum(count / topology.chip.peak_flops[dtype] for dtype, count in flops.items())
    traffic = _memory_traffic(workload, memory)
    peak = topology.chip.peak_flops[workload.config.dtype]
    communication = math.fsum(topology.seconds(one.collective, one.sent, *_extent(one.axis, mesh)) for one in sent)
    memory_seconds = traffic / topology.chip.memory_bandwidth
    model_flops = step_flops(workload).model / mesh.size
    return MeshPlan(
        mesh=mesh,
        memory=memory,
        host=host_memory(workload, mesh, topology.chip.devices_per_host),
        transfers=sent,
        compute_seconds=compute,
        memory_seconds=memory_seconds,
        communication_seconds=communication,
        memory_bytes=traffic,
        model_flops=model_flops,
        executed_flops=math.fsum(flops.values()),
        mfu_bound=model_flops / peak / max(compute, memory_seconds, communication),
        excess=max(0, memory.total - topology.chip.memory),
    )


def _try_meshes(
    workload: Workload, topology: Topology, check: Check
) -> tuple[list[MeshPlan], list[MeshPlan], list[tuple[MeshShape, str]]]:
    plans, refused = [], []
    for mesh in mesh_shapes(workload, topology.num_devices):
        try:
            check(workload, mesh)
            plans.append(plan_mesh(workload, topology, mesh))
        except ConfigError as error:
            refused.append((mesh, str(error)))
    fitting = sorted((plan for plan in plans if not plan.excess), key=lambda plan: plan.rank)
    too_large = sorted((plan for plan in plans if plan.excess), key=lambda plan: plan.excess)
    return fitting, too_large, refused


def _smallest_change(workload: Workload, topology: Topology, check: Check) -> Change | None:
    """Tries what costs least first: cheap recomputation, microbatches, both, all recomputation, then more devices."""
    current, count = workload.config.remat_policy, workload.microbatches
    cheap: RematPolicy = "minimal" if current == "none" else current
    more = [count * 2**power for power in range(1, 7)]
    tried: list[tuple[RematPolicy, int]] = [(cheap, count), *itertools.product((current, cheap, "full"), more)]
    tried.insert(tried.index(("full", more[0])), ("full", count))
    changes: list[tuple[str, Workload, int]] = []
    for policy, parts in tried:
        words = [f"TransformerConfig.remat_policy='{policy}'"] * (policy != current)
        words += [f"MICROBATCHES={parts}"] * (parts != count)
        if words:
            changes.append((" and ".join(words), workload.with_changes(remat_policy=policy, microbatches=parts), 1))
    for factor in (2**power for power in range(1, 11)):
        changes.append((f"{topology.num_devices * factor} devices", workload, factor))
    for words, changed, factor in changes:
        fitting, _, _ = _try_meshes(changed, topology.scaled(factor) if factor > 1 else topology, check)
        if fitting:
            return Change(words, fitting[0])
    return None


def _memory_traffic(workload: Workload, memory: DeviceMemory) -> float:
    """Bytes read and written in a step, at the least.

    A pass reads the parameters; a gradient is written once and read three times by Adafactor; parameters and state
    are read and written once by it; what is kept of activations is written and read.
    """
    passes = (1 + workload.forward_passes) * workload.microbatches
    kept = memory.activations + memory.logits + memory.dispatch_buffers
    return (
        (passes + 2) * memory.parameters
        + 4 * memory.gradients
        + 2 * memory.optimizer
        + 2 * kept * workload.microbatches
    )


def _extent(axis: str, mesh: MeshShape) -> tuple[int, int]:
    """Devices along an axis, and between two neighbours on it, as meshes number them."""
    sizes, names = mesh.axes(), axis.split("+")
    order = list(sizes)
    within = order[order.index(names[-1]) + 1 :]
    return math.prod(sizes[name] for name in names), math.prod(sizes[name] for name in within)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
