"""T5X itself restores what this library writes in T5X's format, where T5X is installed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import serialization
from jax.sharding import PartitionSpec

from tests.checkpoint.golden import T5X
from tests.checkpoint.test_conversion import SCALABLE, SWITCH, converted, saved, state_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # Of what T5X still calls in JAX.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("t5x.checkpoints", reason="T5X is not installed")
    from t5x import adafactor, checkpoints, optimizers, partitioning, train_state  # pyright: ignore[reportMissingImports]

MOMENTS = {"m", "v", "v_col", "v_row"}


def restored(folder: Path) -> Any:
    """The state that T5X reads, into a state of Adafactor's with the names and shapes of the checkpoint's index."""
    index = serialization.msgpack_restore((folder / "checkpoint").read_bytes())["optimizer"]

    def empty(node: Any) -> Any:
        if not isinstance(node, dict):
            return np.full_like(node, 0)
        if "driver" in node:
            return np.zeros(node["metadata"]["shape"], node["dtype"])
        children = {name: empty(inner) for name, inner in node.items()}
        return adafactor._AdafactorParamState(**children) if set(children) == MOMENTS else children

    state = optimizers.OptimizerState(np.int32(0), empty(index["state"]["param_states"]))
    optimizer = optimizers.Optimizer(adafactor.Adafactor(1e-3), state, empty(index["target"]))
    template = train_state.FlaxOptimTrainState(optimizer)

    class Whole(partitioning.PjitPartitioner):
        """Every array lies whole on the one device."""

        def get_mesh_axes(self, train_state: Any) -> Any:
            return jax.tree.map(lambda _: PartitionSpec(), train_state)

    checkpointer = checkpoints.Checkpointer(template, Whole(num_partitions=1), str(folder.parent))
    return checkpointer.restore(path=str(folder)).state_dict()


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.skipif(not T5X.exists(), reason="the stored checkpoints of T5X are not here")
@pytest.mark.parametrize("model", ["switch_tiny", "switch_tiny_scan"])
def test_t5x_reads_its_own_checkpoint_back_bit_for_bit_after_two_conversions(tmp_path, model):
    theirs = T5X / model / "checkpoint_5"
    ours = converted(theirs, tmp_path / "ours", "native")
    back = converted(ours, tmp_path / "back", "t5x", scanned=model.endswith("scan"))
    expected = named(restored(theirs))
    assert len(expected) > 100
    assert_same(named(restored(back / "checkpoint_5")), expected)


@pytest.mark.parametrize(("config", "scanned"), [(SWITCH, False), (SCALABLE, True)], ids=["switch", "scalable"])
def test_t5x_reads_a_run_of_ours(tmp_path, config, scanned):
    state = state_of(config)
    there = converted(saved(tmp_path / "run", state), tmp_path / "there", "t5x", scanned=scanned)
    found = restored(there / "checkpoint_17")
    assert found["state"]["step"] == 17
    np.testing.assert_array_equal(found["target"]["token_embedder"]["embedding"], state.params["embedding"]["table"])
    # Every number is drawn once: sorted, they are the same whatever the names and the order of axes.
    ours, theirs = (
        np.sort(np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(params)]))
        for params in (state.params, found["target"])
    )
    np.testing.assert_array_equal(theirs, ours)
