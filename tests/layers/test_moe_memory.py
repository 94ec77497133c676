"""What the sparse layer's program needs beside its arguments and results, by XLA's own account; nothing is run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig

TOKENS, EMBED, HIDDEN = 8192, 512, 2048


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_users_do")
@pytest.mark.parametrize("experts", [8, 64, 256])
def test_a_step_holds_what_is_dispatched_and_little_more(experts: int) -> None:
    config = MoEConfig(experts, group_size=TOKENS, train_capacity_factor=1.25)
    layer = nnx.eval_shape(lambda: SwitchFeedForward(config, EMBED, HIDDEN, ("relu",), "paper", rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    x = jax.ShapeDtypeStruct((1, TOKENS, EMBED), jnp.float32)
    mask, ids = jnp.ones((1, TOKENS), bool), jnp.ones((1, TOKENS), jnp.int32)

    def loss(params: Any, x: Any) -> Any:
        y, stats = nnx.merge(graph, params)(x, mask, tokens=ids, sequences=1, train=True, rng=None)
        return jnp.sum(y) + stats.load_balance_loss

    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile().memory_analysis()
    assert memory is not None
    dispatched = 4 * experts * config.capacity(TOKENS, train=True) * (EMBED + HIDDEN + EMBED)
    assert memory.temp_size_in_bytes < 1.5 * dispatched
