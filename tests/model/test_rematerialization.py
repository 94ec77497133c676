"""What the backward pass computes again, by policy, read from the gradient's jaxpr."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.rules import partitioned
from tests.jaxprs import equations
from tests.model.small import examples, unpacked

LAYERS = 4
CONFIG = TransformerConfig(
    vocab_size=32,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=24,
    num_encoder_layers=LAYERS,
    num_decoder_layers=LAYERS,
    mlp_activations=("gelu", "linear"),
    scan_layers=True,
    moe=MoEConfig(4, group_size="sequence", exchange="all_to_all"),
)
DROPLESS = dataclasses.replace(CONFIG, moe=MoEConfig(4, group_size="sequence", dispatch="dropless"))
PERIODS = LAYERS // 2  # of a dense and a sparse block


def gradient(config: TransformerConfig, mesh_config: MeshConfig) -> Any:
    model = Model(config)
    batch = unpacked(examples([(8, 4)] * 8), 8, 4)

    def loss(params: Any) -> jax.Array:
        hidden, _ = model.bind(params)(batch, train=True)
        return jnp.sum(hidden)

    with partitioned(make_mesh(mesh_config)):
        return jax.make_jaxpr(jax.grad(loss))(model.abstract_params).jaxpr


def counted(config: TransformerConfig, remat_policy: RematPolicy) -> Counter[str]:
    jaxpr = gradient(dataclasses.replace(config, remat_policy=remat_policy), MeshConfig(num_expert_partitions=4))
    return Counter(equation.primitive.name for equation in equations(jaxpr))


def test_minimal_repeats_the_product_of_queries_and_keys_alone_and_sends_nothing_again() -> None:
    none, minimal, full = (counted(CONFIG, policy) for policy in ("none", "minimal", "full"))
    assert none["all_to_all"] == minimal["all_to_all"] == full["all_to_all"] * 2 / 3 > 0
    # A scan's body counts once: of two blocks a stack one attention each, and in the decoder one more.
    assert minimal["dot_general"] - none["dot_general"] == 2 + 2 * 2
    assert full["dot_general"] > minimal["dot_general"] + 10
    assert minimal["sort"] == none["sort"] < full["sort"]  # Routes are kept.


def test_minimal_repeats_no_more_without_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU has a loop over experts, which keeps nothing of a block of rows.
    monkeypatch.setattr("switch_t5.layers.dense.target_platform", lambda: "gpu")
    none, minimal, full = (counted(DROPLESS, policy) for policy in ("none", "minimal", "full"))
    assert none["all_gather"] == minimal["all_gather"] < full["all_gather"]
    assert none["reduce_scatter"] == minimal["reduce_scatter"]
    assert minimal["dot_general"] - none["dot_general"] == 2 + 2 * 2
    assert none["sort"] == minimal["sort"] < full["sort"]


@pytest.mark.parametrize("remat_policy", ["none", "minimal", "full"])
def test_kernels_that_lie_in_parts_are_not_kept_whole(remat_policy: RematPolicy) -> None:
    config = dataclasses.replace(CONFIG, remat_policy=remat_policy)
    params = Model(config).abstract_params
    kernels = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 2 and leaf.shape[0] == PERIODS}
    assert len(kernels) > 4
    kernels.add((PERIODS, 16, 2, 1, 6))  # As cross-attention multiplies what is copied for two parts of the heads.

    def kept(mesh_config: MeshConfig) -> set[tuple[int, ...]]:
        scans = [one for one in equations(gradient(config, mesh_config)) if one.primitive.name == "scan"]
        forward = [scan for scan in scans if not scan.params["reverse"]]
        assert len(forward) == 2
        return {variable.aval.shape for scan in forward for variable in scan.outvars}

    assert not kernels & kept(MeshConfig(num_fsdp_partitions=2, num_expert_partitions=2, num_model_partitions=2))
