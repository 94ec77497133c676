"""What model a checkpoint holds: read off the names and shapes of its arrays."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from switch_t5.checkpoint.architecture import STACKS, Architecture
from switch_t5.checkpoint.param_map import MOMENTS, Layout, Reader, Rule, check_names, is_in_block, outline, parameters
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, OpenCheckpoint
from switch_t5.errors import UserError

_MOST_BLOCKS = 1 << 14


class Recognised(NamedTuple):
    """A checkpoint whose every array has its place in a table.

    Attributes:
      reader: its parameters, to be read.
      layout: the table.
      architecture: the model.
      moments: the kinds of moments by parameter; empty without an optimizer, or with one that no table knows.
      unknown_optimizer: whether there is one that no table knows.
    """

    reader: Reader
    layout: Layout
    architecture: Architecture
    moments: dict[str, tuple[str, ...]]
    unknown_optimizer: bool = False


def recognise(
    checkpoint: OpenCheckpoint, layouts: Sequence[Layout], *, expected: Architecture | None = None
) -> Recognised:
    """Finds the table that a checkpoint's arrays fit, strictly both ways.

    Args:
      checkpoint: opened.
      layouts: the tables of its format.
      expected: the model that a description beside the arrays promises; None reads it off the arrays, where what is
        missing altogether (a whole last block) cannot be missed.

    Raises:
      CheckpointDamaged: arrays are missing.
      UserError: arrays have no place in any table.
    """
    matches = [_match(checkpoint, layout) for layout in layouts]
    best = max(matches, key=lambda match: len(match.names))
    if not best.names:
        some = ", ".join(list(checkpoint.arrays)[:3])
        raise UserError(
            f"{checkpoint.path} holds no T5 or Switch Transformer that is known: its arrays are {some}, ..."
        )
    architecture = expected or best.architecture(checkpoint.path)
    periods = best.periods(architecture)
    moments = best.moments()
    placed = best.layout.place(architecture, periods, moments)
    check_names(checkpoint, placed, _described(best.layout, architecture))
    return Recognised(Reader(checkpoint, placed, architecture), best.layout, architecture, moments)


def _described(layout: Layout, architecture: Architecture) -> str:
    experts = max(architecture.encoder_experts, architecture.decoder_experts)
    kind = f"a Switch Transformer of {experts} experts" if experts else "a T5"
    return f"{kind} with {len(architecture.encoder)} + {len(architecture.decoder)} blocks in {layout.name}"


class _Match:
    """Which arrays of a checkpoint a table's rules match, and what follows from them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.names: dict[str, tuple[Rule, dict[str, int]]] = {}
        self.sizes: dict[str, dict[str, int]] = {stack: {} for stack in (*STACKS, "")}
        self.counts: dict[str, dict[str, int]] = {stack: defaultdict(int) for stack in (*STACKS, "")}
        self.stacked: dict[str, int] = {}
        self.merged: int | None = None

    def add(self, name: str, rule: Rule, fields: dict[str, int], shape: tuple[int, ...]) -> None:
        """Takes in one array of a parameter (moments say nothing new)."""
        self.names[name] = rule, fields
        if "@" in rule.parameter:
            return
        stack = rule.parameter.split("/")[0] if "/" in rule.parameter else ""
        for field, value in fields.items():
            self.counts[stack][field] = max(self.counts[stack][field], value + 1)
        for dim, size in zip(rule.dims, shape, strict=False):
            if dim == ("layers",):
                self.stacked[stack] = size
            elif len(dim) == 1:
                self.sizes[stack][dim[0]] = size
            else:
                self.merged = size

    def size(self, axis: str, path: str) -> int:
        """The size of an axis that all stacks share."""
        for sizes in self.sizes.values():
            if axis in sizes:
                if not sizes[axis]:
                    raise CheckpointDamaged(f"{path} is damaged: it has an array whose axis {axis} is of size 0.")
                return sizes[axis]
        if axis == "kv" and self.merged is not None:
            return self.merged // self.size("heads", path)
        if axis == "heads":
            raise CheckpointDamaged(f"{path} lacks a relative position bias, by which its heads are counted.")
        raise CheckpointDamaged(f"{path} lacks every array with the axis {axis}: it is not whole.")

    def has(self, parameter: str) -> bool:
        return any(rule.parameter == parameter for rule, _ in self.names.values())

    def pattern(self, stack: str, path: str) -> tuple[bool, ...]:
        """Which blocks of a stack are sparse: those with a router or experts."""
        sparse_names = (f"{stack}/mlp/router", f"{stack}/mlp/experts/")
        counts = self.counts[stack]
        sparse = {
            fields.get("layer", fields.get("position", 0))
            for rule, fields in self.names.values()
            if rule.parameter.startswith(sparse_names) and "@" not in rule.parameter
        }
        blocks = counts["layer"] or counts["position"]
        if stack in self.layout.scanned and stack in self.stacked:
            blocks = max(1, counts["position"])
            if self.stacked[stack] > _MOST_BLOCKS:
                raise UserError(f"{path} stacks {self.stacked[stack]:,} blocks, more than any model has: refused.")
            return tuple(index in sparse for index in range(blocks)) * self.stacked[stack]
        return tuple(index in sparse for index in range(blocks))

    def architecture(self, path: str) -> Architecture:
        """The model that the arrays are of."""
        patterns = {stack: self.pattern(stack, path) for stack in STACKS}
        experts = {
            stack: max(self.sizes[stack].get("expert", 0), self.counts[stack]["expert"]) if any(patterns[stack]) else 0
            for stack in STACKS
        }
        return Architecture(
            vocab_size=self.size("vocab", path),
            emb_dim=self.size("embed", path),
            num_heads=self.size("heads", path),
            head_dim=self.size("kv", path),
            mlp_dim=self.size("mlp", path),
            relpos_num_buckets=self.size("relpos_buckets", path),
            encoder=patterns["encoder"],
            decoder=patterns["decoder"],
            encoder_experts=experts["encoder"],
            decoder_experts=experts["decoder"],
            gated=any(rule.parameter.endswith("/wi_0") for rule, _ in self.names.values()),
            tied_logits=not self.has("logits"),
            relpos_per_layer=any(self.has(f"{stack}/relative_position") for stack in STACKS),
        )

    def periods(self, architecture: Architecture) -> dict[str, int]:
        """Blocks in a scanned period by stack."""
        return {stack: len(architecture.blocks(stack)) // self.stacked.get(stack, 1) for stack in self.layout.scanned}

    def moments(self) -> dict[str, tuple[str, ...]]:
        """The kinds of moments of each parameter."""
        found: dict[str, set[str]] = defaultdict(set)
        for rule, _ in self.names.values():
            parameter, _, kind = rule.parameter.partition("@")
            if kind:
                found[parameter].add(kind)
        return {parameter: tuple(kind for kind in MOMENTS if kind in kinds) for parameter, kinds in found.items()}


def _match(checkpoint: OpenCheckpoint, layout: Layout) -> _Match:
    match = _Match(layout)
    by_outline: dict[str, list[tuple[Rule, re.Pattern[str]]]] = defaultdict(list)
    for rule in layout.rules:
        by_outline[rule.outline].append((rule, rule.pattern))
    for name, array in checkpoint.arrays.items():
        for rule, pattern in by_outline.get(outline(name), ()):
            found = pattern.fullmatch(name)
            if found and len(array.shape) == len(rule.dims):
                fields = {key: _number(value, name, checkpoint) for key, value in found.groupdict().items()}
                match.add(name, rule, fields, array.shape)
                break
    return match


def _number(digits: str, name: str, checkpoint: OpenCheckpoint) -> int:
    """A block's or expert's number in a name, of which each below has an array."""
    if len(digits) > 9 or int(digits) >= len(checkpoint.arrays):
        raise UserError(
            f"{checkpoint.path} names {name[:200]}, a number beyond that of its arrays, {len(checkpoint.arrays)}: it "
            "is not whole."
        )
    return int(digits)


def check_whole(recognised: Recognised) -> None:
    """Checks that optimizer state, where there is some, is there for every parameter.

    Raises:
      CheckpointDamaged: a parameter has none, or half of it.
    """
    if not recognised.moments:
        return
    for parameter in parameters(recognised.architecture):
        kinds = set(recognised.moments.get(parameter, ())) - {"m"}
        if kinds not in ({"v"}, {"first", "second"}):
            where = " of each block" if is_in_block(parameter) else ""
            raise CheckpointDamaged(
                f"{recognised.reader.checkpoint.path} holds of the optimizer's moments of {parameter}{where} "
                f"{', '.join(sorted(kinds)) or 'nothing'}: it is not whole."
            )
