"""The table of our own format: nested names as :mod:`switch_t5.checkpoint.naming` makes them of a training state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from switch_t5.checkpoint.architecture import STACKS, Architecture
from switch_t5.checkpoint.param_map import BLOCK_AXES, OTHER_AXES, Layout, Rule, axes_of, factors
from switch_t5.checkpoint.stored_arrays import StoredArray
from switch_t5.model.stack import shortest_period

STEP = "step"
"""Steps done, int32."""
COUNT = "opt_state/count"
"""The optimizer's updates made, int32."""
_MOMENTS = "opt_state/moments/"

_OTHER_NAMES = {"embedding": "embedding/table", "logits": "logits_dense/kernel"} | {
    f"{stack}/{ours}": f"{stack}/{theirs}"
    for stack in STACKS
    for ours, theirs in {"norm": "norm/scale", "shared_relative_position": "relative_position/embedding"}.items()
}
_KINDS = {"v": "v", "first": "v_row", "second": "v_col", "m": "m"}


def _layout(scanned: tuple[str, ...]) -> Layout:
    named = {name: f"{path}" for name, path in _OTHER_NAMES.items()}
    for stack in STACKS:
        block = "position" if stack in scanned else "layer"
        for name in BLOCK_AXES:
            path = {"relative_position": "relative_position/embedding"}.get(name, name)
            path = f"{path}/scale" if name.endswith("_norm") else path
            named[f"{stack}/{name}"] = f"{stack}/stack/blocks/layers_{{{block}}}/{path}"
    rules = []
    for parameter, path in named.items():
        lead = "layers " if parameter.split("/")[0] in scanned and parameter not in OTHER_AXES else ""
        rules.append(Rule(parameter, f"params/{path}", lead + " ".join(axes_of(parameter))))
        for kind, name in _KINDS.items():
            if factors(parameter) or kind in ("v", "m"):
                axes = lead + " ".join(axes_of(f"{parameter}@{kind}"))
                rules.append(Rule(f"{parameter}@{kind}", f"{_MOMENTS}{path}/{name}", axes))
    names = " and ".join(scanned)
    return Layout(f"our own format{f', {names} scanned' if scanned else ''}", tuple(rules), scanned)


LAYOUTS: dict[tuple[str, ...], Layout] = {scanned: _layout(scanned) for scanned in ((), STACKS, STACKS[:1], STACKS[1:])}
"""A table for each choice of stacks that are scanned."""


def periods(architecture: Architecture) -> dict[str, int]:
    """Blocks in a scanned period by stack."""
    return {stack: shortest_period(architecture.blocks(stack)) for stack in STACKS}


def layout_of(architecture: Architecture, *, scan_layers: bool) -> Layout:
    """The table of a model: a scan stacks the blocks of those stacks that repeat a period."""
    repeat = [stack for stack, period in periods(architecture).items() if period < len(architecture.blocks(stack))]
    return LAYOUTS[tuple(repeat) if scan_layers else ()]


def has_unknown_optimizer(names: Iterable[str]) -> bool:
    """Whether a checkpoint holds the state of another optimizer than Adafactor."""
    return any(name.startswith("opt_state/") and name != COUNT and not name.startswith(_MOMENTS) for name in names)


def tabled(arrays: Mapping[str, StoredArray], *, optimizer: bool) -> dict[str, StoredArray]:
    """The arrays that a table has a place for: no steps, and with ``optimizer`` the state of Adafactor alone."""
    left_out = () if optimizer and not has_unknown_optimizer(arrays) else ("opt_state/",)
    return {
        name: array for name, array in arrays.items() if name not in (STEP, COUNT) and not name.startswith(left_out)
    }
