"""What the loop measures and when, with a step that only counts."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from switch_t5.training.loop import TrainConfig, train
from switch_t5.training.optimizers import adafactor
from switch_t5.training.state import TrainState


class Recorded:
    """In place of a Recorder: the steps of what was recorded."""

    def __init__(self) -> None:
        self.logged: list[int] = []
        self.evaluated: list[int] = []
        self.speedometer = SimpleNamespace(start=lambda step: None, paused=contextlib.nullcontext)
        self.progress = SimpleNamespace(advance=lambda step: None)
        self.metrics = SimpleNamespace(sync=lambda: None)

    def log(self, step: int, metrics: Any) -> None:
        self.logged.append(step)

    def evaluation(self, step: int, values: Any) -> None:
        self.evaluated.append(step)

    def scores(self, step: int, scores: Any) -> None:
        pass


class Batches:
    """Batches of nothing."""

    def __next__(self) -> dict[str, Any]:
        return {}

    def get_state(self) -> dict[str, bytes]:
        return {}


def count(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
    return TrainState(state.step + 1, state.params, state.opt_state), {"loss": jnp.float32(0.0)}


@pytest.mark.parametrize(
    ("first", "begins", "logged", "evaluated"),
    [
        pytest.param(0, True, [1, 4, 8, 10], [0, 5, 10], id="from the start"),
        pytest.param(6, True, [7, 8, 10], [6, 10], id="from the state of another run"),
        pytest.param(6, False, [8, 10], [10], id="resumed"),
        pytest.param(0, False, [4, 8, 10], [5, 10], id="resumed before the first step"),
    ],
)
def test_a_run_is_measured_where_it_begins_and_not_again_where_it_resumes(first, begins, logged, evaluated):
    recorded = Recorded()
    saved: list[int] = []
    last = train(
        TrainState(jnp.int32(first), {}, {}),
        TrainConfig("unused", 10, adafactor(0.1), log_period=4, eval_period=5, eval_batches=1, checkpoint_period=0),
        step_fn=count,
        batches=Batches(),
        place=lambda batch: batch,
        evaluate=lambda params: {"loss": 1.0},
        checkpointer=SimpleNamespace(save=lambda step, *rest: saved.append(step), wait=lambda: None),  # pyright: ignore[reportArgumentType]
        recorder=recorded,  # pyright: ignore[reportArgumentType]
        stop=SimpleNamespace(reached=lambda step: False),  # pyright: ignore[reportArgumentType]
        begins=begins,
    )
    assert int(last.step) == 10 and saved == [10]
    assert (recorded.logged, recorded.evaluated) == (logged, evaluated)
