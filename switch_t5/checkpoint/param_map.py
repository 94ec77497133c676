"""One engine for every table of names: where each parameter of a model is stored, and how its dims lie.

A :class:`Rule` says of one parameter of one block by what name a format stores it, and in which order its
axes lie. The transformation between two formats is never written down: it follows from the axes of both. In a
rule's name ``{layer}`` and ``{expert}`` are indices, so that the axis of that name is spread over several
arrays; ``{position}`` is a block's place in a scanned period, whose repetitions lie along the axis
``layers``. Parentheses merge axes into one dim::

    Rule("encoder/self_attention/query", "encoder.block.{layer}...q.weight", "(heads kv) embed")
    Rule("encoder/mlp/experts/wi", "encoder/encoder/subblock_{position}/mlp/...", "expert layers embed mlp")

Parameters are called as our model calls them, less the block. The optimizer's moments of a parameter are
parameters too: ``<parameter>@v`` and ``@m`` have its axes, ``@first`` and ``@second`` (Adafactor's factors) those
of its matrix's first and second side.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax import numpy as jnp

from switch_t5.checkpoint.architecture import STACKS, Architecture
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, Index, OpenCheckpoint, StoredArray
from switch_t5.errors import UserError

Axes = tuple[str, ...]
Dims = tuple[Axes, ...]
"""A dim of a stored array is one axis, or several merged."""

_KERNELS = {"query": "embed heads kv", "key": "embed heads kv", "value": "embed heads kv", "out": "heads kv embed"}
_FEED_FORWARD = {"wi": "embed mlp", "wi_0": "embed mlp", "wi_1": "embed mlp", "wo": "mlp embed"}
BLOCK_AXES: dict[str, Axes] = {
    **{f"{name}_norm": ("embed",) for name in ("self_attention", "cross_attention", "mlp")},
    **{
        f"{kind}_attention/{name}": tuple(axes.split()) for kind in ("self", "cross") for name, axes in _KERNELS.items()
    },
    **{f"mlp/{name}": tuple(axes.split()) for name, axes in _FEED_FORWARD.items()},
    **{f"mlp/experts/{name}": ("expert", *axes.split()) for name, axes in _FEED_FORWARD.items()},
    "mlp/router": ("embed", "expert"),
    "relative_position": ("heads", "relpos_buckets"),
}
"""The parameters of a block and their axes."""
OTHER_AXES: dict[str, Axes] = {"embedding": ("vocab", "embed"), "logits": ("embed", "vocab")} | {
    f"{stack}/{name}": axes
    for stack in STACKS
    for name, axes in {"norm": ("embed",), "shared_relative_position": ("heads", "relpos_buckets")}.items()
}
"""The parameters outside blocks."""
MOMENTS = ("v", "first", "second", "m")


def axes_of(parameter: str) -> Axes:
    """The axes of a parameter of one block, in our order; of a moment, those that are left."""
    parameter, _, moment = parameter.partition("@")
    axes = OTHER_AXES[parameter] if parameter in OTHER_AXES else BLOCK_AXES[parameter.split("/", 1)[1]]
    if moment in ("first", "second"):
        lead = 1 if axes[0] == "expert" else 0
        sides = _sides(axes[lead:])
        return (*axes[:lead], *sides[moment == "second"])
    return axes


def factors(parameter: str) -> bool:
    """Whether a parameter is a matrix (or a stack of them) whose moments can be factored."""
    axes = axes_of(parameter)
    return "relpos_buckets" not in axes and len(axes) > 1


def _sides(axes: Axes) -> tuple[Axes, Axes]:
    """The two sides of a matrix; heads and kv are one."""
    cut = 2 if axes[:2] == ("heads", "kv") else 1
    return axes[:cut], axes[cut:]


def is_in_block(parameter: str) -> bool:
    """Whether every block of a stack has one."""
    return parameter.partition("@")[0] not in OTHER_AXES


def parameters(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters of a model, each with the blocks that have it; ``()`` outside blocks."""
    found: dict[str, tuple[int, ...]] = {"embedding": ()}
    if not architecture.tied_logits:
        found["logits"] = ()
    inputs = ("wi_0", "wi_1") if architecture.gated else ("wi",)
    for stack in STACKS:
        pattern = architecture.blocks(stack)
        every = tuple(range(len(pattern)))
        sparse = tuple(index for index in every if pattern[index])
        dense = tuple(index for index in every if not pattern[index])
        if not architecture.relpos_per_layer:
            found[f"{stack}/shared_relative_position"] = ()
        found[f"{stack}/norm"] = ()
        kinds = ("self", "cross") if stack == "decoder" else ("self",)
        in_all = [f"{kind}_attention_norm" for kind in kinds] + ["mlp_norm"]
        in_all += [f"{kind}_attention/{name}" for kind in kinds for name in _KERNELS]
        in_all += ["relative_position"] if architecture.relpos_per_layer else []
        found |= {f"{stack}/{name}": every for name in in_all}
        found |= {f"{stack}/mlp/{name}": dense for name in (*inputs, "wo") if dense}
        found |= {f"{stack}/mlp/experts/{name}": sparse for name in (*inputs, "wo") if sparse}
        found |= {f"{stack}/mlp/router": sparse} if sparse else {}
    return found


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a format stores a parameter.

    Attributes:
      parameter: ours, ``<stack>/<name in the block>`` or one outside blocks.
      name: theirs, with placeholders.
      axes: of the stored array, in order; parentheses merge.
    """

    parameter: str
    name: str
    axes: str

    @property
    def dims(self) -> Dims:
        """The axes of each dim."""
        return tuple(
            tuple(merged.split()) if merged else (single,)
            for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        )

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names that the rule makes."""
        parts = re.split(r"\{(\w+)\}", self.name)
        text = "".join(f"(?P<{part}>\\d+)" if odd % 2 else re.escape(part) for odd, part in enumerate(parts))
        return re.compile(text)

    @property
    def outline(self) -> str:
        """The name with each number and placeholder as ``#``: what a look-up of rules goes by."""
        return outline(re.sub(r"\{\w+\}", "0", self.name))


