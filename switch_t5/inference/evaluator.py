"""Held-out loss and accuracy of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

EVALUATION_METRICS = ("loss", "accuracy", "tokens")
"""What :func:`evaluate` returns."""


def evaluate(
    eval_step: Callable[[Any, Any], dict[str, Any]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Any],
) -> dict[str, float]:
    """Averages over all target tokens of the batches.

    Args:
      eval_step: parameters and a batch to the sums ``nats``, ``correct`` and ``tokens``.
      params: the parameters.
      batches: numpy batches.
      place: numpy batch to global arrays.

    Returns:
      ``loss`` (nats per target token; the paper's negative log perplexity is its negative), ``accuracy`` and
      ``tokens``.

    Raises:
      ValueError: there is not one target token.
    """
    sums = np.zeros(3)
    for batch in batches:
        result = jax.device_get(eval_step(params, place(batch)))
        sums += [float(result[name]) for name in ("nats", "correct", "tokens")]
    nats, correct, tokens = (float(value) for value in sums)
    if not tokens:
        raise ValueError("the evaluation batches hold no target token")
    return {"loss": nats / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
