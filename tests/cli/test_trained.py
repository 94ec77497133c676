"""A run's first state from another run's checkpoint."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli.build import Run, RunSpec
from switch_t5.cli.configuration import Configuration
from switch_t5.cli.trained import upcycled_state
from switch_t5.errors import ConfigError
from switch_t5.model.upcycling import UpcyclingConfig
from tests.integration.conftest import TINY
from tests.model.small import examples, unpacked

UPCYCLED = (
    "MoEConfig.router=@RouterConfig()",
    "MoEConfig.dispatch=dropless",
    "RouterConfig.num_selected_experts=2",
    "RouterConfig.renormalize_weights=True",
    "TrainConfig.upcycling=@UpcyclingConfig()",
    "TrainConfig.initial_checkpoint_path=unused",
)


def run_of(*settings: str) -> Run:
    configuration = Configuration.load([str(TINY)], ("MODEL_DIR=unused", "TEXTS=unused", *settings))
    return Run(RunSpec.read(configuration))


def nats(run: Run, params: object) -> float:
    """The held-out loss of a batch, per token."""
    pairs = [(30 - 3 * row, 3 + row) for row in range(8)]
    batch = unpacked(examples(pairs, vocab_size=384), 32, 16)
    sums = run.eval_step(params, run.place({name: np.asarray(value) for name, value in batch.items()}))  # pyright: ignore[reportArgumentType]
    return float(sums["nats"] / sums["tokens"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dense run's folder, and its loss."""
    run, folder = run_of("TransformerConfig.moe=None"), tmp_path_factory.mktemp("dense")
    state = run.init_state()
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, state, b"")
    return folder, nats(run, state.params)


@pytest.mark.multidevice
def test_an_upcycled_run_begins_on_its_mesh_at_the_dense_loss_with_the_routers_of_its_configuration(dense) -> None:
    folder, dense_loss = dense
    run = run_of(*UPCYCLED)
    state = upcycled_state(run, str(folder), UpcyclingConfig())
    assert int(state.step) == 0
    assert nats(run, state.params) == pytest.approx(dense_loss, rel=1e-5)
    drawn = naming.named_leaves(run.init_state().params)
    made = naming.named_leaves(state.params)
    routers = [name for name in made if name.endswith("router")]
    assert len(routers) == 2
    for name in routers:
        np.testing.assert_array_equal(made[name], drawn[name])
    for leaf, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(run.abstract_state.params), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_an_upcycling_without_sparse_layers_or_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"this model has none: give TransformerConfig\.moe, or set None\."):
        run_of(*UPCYCLED, "TransformerConfig.moe=None")
    with pytest.raises(ConfigError, match=r"upcycling has no effect without TrainConfig\.initial_checkpoint_path"):
        run_of(*UPCYCLED, "TrainConfig.initial_checkpoint_path=None")
