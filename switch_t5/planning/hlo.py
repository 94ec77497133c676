"""What a compiled program sends and multiplies, read from its HLO text: loops count as often as they run.

XLA's own ``cost_analysis`` counts the body of a loop once. Here the computations are walked from the entry, and a
loop's body counts its known number of trips. Conditionals count all their branches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from switch_t5.planning.communication import ring_bytes

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")

_Arrays = Mapping[str, tuple[tuple[str, tuple[int, ...]], ...]]
"""Dtypes and shapes of a computation's results, by name."""

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*\))?(?: -> .*)? \{")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of HLO.

    Attributes:
      name: its result's.
      arrays: dtype and shape of each array of its result.
      opcode: such as ``dot``.
      rest: operands and attributes, as they stand.
    """

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
      kind: one of KINDS.
      arrays: dtype and shape of each array that a device gets.
      groups: the devices of each group, or each pair of sender and receiver.
      times: how often it runs.
      source: the JAX operation that it comes from, as far as the compiler knows.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: tuple[tuple[int, ...], ...]
    times: int
    source: str

    @property
    def group_size(self) -> int:
        """Devices that take part together."""
        return max((len(group) for group in self.groups), default=1)

    @property
    def nbytes(self) -> int:
        """Of the whole array, as :func:`switch_t5.planning.communication.ring_bytes` takes it, once."""
        got = sum(_nbytes(array) for array in self.arrays)
        return got * self.group_size if self.kind == "reduce-scatter" else got

    @property
    def sent(self) -> float:
        """Bytes that a device sends, all times together."""
        kind = "all-to-all" if self.kind == "ragged-all-to-all" else self.kind
        return self.times * ring_bytes(kind, self.group_size, self.nbytes)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which devices of a group differ.

        Args:
          mesh: devices along each axis, in the mesh's order, which numbers the program's devices.
        """
        shape = tuple(mesh.values())
        varied: set[str] = set()
        for group in self.groups:
            places = np.stack(np.unravel_index(np.asarray(group), shape))
            varied |= {axis for axis, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1}
        return tuple(axis for axis in mesh if axis in varied)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program does.

    Attributes:
      collectives: of more than one device.
      product_flops: of one device: operations of all products, ``dot`` or, as for a TPU, ``convolution``; a
        multiply-add is two.
      loops_of_unknown_length: loops of which nothing says how often they run, and which count once.
    """

    collectives: tuple[Collective, ...]
    product_flops: int
    loops_of_unknown_length: int

    def sent_by(self, mesh: Mapping[str, int]) -> dict[tuple[str, str], float]:
        """Bytes that a device sends, by axes (joined by ``+``) and kind."""
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for one in self.collectives:
            sums["+".join(one.axes(mesh)), one.kind] += one.sent
        return dict(sums)


def read_program(text: str, num_devices: int) -> Program:
    """Reads the text of a compiled program, such as ``jax.stages.Compiled.as_text()``.

    Args:
      text: HLO.
      num_devices: that the program runs on; a collective without groups is of all of them.

    Raises:
      ValueError: there is no entry, or groups are written in a way that is not known.
    """
    computations, entry = _computations(text)
    walk = _Walk(computations, num_devices)
    walk.visit(entry, 1)
    return Program(tuple(walk.collectives), walk.product_flops, walk.loops_of_unknown_length)


class _Walk:
    """Goes through computations from the entry, and counts."""

    def __init__(self, computations: Mapping[str, list[Operation]], num_devices: int) -> None:
        self.computations, self.num_devices = computations, num_devices
        self.collectives: list[Collective] = []
        self.product_flops = 0
        self.loops_of_unknown_length = 0

    def visit(self, name: str, times: int, chains: set[str] | None = None) -> None:
        """Counts a computation.

        Args:
          name: the computation's.
          times: how often it runs.
          chains: the asynchronous collectives that its caller has met; None for one that is no fusion.
        """
        chains = set() if chains is None else chains
        operations = self.computations.get(name, [])
        arrays = {operation.name: operation.arrays for operation in operations}
        for operation in operations:
            kind = operation.opcode.removesuffix("-start")
            if kind in KINDS:
                self._collective(operation, kind, times, chains)
            elif operation.opcode in ("dot", "convolution"):
                count = _dot_flops if operation.opcode == "dot" else _convolution_flops
                self.product_flops += times * count(operation, arrays)
            elif operation.opcode == "while":
                self.visit(_attribute(operation, "body"), times * self._trips(operation))
            elif not operation.opcode.endswith(("-done", "-update")):
                for called in _called(operation):
                    if called.startswith("all-reduce-scatter"):
                        self._scatter(operation, called, times)
                    else:
                        self.visit(called, times, chains if operation.opcode == "fusion" else None)

    def _scatter(self, fusion: Operation, called: str, times: int) -> None:
        """A TPU's reduce-scatter, written as a fusion of an all-reduce with the slices that it leaves."""
        for operation in self.computations.get(called, []):
            if operation.opcode == "all-reduce":
                result = dataclasses.replace(operation, arrays=fusion.arrays)
                self._collective(result, "reduce-scatter", times, set())

    def _collective(self, operation: Operation, kind: str, times: int, chains: set[str]) -> None:
        # A TPU's asynchronous collective stands in each fusion that computes beside it, and is sent once.
        chain = re.search(r'chain_id="(\w+)"', operation.rest)
        if chain:
            if chain[1] in chains:
                return
            chains.add(chain[1])
        groups = tuple(group for group in _groups(operation.rest, self.num_devices) if len(group) > 1)
        if groups:
            source = re.search(r'op_name="([^"]*)"', operation.rest)
            arrays = _received(operation)
            self.collectives.append(Collective(kind, arrays, groups, times, source[1] if source else ""))

    def _trips(self, loop: Operation) -> int:
        """How often a loop runs: as the compiler says, or by the bound that its condition compares a counter with."""
        known = _TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition = self.computations.get(_attribute(loop, "condition"), [])
        bounds = [re.match(r"(\d+)\)", one.rest) for one in condition if one.opcode == "constant"]
        compared = [one for one in condition if one.opcode == "compare" and "direction=LT" in one.rest]
        if len(bounds) == 1 and bounds[0] and len(compared) == 1:
            return int(bounds[0][1])
        self.loops_of_unknown_length += 1
        return 1


def _computations(text: str) -> tuple[dict[str, list[Operation]], str]:
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    entry = ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head and " = " not in line.split("{")[0]:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif operation := _operation(line):
            current.append(operation)
    if not entry:
        raise ValueError("the text has no ENTRY: it is not the HLO of a program")
    return computations, entry


def _operation(line: str) -> Operation | None:
    start = _OPERATION.match(line)
    if start is None:
        return None
    end = _type_end(line, start.end())
    opcode = _OPCODE.match(line, end)
    if opcode is None:
        return None
    arrays = tuple(
        (dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", line[start.end() : end]))
    )
    return Operation(start[1], arrays, opcode[1], line[opcode.end() :])


def _type_end(line: str, start: int) -> int:
    """Where the type that starts there ends: at the bracket that closes a tuple, or at a space."""
    if line[start] != "(":
        return line.find(" ", start)
    depth = 0
    for index in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if not depth:
            return index + 1
    return len(line)


def _attribute(operation: Operation, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", operation.rest)
    if found is None:
        raise ValueError(f"the {operation.opcode} {operation.name} has no {name}")
    return found[1]


def _called(operation: Operation) -> list[str]:
    called = _CALLED.findall(operation.rest)
    for branches in _BRANCHES.findall(operation.rest):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    return called


def _received(operation: Operation) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What a device gets; an asynchronous start's result holds what it gives as well."""
    arrays = operation.arrays
    match operation.opcode:
        case "all-gather-start" | "reduce-scatter-start" | "all-to-all-start":
            return arrays[len(arrays) // 2 :]
        case "collective-permute-start":
            return arrays[1:2]
        case _:
            return arrays


def _nbytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = array
    bits = _BITS[dtype] if dtype in _BITS else int(re.findall(r"\d+", dtype)[0])
    bits *= 2 if dtype.startswith("c") else 1
    return math.ceil(math.prod(shape) * bits / 8)


def _dot_flops(operation: Operation, arrays: _Arrays) -> int:
    shape = _first_operand(operation, arrays)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.rest)
    inner = math.prod(shape[int(dim)] for dim in (contracted[1] if contracted else "").split(",") if dim)
    return 2 * math.prod(operation.arrays[0][1]) * inner


def _convolution_flops(operation: Operation, arrays: _Arrays) -> int:
    """Of a product that is written as a convolution, whose spatial dims may be dims of a batch or of a sum.

    A place of the window counts where it meets an entry of the input: padding and the gaps of a dilation do not.
    """
    shape, result = _first_operand(operation, arrays), operation.arrays[0][1]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.rest)
    if labels is None:
        raise ValueError(f"the convolution {operation.name} does not label its dims")
    into, _, out = labels.groups()
    groups = re.search(r"feature_group_count=(\d+)", operation.rest)
    features = shape[into.index("f")] // (int(groups[1]) if groups else 1)
    count = result[out.index("b")] * result[out.index("f")] * features
    window = _window(operation.rest)
    for dim, size in enumerate(window["size"]):
        stride, dilation, spread = (window[name][dim] for name in ("stride", "lhs_dilate", "rhs_dilate"))
        outputs, inputs = result[out.index(str(dim))], shape[into.index(str(dim))]
        places = np.arange(outputs)[:, None] * stride + np.arange(size) * spread - window["pad"][dim]
        count *= int(((places >= 0) & (places <= (inputs - 1) * dilation) & (places % dilation == 0)).sum())
    return 2 * count


def _window(rest: str) -> dict[str, list[int]]:
    """What is written as ``window={size=8x16 pad=7_7x15_15 ...}``, a number a spatial dim: of padding that before."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    written = dict(part.split("=") for part in found[1].split()) if found else {}
    sizes = [int(size) for size in written.get("size", "").split("x") if size]
    window = {"size": sizes}
    for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1)):
        given = written.get(name)
        window[name] = [int(one.split("_")[0]) for one in given.split("x")] if given else [default] * len(sizes)
    return window


def _first_operand(operation: Operation, arrays: _Arrays) -> tuple[int, ...]:
    operand = re.search(r"%?([\w.\-]+)\s*[,)]", _without_types(operation.rest))
    if operand is None or operand[1] not in arrays:
        raise ValueError(f"the {operation.opcode} {operation.name} names an operand that is not in its computation")
    return arrays[operand[1]][0][1]


def _without_types(text: str) -> str:
    """Operands without their types, which some versions of the text repeat."""
    return re.sub(r"\b[a-z]\w*\[[\d,]*\](?:\{[^}]*\})? ", "", text)


def _groups(rest: str, num_devices: int) -> Iterator[tuple[int, ...]]:
    """The groups of a collective, in each of the ways that HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?\s*)*)\}", rest):
        yield from (pair for pair in _braces(pairs[1]) if pair[0] != pair[1])
    elif listed := re.search(r"replica_groups=\{((?:\{[\d, ]*\},?\s*)*)\}", rest):
        yield from _braces(listed[1]) or [tuple(range(num_devices))]
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = _integers(iota[1]), _integers(iota[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(_integers(iota[3])) if iota[3] else ids
        yield from map(tuple, ids.reshape(-1, shape[-1]).tolist())
    elif mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}", rest):
        yield from _mesh_groups(mesh[1], mesh[2] or "", mesh[3])
    elif "replica_groups=" not in rest:
        yield tuple(range(num_devices))
    else:
        raise ValueError(f"groups that cannot be read: {rest[rest.index('replica_groups=') :][:80]}")


def _mesh_groups(mesh: str, order: str, axes: str) -> Iterator[tuple[int, ...]]:
    """Groups as axes of a mesh, ``'a'=4,'b'=2`` and ``'a'``, or a part of an axis, ``'a':(2)2``: from 2, of size 2.

    Its devices are in order, or in one such as ``[4,2]T(1,0)``, or listed.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    parts: list[list[int]] = []
    chosen: list[int] = []
    asked = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _asked(axes)}
    for name, size in sizes.items():
        before, taken = asked.get(name, (1, size))
        if name in asked:
            chosen.append(len([part for group in parts for part in group]) + 1)
        parts.append([before, taken, size // before // taken])
    ids = _device_order(order, math.prod(sizes.values())).reshape([part for group in parts for part in group])
    others = [dim for dim in range(ids.ndim) if dim not in chosen]
    together = math.prod(ids.shape[dim] for dim in chosen)
    yield from map(tuple, ids.transpose([*others, *chosen]).reshape(-1, together).tolist())


def _device_order(order: str, count: int) -> np.ndarray:
    if not order:
        return np.arange(count)
    if iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = np.arange(count).reshape(_integers(iota[1]))
        return ids.transpose(_integers(iota[2])) if iota[2] else ids
    return np.asarray(_integers(order))


def _asked(axes: str) -> list[tuple[str, str, str]]:
    return re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)


def _braces(text: str) -> list[tuple[int, ...]]:
    return [_integers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.replace(" ", "").split(",") if number)


def largest(program: Program, count: int) -> list[Collective]:
    """The collectives that send most."""
    return list(itertools.islice(sorted(program.collectives, key=lambda one: -one.sent), count))