def outline(name: str) -> str:
    """A name with each number as ``#``."""
    return re.sub(r"\d+", "#", name)


@dataclasses.dataclass(frozen=True)
class Placed:
    """One stored array and the part of a parameter in it.

    Attributes:
      name: the array's.
      parameter: which it is of.
      dims: the axes of its dims.
      shape: its sizes.
      layers: the blocks whose parameter it holds, in order; one where it has no axis ``layers``, and none outside
        blocks.
      expert: which expert, where experts are arrays of their own.
    """

    name: str
    parameter: str
    dims: Dims
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    expert: int | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """The table of a format.

    Attributes:
      name: for messages.
      rules: one a parameter of the model.
      scanned: the stacks whose blocks lie along an axis of their arrays, a period apart.
    """

    name: str
    rules: tuple[Rule, ...]
    scanned: tuple[str, ...] = ()

    def place(
        self, architecture: Architecture, periods: Mapping[str, int], moments: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, Placed]:
        """Every array of a model in this format.

        Args:
          architecture: the model.
          periods: blocks of a scanned period by stack; ignored where nothing is scanned.
          moments: for each parameter the kinds of moments that the optimizer keeps; None for parameters alone.

        Raises:
          UserError: the format has no place for one of the parameters.
        """
        rules = {rule.parameter: rule for rule in self.rules}
        placed: dict[str, Placed] = {}
        for parameter, blocks in parameters(architecture).items():
            kinds = () if moments is None else tuple(moments.get(parameter, ()))
            for key in (parameter, *(f"{parameter}@{kind}" for kind in kinds)):
                if key not in rules:
                    raise UserError(
                        f"The format {self.name} has no place for the parameter {key}: choose another format."
                    )
                for entry in _entries(rules[key], architecture, blocks, periods):
                    placed[entry.name] = entry
        return placed


