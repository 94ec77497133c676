"""A small model for plans, and its workload."""

from __future__ import annotations

from typing import Any

import jax

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.partitioning.rules import AXIS_RULES, AxisRules
from switch_t5.planning.workload import Arrays, Workload
from switch_t5.training.optimizers import adafactor, state_axes

BATCH, INPUTS, TARGETS = 32, 32, 16


def small_config(**changes: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 384,
        "emb_dim": 16,
        "num_heads": 2,
        "head_dim": 8,
        "mlp_dim": 32,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "moe": MoEConfig(4, group_size=32),
    }
    return TransformerConfig(**(sizes | changes))


def workload_of(
    config: TransformerConfig, *, microbatches: int = 1, batch: int = BATCH, rules: AxisRules = AXIS_RULES
) -> Workload:
    model = Model(config)
    opt_state = jax.eval_shape(adafactor(1e-2)(model.axes).init, model.abstract_params)
    return Workload(
        config,
        batch,
        INPUTS,
        TARGETS,
        Arrays.of(model.abstract_params, model.axes, rules),
        Arrays.of(opt_state, state_axes(opt_state, model.abstract_params, model.axes), rules),
        microbatches,
        rules,
    )
