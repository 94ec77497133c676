"""The tables of T5X: minimal T5 (``examples/t5``), scalable T5, and Flaxformer's Switch, scanned or not.

Sources: T5X's ``examples/t5`` and ``examples/scalable_t5``, Flaxformer's ``t5_architecture`` and ``moe_layers``, and
checkpoints that they wrote. Adafactor's factors follow T5X's ``standard_logical_factor_rules``: ``v_row`` keeps the
side with ``embed``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from switch_t5.checkpoint.architecture import STACKS
from switch_t5.checkpoint.param_map import BLOCK_AXES, MOMENTS, OTHER_AXES, Layout, Rule, axes_of, factors
from switch_t5.checkpoint.stored_arrays import StoredArray

STEP = "state/step"
"""Updates made, int32."""

STATES = "state/param_states/"
_PLACEHOLDER = (1,)
"""The shape of what T5X writes in place of a moment that is not kept."""

_OTHER_NAMES = {"embedding": "token_embedder/embedding", "logits": "decoder/logits_dense/kernel"} | {
    f"{stack}/norm": f"{stack}/{stack}_norm/scale" for stack in STACKS
}


def _in_block(name: str, stack: str, relative_position: str) -> str:
    """A block parameter's name in T5X."""
    own = "attention" if stack == "encoder" else "self_attention"
    layers = {"self_attention": own, "cross_attention": "encoder_decoder_attention", "mlp": "mlp"}
    norms = {"self_attention": own, "cross_attention": "cross_attention", "mlp": "mlp"}
    if name == "relative_position":
        return f"{relative_position}/rel_embedding"
    if name == "mlp/router":
        return "mlp/router/router_weights/w/kernel"
    if name.endswith("_norm"):
        return f"pre_{norms[name.removesuffix('_norm')]}_layer_norm/scale"
    layer, *rest = name.replace("mlp/experts", "mlp").split("/")
    expert = ["expert"] if name.startswith("mlp/experts") else []
    return "/".join([layers[layer], *expert, *rest, "kernel"])


def _dims(axes: tuple[str, ...], *, scanned: bool, merged: bool) -> str:
    """The dims of an array: the scan's axis is the second, heads and kv one dim."""
    text = [*axes]
    if merged and "kv" in text:
        at = text.index("heads")
        text[at : at + 2] = ["(heads kv)"]
    if scanned:
        text.insert(1, "layers")
    return " ".join(text)


def _moment(parameter: str, kind: str) -> str:
    if kind in ("first", "second"):
        return "v_row" if "embed" in axes_of(f"{parameter}@{kind}") else "v_col"
    return kind


def _layout(name: str, block: str, *, scanned: bool, merged: bool, relative_position: str = "relpos_bias") -> Layout:
    named = dict(_OTHER_NAMES)
    if not scanned:
        named |= {f"{stack}/shared_relative_position": f"{stack}/relpos_bias/rel_embedding" for stack in STACKS}
    for stack in STACKS:
        for parameter in BLOCK_AXES:
            path = _in_block(parameter, stack, relative_position)
            named[f"{stack}/{parameter}"] = f"{block.replace('STACK', stack)}/{path}"
    rules = []
    for parameter, path in named.items():
        along = scanned and parameter not in OTHER_AXES
        axes = axes_of(parameter)
        dims = _dims(axes, scanned=along, merged=merged)
        rules.append(Rule(parameter, f"target/{path}", dims))
        for kind in MOMENTS:
            if not factors(parameter) and kind in ("first", "second"):
                continue
            kept = axes_of(f"{parameter}@{kind}")
            words = _kept_dims(dims, kept)
            rules.append(Rule(f"{parameter}@{kind}", f"{STATES}{path}/{_moment(parameter, kind)}", words))
    return Layout(name, tuple(rules), STACKS if scanned else ())


def _kept_dims(dims: str, kept: tuple[str, ...]) -> str:
    """The dims of a moment: its parameter's, less those that it averages."""
    words = dims.replace("(heads kv)", "(heads+kv)").split()
    return " ".join(
        word.replace("+", " ") for word in words if word == "layers" or word.strip("()").split("+")[0] in kept
    )


WRITTEN_OUT = _layout("T5X", "STACK/layers_{layer}", scanned=False, merged=True)
SCANNED = _layout("T5X, scanned", "STACK/STACK/subblock_{position}", scanned=True, merged=True)
SCALABLE = _layout("T5X, scalable T5", "STACK/layers", scanned=True, merged=False, relative_position="relative_posemb")
LAYOUTS = (WRITTEN_OUT, SCANNED, SCALABLE)


def without_placeholders(arrays: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The arrays less the step and the single numbers that stand for moments that are not kept."""
    return {
        name: array
        for name, array in arrays.items()
        if name != STEP and not (name.startswith(STATES) and array.shape == _PLACEHOLDER)
    }


def placeholders(placed: Iterable[str]) -> dict[str, np.ndarray]:
    """What T5X wants beside the moments that are kept: by name, a single zero."""
    names = set(placed)
    parameters = [name.removeprefix("target/") for name in names if name.startswith("target/")]
    wanted = [f"{STATES}{parameter}/{kind}" for parameter in parameters for kind in ("m", "v", "v_col", "v_row")]
    return {name: np.zeros(_PLACEHOLDER, np.float32) for name in wanted if name not in names}
