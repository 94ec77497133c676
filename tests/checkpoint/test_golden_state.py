"""The state of Adafactor in a checkpoint of T5X, beside its own arrays, which are found by their numbers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.load import load_state
from switch_t5.model.functional import Model
from switch_t5.training.optimizers import adafactor
from switch_t5.training.state import TrainState
from tests.checkpoint.golden import abstract
from tests.model.test_t5x_parity import CHECKPOINT, CONFIG

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not CHECKPOINT.is_dir(), reason=f"there is no golden checkpoint at {CHECKPOINT}"),
]


def raw(folder: Path) -> Any:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
    return ts.open(spec, read=True).result().read().result()


def numbers(array: Any) -> bytes:
    """An array's numbers, whatever order its axes lie in."""
    return np.sort(np.asarray(array), axis=None).tobytes()


def test_each_moment_of_t5x_is_in_the_state_at_its_parameters_name() -> None:
    model = Model(CONFIG)
    make = adafactor(0.01, factor_small_stacks=True)(model.axes)

    def build() -> TrainState:
        params = model.init(jax.random.key(0))
        return TrainState(jnp.int32(0), params, make.init(params))

    state = load_state(str(CHECKPOINT), CONFIG, abstract(jax.eval_shape(build)))
    leaves = naming.named_leaves(state)
    assert int(leaves["step"]) == int(leaves["opt_state/count"]) == 5
    found: dict[bytes, set[str]] = {}
    for name, leaf in leaves.items():
        found.setdefault(numbers(leaf), set()).add(name)
    folders = list(CHECKPOINT.glob("state.param_states.*"))
    assert len(folders) == 53
    for folder in folders:
        parameter, kind = folder.name.removeprefix("state.param_states.").rsplit(".", 1)
        (of_parameter,) = found[numbers(raw(CHECKPOINT / f"target.{parameter}"))]
        moments = found[numbers(raw(folder))]
        place = of_parameter.replace("params/", "opt_state/moments/")
        kinds = ("v",) if kind == "v" else ("v_row", "v_col")
        assert moments & {f"{place}/{ours}" for ours in kinds}, folder.name
