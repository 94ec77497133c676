"""Averages over batches."""

from __future__ import annotations

import numpy as np
import pytest

from switch_t5.inference.evaluator import EVALUATION_METRICS, evaluate


def sums_of(params: float, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    weights = batch["weights"]
    return {
        "nats": params * (batch["nats"] * weights).sum(),
        "correct": (batch["correct"] * weights).sum(),
        "tokens": weights.sum(),
    }


BATCHES = [
    {"nats": np.asarray([2.0, 4.0]), "correct": np.asarray([1, 0]), "weights": np.asarray([1.0, 1.0])},
    {"nats": np.asarray([6.0, 99.0]), "correct": np.asarray([0, 1]), "weights": np.asarray([1.0, 0.0])},
]


def test_every_token_counts_the_same_whatever_its_batch() -> None:
    result = evaluate(sums_of, 0.5, BATCHES, lambda batch: batch)
    assert result == {"loss": 0.5 * 12 / 3, "accuracy": 1 / 3, "tokens": 3}
    assert tuple(result) == EVALUATION_METRICS


def test_batches_are_placed_before_they_are_evaluated() -> None:
    result = evaluate(sums_of, 1.0, BATCHES, lambda batch: batch | {"nats": batch["nats"] * 10})
    assert result["loss"] == 40.0


@pytest.mark.parametrize("batches", [[], [BATCHES[0] | {"weights": np.zeros(2)}]])
def test_batches_without_a_target_are_refused(batches: list[dict[str, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="the evaluation batches hold no target token"):
        evaluate(sums_of, 1.0, batches, lambda batch: batch)
