"""What the sparse layer's program needs beside its arguments and results, by XLA's own account; nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.routing.dispatch import DispatchMethod
from tests.jaxprs import looked_at

TOKENS, EMBED, HIDDEN = 8192, 512, 2048


def scalar(config: MoEConfig, tokens: int, embed: int, hidden: int) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """A loss of the layer, and the shapes of the parameters and the tokens ``[1, tokens, embed]`` that it is of."""
    layer = nnx.eval_shape(lambda: SwitchFeedForward(config, embed, hidden, ("relu",), "paper", rngs=nnx.Rngs(0)))
    graph, params = nnx.split(layer)
    mask, ids = jnp.ones((1, tokens), bool), jnp.ones((1, tokens), jnp.int32)

    def loss(params: Any, x: Any) -> Any:
        y, stats = nnx.merge(graph, params)(x, mask, tokens=ids, sequences=1, train=True, rng=None)
        return jnp.sum(y) + stats.load_balance_loss

    return loss, params, jax.ShapeDtypeStruct((1, tokens, embed), jnp.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_users_do")
@pytest.mark.parametrize("experts", [8, 64, 256])
def test_a_step_holds_what_is_dispatched_and_little_more(experts: int) -> None:
    config = MoEConfig(experts, group_size=TOKENS, train_capacity_factor=1.25)
    loss, *arguments = scalar(config, TOKENS, EMBED, HIDDEN)
    memory = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    dispatched = 4 * experts * config.capacity(TOKENS, train=True) * (EMBED + HIDDEN + EMBED)
    assert memory.temp_size_in_bytes < 1.5 * dispatched


@pytest.mark.parametrize(("dispatch", "on_one_cpu"), [("gather", True), ("gather", False), ("dropless", True)])
def test_no_array_of_a_step_is_as_large_as_tokens_by_experts_by_capacity(
    dispatch: DispatchMethod, on_one_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def largest(dispatch: DispatchMethod) -> int:
        return looked_at(*scalar(MoEConfig(8, group_size=128, dispatch=dispatch), tokens=128, embed=8, hidden=16))[1]

    masks = 128 * 8 * MoEConfig(8).capacity(128, train=True)
    assert largest("einsum") >= masks
    # Where there are several devices, or an accelerator, empty slots are multiplied too.
    monkeypatch.setattr(SwitchFeedForward, "_leaves_out_empty_slots", lambda layer: on_one_cpu)
    assert largest(dispatch) < masks
