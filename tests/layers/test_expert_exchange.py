"""What the compiled Switch layer sends between devices."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import named_sharding, partitioned
from switch_t5.types import Array

pytestmark = pytest.mark.multidevice

BATCH, LENGTH, FEATURES, HIDDEN, EXPERTS = 16, 16, 16, 24, 8
CONFIG = MoEConfig(EXPERTS, group_size=2 * LENGTH, min_expert_capacity=1)
GROUPS, CAPACITY = BATCH // 2, 5
"""Groups of two sequences; 32 tokens x 1.25 / 8 experts."""


def collectives(text: str) -> list[tuple[str, list[int]]]:
    """Each collective of a compiled program, and the entries of each array that a device gets from it."""
    found = []
    pattern = r"= (\S.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
    for shapes, kind in re.findall(pattern, text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        found.append((kind, sizes))
    return found


def compiled(mesh_config: MeshConfig, *, gradient: bool, config: MoEConfig = CONFIG) -> list[tuple[str, list[int]]]:
    mesh = make_mesh(mesh_config)
    layer = SwitchFeedForward(config, FEATURES, HIDDEN, ("relu",), "paper", rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def place(param: nnx.Param) -> Any:
        sharding = named_sharding(mesh, param.get_metadata()["axes"], param.shape)
        return param.replace(jax.device_put(param[...], sharding))

    params = jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Param))
    x = jnp.ones(
        (BATCH, LENGTH, FEATURES), device=named_sharding(mesh, ("batch", None, None), (BATCH, LENGTH, FEATURES))
    )
    mask = jnp.ones((BATCH, LENGTH), bool, device=named_sharding(mesh, ("batch", None), (BATCH, LENGTH)))

    def forward(params: Any, x: Array) -> tuple[Array, Any]:
        return nnx.merge(graph, params)(x, mask, tokens=mask.astype(jnp.int32), sequences=2, train=True, rng=None)

    def loss(params: Any, x: Array) -> Array:
        y, stats = forward(params, x)
        return jnp.sum(jnp.sin(y)) + stats.load_balance_loss

    with partitioned(mesh):
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else forward).lower(params, x)
    program = lowered.compile().as_text()
    assert program is not None
    return collectives(program)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("expert_partitions", [8, 4])
def test_tokens_travel_by_two_all_to_alls_a_pass_and_no_activation_is_gathered(
    expert_partitions: int, gradient: bool
) -> None:
    found = compiled(MeshConfig(num_expert_partitions=expert_partitions), gradient=gradient)
    assert {kind for kind, _ in found} == {"all-to-all", "all-reduce"}
    # There and back, and in the backward pass there and back again; each carries a device's slots and no more.
    exchanged = [sum(sizes) for kind, sizes in found if kind == "all-to-all"]
    assert exchanged == [GROUPS // 8 * EXPERTS * CAPACITY * FEATURES] * (4 if gradient else 2)
    # What is summed over devices: statistics, and gradients of the router and of a device's experts.
    local_experts = EXPERTS // expert_partitions * FEATURES * HIDDEN
    summed = {size for kind, sizes in found if kind == "all-reduce" for size in sizes}
    gradients = {EXPERTS * FEATURES} | ({local_experts} if expert_partitions < 8 else set())
    assert summed <= {1, EXPERTS} | (gradients if gradient else set())


def test_one_expert_partition_exchanges_nothing() -> None:
    assert {kind for kind, _ in compiled(MeshConfig(), gradient=False)} == {"all-reduce"}


def test_without_capacity_devices_gather_each_others_tokens_and_send_sums_back() -> None:
    config = dataclasses.replace(CONFIG, dispatch="dropless")
    found = compiled(MeshConfig(num_expert_partitions=4), gradient=False, config=config)
    sent = sorted((kind, sum(sizes)) for kind, sizes in found if kind != "all-reduce")
    # Four devices share out the experts, and gather the tokens, their expert and its weight of a half of the batch.
    tokens = BATCH * LENGTH // 2
    assert sent == [
        ("all-gather", tokens),
        ("all-gather", tokens),
        ("all-gather", tokens * FEATURES),
        ("reduce-scatter", tokens // 4 * FEATURES),
    ]
