"""The bias that evens the experts' load without a loss.

Source: DeepSeek-V3 (2024), section 2.1.2, after Wang et al. 2024. The bias is a parameter that no gradient reaches:
it only orders a token's choices. After each step an expert that got more than its share has its bias lowered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from switch_t5.model.blocks import SPARSE_LAYERS
from switch_t5.model.config import TransformerConfig
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array, Params

_NAME = "router_bias"


def update_router_biases(
    params: Params, before: Params, stats: Mapping[str, RouterStats], config: TransformerConfig
) -> Params:
    """Moves every router's bias by its rate towards an even load; leaves all else, and models without, as they are.

    Args:
      params: of the model, after the optimizer's update.
      before: the same before it, from where biases move: an optimizer may decay even what has no gradient.
      stats: of the batch that the update was made from, by stack, with a leading axis over sparse layers.
      config: of the model.
    """
    updated = dict(params)
    for stack, layers in stats.items():
        configs = {"self_attention": config.attention_moe, "mlp": config.moe_of(decoder=stack == "decoder")}
        blocks = before[stack]["stack"]["blocks"]
        places = [
            (name, *inner) for name in sorted(blocks, key=_index) for inner in SPARSE_LAYERS if _at(blocks[name], inner)
        ]
        # Scanned blocks carry a leading axis over repeats of the period, of which a name is one block.
        load = layers.expert_load.reshape(-1, len(places), layers.expert_load.shape[-1])
        for number, place in enumerate(places):
            layer, moe = _at(blocks, place), configs[place[1]]
            if layer is not None and _NAME in layer and moe is not None:
                bias = layer[_NAME]
                moved = _moved(bias, load[:, number].reshape(bias.shape), moe.router.bias_update_rate)
                updated = _with(updated, (stack, "stack", "blocks", *place, _NAME), moved)
    return updated


def _index(block: str) -> int:
    return int(block.rsplit("_", 1)[1])


def _at(params: Any, path: tuple[str, ...]) -> Params | None:
    """The sparse layer at a path; None where there is none."""
    for name in path:
        if not isinstance(params, Mapping) or name not in params:
            return None
        params = params[name]
    return dict(params) if isinstance(params, Mapping) and "experts" in params else None


def _with(params: Params, path: tuple[str, ...], value: Array) -> Params:
    """A copy with another value at a path."""
    name, *rest = path
    return {**params, name: _with(params[name], tuple(rest), value) if rest else value}


def _moved(bias: Array, load: Array, rate: float) -> Array:
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
