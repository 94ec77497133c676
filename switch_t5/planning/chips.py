"""The chips that a plan may be for: memory, bandwidths, peak rates, and how they are joined.

Numbers are the makers': bytes are powers of ten, so that what a runtime keeps for itself is left out, and interconnect
bandwidth is what one chip sends, all links together.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping

from switch_t5.errors import UserError, closest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: as a topology's name begins.
      memory: bytes.
      memory_bandwidth: bytes a second.
      peak_flops: floating-point operations a second of matrix products, by dtype, as JAX multiplies it by default.
      link_bandwidth: bytes a second that a device sends to its neighbours, or inside its node, all links together.
      torus_dims: of the interconnect; 0 where nodes of a switch are joined by a network.
      devices_per_host: that one process holds.
      network_bandwidth: bytes a second that a device sends out of its node; None in a torus.
      largest: devices in the largest slice, or None.
    """

    name: str
    memory: int
    memory_bandwidth: float
    peak_flops: Mapping[str, float]
    link_bandwidth: float
    torus_dims: int
    devices_per_host: int
    network_bandwidth: float | None = None
    largest: int | None = None


# A TPU multiplies float32 by one pass of bfloat16 unless asked for more, and so at the same rate. Hosts of slices that
# have several of them hold four chips.
_TPUS = (
    # docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s, 4096 chips. Links: Jouppi et al. 2023 (arXiv
    # 2304.01433), table 4: six of 50 GB/s. The page's 24 TB/s over the bisection of 16x16x16 chips, which 512
    # links cross, would be 47 GB/s.
    Chip("v4", 32 * 2**30, 1.2e12, {"bfloat16": 275e12, "float32": 275e12}, 300e9, 3, 4, largest=4096),
    # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, 400 GB/s both ways together, 256 chips.
    Chip("v5e", 16 * 10**9, 819e9, {"bfloat16": 197e12, "float32": 197e12}, 200e9, 2, 4, largest=256),
    # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GB, 2765 GB/s, 4800 Gbit/s, jobs of at most 6144 chips.
    Chip("v5p", 95 * 10**9, 2.765e12, {"bfloat16": 459e12, "float32": 459e12}, 600e9, 3, 4, largest=6144),
    # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s both ways together, 256 chips.
    Chip("v6e", 32 * 10**9, 1.638e12, {"bfloat16": 918e12, "float32": 918e12}, 400e9, 2, 4, largest=256),
)

# float32 is TF32 there, as JAX multiplies it by default; rates are without sparsity.
_GPUS = (
    # NVIDIA A100 datasheet (SXM, 80 GB): 312 and 156 TFLOP/s, 2039 GB/s, NVLink 600 GB/s both ways together; DGX A100:
    # 200 Gbit/s a GPU.
    Chip("A100", 80 * 10**9, 2.039e12, {"bfloat16": 312e12, "float32": 156e12}, 300e9, 0, 8, 25e9),
    # NVIDIA H100 datasheet (SXM): 989 and 494 TFLOP/s, 3.35 TB/s, 80 GB, NVLink 900 GB/s both ways together; DGX H100:
    # 400 Gbit/s a GPU.
    Chip("H100", 80 * 10**9, 3.35e12, {"bfloat16": 989e12, "float32": 494e12}, 450e9, 0, 8, 50e9),
)

_MOST_DEVICES = 10**6

