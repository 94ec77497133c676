"""One run on one mesh goes on, with the same losses, on any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli.build import Run, RunSpec, batch_shapes
from switch_t5.cli.configuration import Configuration
from switch_t5.partitioning.mesh import MeshConfig
from switch_t5.training.state import TrainState
from tests.integration.conftest import TINY

MESHES = {
    "one device": MeshConfig(num_devices=1),
    "data 8": MeshConfig(),
    "expert 8": MeshConfig(num_expert_partitions=8),
    "data 2, expert 2, model 2": MeshConfig(num_expert_partitions=2, num_model_partitions=2),
    "data 4, model 2": MeshConfig(num_model_partitions=2),
    "fsdp 8": MeshConfig(num_fsdp_partitions=8),
    "fsdp 2, expert 2, model 2": MeshConfig(num_fsdp_partitions=2, num_expert_partitions=2, num_model_partitions=2),
}
EXPLICIT = ("data 2, expert 2, model 2", "fsdp 2, expert 2, model 2")
STEPS = 20
# Sums in another order differ in float32's last digits, and updates carry that on.
RTOL = 2e-5


def _run(mesh: MeshConfig, *more: str) -> Run:
    settings = ("MODEL_DIR=unused", "TEXTS=unused", "MoEConfig.num_experts=8", "TransformerConfig.dropout_rate=0")
    # Groups of two sequences, in encoder and decoder, and few slots: what is dropped depends on the grouping.
    settings += ("BATCH_SIZE=16", "MoEConfig.group_size=64", "MoEConfig.train_capacity_factor=1.0")
    configuration = Configuration.load([str(TINY)], (*settings, *more))
    return Run(dataclasses.replace(RunSpec.read(configuration), mesh=mesh))


def _batch(run: Run, step: int) -> dict[str, np.ndarray]:
    """A packed batch, padded at the end of each sequence."""
    random = np.random.default_rng(step)
    batch = {}
    for name, (shape, dtype) in batch_shapes(run.spec.data).items():
        values = random.integers(1, 300, shape)
        if "segment" in name or "positions" in name:
            values = np.broadcast_to(np.arange(shape[1]) // (shape[1] // 2) + 1, shape).copy()
        values[:, -3:] = 0
        batch[name] = (values > 0 if name == "decoder_loss_weights" else values).astype(dtype)
    return batch


def _trained(run: Run, state: TrainState, start: int) -> tuple[TrainState, list[float]]:
    """The state after as many more steps from one on, and their losses."""
    step_fn, losses = run.compile_train_step(), []
    for step in range(start, start + STEPS):
        state, metrics = step_fn(state, run.place(_batch(run, step)))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.multidevice
@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "on"),
    [
        ("data 2, expert 2, model 2", tuple(MESHES)),
        ("fsdp 8", ("one device", "fsdp 8", "data 2, expert 2, model 2")),
    ],
    ids=["data 2, expert 2, model 2", "fsdp 8"],
)
def test_a_checkpoint_of_one_mesh_goes_on_with_the_same_losses_on_others(
    tmp_path: Path, saved_by: str, on: tuple[str, ...]
) -> None:
    first = _run(MESHES[saved_by])
    state, before = _trained(first, first.init_state(), 0)
    saved = jax.tree.map(np.asarray, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(STEPS, state, {})

    alone = _run(MESHES["one device"])
    state, expected = _trained(alone, alone.init_state(), 0)
    np.testing.assert_allclose(before, expected, rtol=RTOL)
    losses = {"one device, never stopped": _trained(alone, state, STEPS)[1]}
    runs = {name: _run(MESHES[name]) for name in on}
    explicit = [name for name in EXPLICIT if name in on]
    runs |= {f"{name}, explicit": _run(MESHES[name], "MoEConfig.exchange='all_to_all'") for name in explicit}
    for name, run in runs.items():
        mesh = run.spec.mesh
        with Checkpointer(tmp_path, read_only=True) as checkpointer:
            state = checkpointer.restore(run.abstract_state).state
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), saved)
        experts = state.params["encoder"]["stack"]["blocks"]["layers_1"]["mlp"]["experts"]["wi"]
        assert experts.sharding.shard_shape(experts.shape) == (
            8 // mesh.num_expert_partitions,
            16 // mesh.num_fsdp_partitions,
            32 // mesh.num_model_partitions,
        )
        losses[name] = _trained(run, state, STEPS)[1]
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["one device"], rtol=RTOL, err_msg=name)