def _entries(
    rule: Rule, architecture: Architecture, blocks: tuple[int, ...], periods: Mapping[str, int]
) -> Iterator[Placed]:
    """The arrays that one rule makes."""
    stack = rule.parameter.split("/")[0]
    stacked = "{position}" in rule.name or ("layers",) in rule.dims
    if not is_in_block(rule.parameter):
        groups: list[tuple[dict[str, int], tuple[int, ...]]] = [({}, ())]
    elif stacked:
        period = periods[stack]
        positions = sorted({block % period for block in blocks})
        groups = [({"position": at}, tuple(block for block in blocks if block % period == at)) for at in positions]
    else:
        groups = [({"layer": block}, (block,)) for block in blocks]
    experts = range(architecture.experts(stack)) if "{expert}" in rule.name else (None,)
    for (fields, layers), expert in itertools.product(groups, experts):
        sizes = {axis: architecture.size(axis, stack) for dim in rule.dims for axis in dim if axis != "layers"}
        sizes["layers"] = len(layers)
        shape = tuple(int(np.prod([sizes[axis] for axis in dim])) for dim in rule.dims)
        yield Placed(rule.name.format(expert=expert, **fields), rule.parameter, rule.dims, shape, layers, expert)


class Reader:
    """A checkpoint seen as parameters: any part of any of them, read from the arrays that hold it."""

    def __init__(self, checkpoint: OpenCheckpoint, placed: Mapping[str, Placed], architecture: Architecture) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture
        self._by_parameter: dict[str, list[Placed]] = {}
        for entry in placed.values():
            self._by_parameter.setdefault(entry.parameter, []).append(entry)

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._by_parameter

    def layers(self, parameter: str) -> set[int]:
        """The blocks that have a parameter here."""
        return {layer for entry in self._by_parameter.get(parameter, ()) for layer in entry.layers}

    def stored(self, parameter: str) -> list[StoredArray]:
        """The arrays that hold a parameter."""
        return [self.checkpoint.arrays[entry.name] for entry in self._by_parameter[parameter]]

    def dtype(self, parameter: str) -> np.dtype:
        """One that rounds nothing, where the arrays of blocks and experts have several."""
        return functools.reduce(jnp.promote_types, {array.dtype for array in self.stored(parameter)})

    def read(self, parameter: str, layers: tuple[int, ...], region: Mapping[str, slice]) -> np.ndarray:
        """Reads a part of a parameter.

        Args:
          parameter: which.
          layers: the blocks wanted; empty outside blocks.
          region: the part of each axis.

        Returns:
          The values with a leading dim over ``layers`` (1 outside blocks), then the parameter's axes in our order.
        """
        axes = axes_of(parameter)
        shape = (max(1, len(layers)), *(region[axis].stop - region[axis].start for axis in axes))
        result = np.empty(shape, self.dtype(parameter))
        for entry in self._by_parameter[parameter]:
            self._fill(result, entry, axes, layers, region)
        return result

    def _fill(
        self, result: np.ndarray, entry: Placed, axes: Axes, layers: tuple[int, ...], region: Mapping[str, slice]
    ) -> None:
        """Reads what one stored array holds of a region into its place."""
        own = dict(region)
        target: list[slice | list[int]] = [slice(None)] * result.ndim
        if entry.expert is not None:
            if not region["expert"].start <= entry.expert < region["expert"].stop:
                return
            at = entry.expert - region["expert"].start
            target[1 + axes.index("expert")] = slice(at, at + 1)
            own["expert"] = slice(0, 1)
        stacked, positions = ("layers",) in entry.dims, list[int]()
        if entry.layers:
            wanted = [layer for layer in layers if layer in entry.layers]
            if not wanted:
                return
            target[0] = [layers.index(layer) for layer in wanted]
            positions = [entry.layers.index(layer) for layer in wanted]
            if stacked:
                own["layers"] = slice(min(positions), max(positions) + 1)
        values = self._read_axes(entry, own)
        order = [axis for dim in entry.dims for axis in dim]
        if entry.expert is not None:
            values, order = values[None], ["expert", *order]
        if not stacked:
            values, order = values[None], ["layers", *order]
        values = values.transpose([order.index(axis) for axis in ("layers", *axes)])
        if stacked and entry.layers:
            values = values[[position - own["layers"].start for position in positions]]
        result[tuple(target)] = values

    def _read_axes(self, entry: Placed, region: Mapping[str, slice]) -> np.ndarray:
        """Reads a part of a stored array, its merged dims split: a dim an axis."""
        index, split, inner = [], [], []
        for dim in entry.dims:
            outer = region[dim[0]]
            if len(dim) == 1:
                index.append(outer)
                split.append(outer.stop - outer.start)
                inner.append(slice(None))
                continue
            # The minor of two merged axes is read whole: a part of it would be many small pieces.
            minor = self.architecture.size(dim[1], entry.parameter.split("/")[0])
            index.append(slice(outer.start * minor, outer.stop * minor))
            split += [outer.stop - outer.start, minor]
            inner += [slice(None), region[dim[1]]]
        return self.checkpoint.arrays[entry.name].read(tuple(index)).reshape(split)[tuple(inner)]