TPUS = {chip.name: chip for chip in _TPUS}
GPUS = {chip.name: chip for chip in _GPUS}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind.

    Attributes:
      name: as the user wrote it.
      chip: each of them.
      num_devices: all of them.
    """

    name: str
    chip: Chip
    num_devices: int

    def seconds(self, collective: str, sent: float, size: int, inner: int) -> float:
        """The least time of a collective over a mesh axis.

        In a torus an all-to-all is bound by the links that cut the devices in halves: of a torus of side n a half
        sends a quarter of all bytes each way over two cuts, n / 8 times what it would be by one link. The side
        is taken as if the axis were a cube, or a square, the best there is. Between nodes, devices of a node
        that take part share what is summed, and exchange among themselves without the network.

        Args:
          collective: its name in HLO.
          sent: bytes that each device sends.
          size: devices that take part.
          inner: devices between two neighbours of them in a host's order.
        """
        chip = self.chip
        if chip.torus_dims:
            injected = sent / chip.link_bandwidth
            if collective != "all-to-all":
                return injected
            link = chip.link_bandwidth / (2 * chip.torus_dims)
            return max(injected, sent * size ** (1 / chip.torus_dims) / 8 / link)
        together = min(size, max(1, chip.devices_per_host // inner))
        if together >= size or chip.network_bandwidth is None:
            return sent / chip.link_bandwidth
        is_exchange = collective == "all-to-all"
        out = sent * (size - together) / (size - 1) if is_exchange else sent / together
        return max(out / chip.network_bandwidth, (sent - out) / chip.link_bandwidth)

    def scaled(self, factor: int) -> Topology:
        """So many times as many of the chips."""
        return Topology(f"{self.num_devices * factor} x {self.chip.name}", self.chip, self.num_devices * factor)


def parse_topology(name: str) -> Topology:
    """A TPU slice by name, such as ``v5e:16x16``.

    Raises:
      UserError: there is no such chip, or slice; says which ones are near.
    """
    # Cloud TPU writes slices in other ways too, such as v5litepod-16; whoever does is shown how it is written here.
    family, shape_text = re.split("[:-]", f"{name}:", maxsplit=1)
    chip_name = {"v5litepod": "v5e", "v5lite": "v5e"}.get(family.lower(), family.lower())
    chip = TPUS.get(chip_name)
    if chip is None:
        near = closest(chip_name, TPUS) or f" There are {', '.join(TPUS)}; for other devices give --devices."
        raise UserError(f"--topology={name}: there is no TPU {family!r}.{near}")
    shapes = _slices(chip)
    shape = tuple(map(int, re.findall(r"[0-9]{1,6}", shape_text)))
    if shape in shapes and name == f"{chip_name}:{'x'.join(map(str, shape))}":
        return Topology(name, chip, math.prod(shape))
    if shape:
        nearest = sorted(shapes, key=lambda other: _distance(shape, other))[:3]
    else:
        nearest = [shapes[0], shapes[len(shapes) // 2], shapes[-1]]
    listed = ", ".join(f"{chip_name}:{'x'.join(map(str, shape))}" for shape in nearest)
    raise UserError(f"--topology={name}: there is no such slice of {chip_name}; near it are {listed}.")


def parse_devices(text: str) -> Topology:
    """Devices by kind and number, such as ``gpu:H100x256`` or ``cpu:8``.

    Raises:
      UserError: it is neither; says what is near.
    """
    kind, _, rest = text.partition(":")
    if kind == "cpu":
        if not rest.isdigit() or not 1 <= int(rest) <= _MOST_DEVICES:
            raise UserError(f"--devices={text}: give a number of virtual devices, to a million, such as cpu:8.")
        return Topology(text, _cpu(int(rest)), int(rest))
    if kind in TPUS:
        raise UserError(f"--devices={text}: a TPU slice is given by --topology={text}.")
    if kind != "gpu":
        raise UserError(
            f"--devices={text}: there is no kind {kind!r}."
            f"{closest(kind, ('cpu', 'gpu')) or ' It is cpu or gpu, such as cpu:8 or gpu:H100x8.'}"
        )
    found = re.fullmatch(r"(\w+?)x(\d+)", rest)
    if found is None or not 1 <= int(found[2]) <= _MOST_DEVICES:
        raise UserError(f"--devices={text}: give a GPU and how many, to a million, such as gpu:H100x256.")
    chip = GPUS.get(found[1])
    if chip is None:
        near = closest(found[1].upper(), GPUS) or f" There are {', '.join(GPUS)}."
        raise UserError(f"--devices={text}: there is no GPU {found[1]!r}.{near}")
    return Topology(text, chip, int(found[2]))


def _cpu(num_devices: int) -> Chip:
    """A virtual device: its share of this machine's memory, and a nominal share of its rates.

    A core of 3 GHz with two units for eight float32 multiply-adds each has 96 GFLOP/s; a channel of DDR4-2666, or half
    of two cores', 21.3 GB/s. These are orders of magnitude, for nobody plans for a CPU.
    """
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bandwidth = 21.3e9 / num_devices
    rate = cores * 96e9 / num_devices
    return Chip(
        "cpu",
        memory // num_devices,
        bandwidth,
        # XLA's CPU backend multiplies bfloat16 as float32.
        {"bfloat16": rate, "float32": rate},
        bandwidth,
        0,
        num_devices,
    )


def _slices(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The shapes of a TPU's slices, smallest first (docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e)."""
    assert chip.largest is not None
    if chip.torus_dims == 2:
        return ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, 25, 4)  # Cubes of four.
    large = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= chip.largest]
    return (*small, *sorted(large, key=math.prod))


def _distance(wanted: tuple[int, ...], other: tuple[int, ...]) -> tuple[float, int]:
    """How far a shape is: first by the number of chips, then by the sides."""
    ratio = abs(math.log(max(1, math.prod(wanted)) / math.prod(other)))
    padded = (*sorted(wanted), *(1,) * len(other))[: len(other)]
    return ratio, sum(abs(a - b) for a, b in zip(padded, sorted(other), strict=True))
