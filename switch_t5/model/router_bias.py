"""The bias that evens the experts' load without a loss.

Source: DeepSeek-V3 (2024), section 2.1.2, after Wang et al. 2024. The bias is a parameter that no gradient reaches:
it only orders a token's choices. After each step an expert that got more than its share has its bias lowered.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from switch_t5.model.config import TransformerConfig
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array, Params

_NAME = "router_bias"


def update_router_biases(params: Params, stats: Mapping[str, RouterStats], config: TransformerConfig) -> Params:
    """Moves every router's bias by its rate towards an even load; leaves all else, and models without, as they are.

    Args:
      params: of the model, after the optimizer's update.
      stats: of the batch that the update was made from, by stack, with a leading axis over sparse layers.
      config: of the model.
    """
    updated = dict(params)
    for stack, layers in stats.items():
        moe = config.moe_of(decoder=stack == "decoder")
        if moe is None or not moe.router.has_bias:
            continue
        blocks = dict(params[stack]["stack"]["blocks"])
        names = sorted((name for name in blocks if _NAME in blocks[name]["mlp"]), key=_index)
        # Scanned blocks carry a leading axis over repeats of the period, of which a name is one block.
        load = layers.expert_load.reshape(-1, len(names), moe.num_experts)
        for place, name in enumerate(names):
            mlp = blocks[name]["mlp"]
            bias = _moved(mlp[_NAME], load[:, place].reshape(mlp[_NAME].shape), moe.router.bias_update_rate)
            blocks[name] = {**blocks[name], "mlp": {**mlp, _NAME: bias}}
        updated[stack] = {**updated[stack], "stack": {**updated[stack]["stack"], "blocks": blocks}}
    return updated


def _index(block: str) -> int:
    return int(block.rsplit("_", 1)[1])


def _moved(bias: Array, load: Array, rate: float) -> Array:
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