def write_order(entry: Placed, values: np.ndarray) -> np.ndarray:
    """Values as :meth:`Reader.read` returns them, as an array of the target's dims."""
    axes = axes_of(entry.parameter)
    have = ["layers", *axes]
    order = [axis for dim in entry.dims for axis in dim]
    if ("layers",) not in entry.dims:
        values, have = values[0], have[1:]
    if entry.expert is not None:
        at = have.index("expert")
        values = np.squeeze(values, at)
        have.pop(at)
    values = values.transpose([have.index(axis) for axis in order])
    shape, position = [], 0
    for dim in entry.dims:
        shape.append(int(np.prod(values.shape[position : position + len(dim)])))
        position += len(dim)
    return values.reshape(shape)


def region_of(entry: Placed, architecture: Architecture, index: Index) -> tuple[tuple[int, ...], dict[str, slice]]:
    """The part of a parameter that a part of a stored array is: blocks and a slice an axis.

    A part of a merged dim must begin and end between its outer axis's members.
    """
    stack = entry.parameter.split("/")[0]
    layers = entry.layers
    region: dict[str, slice] = {}
    for dim, part in zip(entry.dims, index, strict=True):
        if dim == ("layers",):
            layers = entry.layers[part]
        elif len(dim) == 1:
            region[dim[0]] = part
        else:
            minor = architecture.size(dim[1], stack)
            region[dim[0]] = slice(part.start // minor, part.stop // minor)
            region[dim[1]] = slice(0, minor)
    if entry.expert is not None:
        region["expert"] = slice(entry.expert, entry.expert + 1)
    return layers, region


def convert(reader: Reader, entry: Placed, architecture: Architecture, index: Index | None = None) -> np.ndarray:
    """Reads what belongs into a stored array of another format, or into a part of it."""
    index = tuple(slice(0, dim) for dim in entry.shape) if index is None else index
    widened, cut = [], []
    for dim, part in zip(entry.dims, index, strict=True):
        # A merged dim is read from one outer member's begin to another's end.
        minor = architecture.size(dim[1], entry.parameter.split("/")[0]) if len(dim) == 2 else 1
        start, stop = part.start // minor * minor, -(-part.stop // minor) * minor
        widened.append(slice(start, stop))
        cut.append(slice(part.start - start, part.stop - start))
    layers, region = region_of(entry, architecture, tuple(widened))
    return write_order(entry, reader.read(entry.parameter, layers, region))[tuple(cut)]


def check_names(checkpoint: OpenCheckpoint, placed: Mapping[str, Placed], described: str) -> None:
    """Checks that each array has its place and each place its array, of the right shape.

    Raises:
      CheckpointDamaged: arrays are missing, or have another shape.
      UserError: there are arrays that have no place.
    """
    found = checkpoint.arrays
    missing = [name for name in placed if name not in found]
    extra = [name for name in found if name not in placed]
    if missing:
        raise CheckpointDamaged(
            f"{checkpoint.path} lacks {_listed(missing, extra)}, which {described} has"
            + (f"; it has {_listed(extra, missing)} instead" if extra else "")
            + ": get the missing files, or name another folder."
        )
    if extra:
        raise UserError(
            f"{checkpoint.path} holds {_listed(extra, list(placed))}, which has no place in {described}: this is "
            "another model than the ones that are known."
        )
    for name, entry in placed.items():
        if found[name].shape != entry.shape:
            raise UserError(
                f"{checkpoint.path} holds {name} of shape {found[name].shape}, where {described} has {entry.shape}."
            )


def _listed(names: list[str], others: list[str]) -> str:
    """The first names, each with the nearest of the other side."""
    shown = []
    for name in names[:5]:
        near = difflib.get_close_matches(name, others[:2000], n=1, cutoff=0.8)
        shown.append(f"{name}{f' (near {near[0]})' if near else ''}")
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(shown) + more
