"""Groups of parameters: frozen, trained alone, with a rate of their own."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switch_t5.errors import ConfigError
from switch_t5.training.optimizers import OptimizerFactory, adafactor, sgd, state_axes
from switch_t5.training.parameter_groups import parameter_groups
from switch_t5.types import Array

PARAMS = {
    "encoder": {"mlp": {"router": jnp.ones(2), "experts": {"wi": jnp.ones((2, 3))}}, "norm": jnp.ones(2)},
    "embedding": jnp.ones(4),
}
AXES = {
    "encoder": {"mlp": {"router": (None,), "experts": {"wi": ("expert", "mlp")}}, "norm": ("embed",)},
    "embedding": ("vocab",),
}
GRADS = {
    "encoder": {
        "mlp": {"router": jnp.full(2, 2.0), "experts": {"wi": jnp.full((2, 3), 3.0)}},
        "norm": jnp.full(2, 4.0),
    },
    "embedding": jnp.full(4, 5.0),
}


def moved(factory: OptimizerFactory, steps: int = 1) -> dict[str, float]:
    """How far one entry of each parameter is from where it was."""
    transformation = factory(AXES)
    params, state = PARAMS, transformation.init(PARAMS)
    for _ in range(steps):
        updates, state = transformation.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    encoder: Any = params["encoder"]  # pyright: ignore
    values: dict[str, Array] = {
        "router": encoder["mlp"]["router"],
        "experts": encoder["mlp"]["experts"]["wi"],
        "norm": encoder["norm"],
        "embedding": params["embedding"],  # pyright: ignore
    }
    return {name: round(1 - float(np.ravel(value)[0]), 6) for name, value in values.items()}


def test_what_is_frozen_stays_and_the_rest_moves_as_ever() -> None:
    assert moved(parameter_groups(sgd(0.1), frozen=("router", "^embedding"))) == {
        "router": 0,
        "experts": 0.3,
        "norm": 0.4,
        "embedding": 0,
    }


def test_what_is_trained_alone() -> None:
    assert moved(parameter_groups(sgd(0.1), trained=("mlp",), frozen=("router",))) == {
        "router": 0,
        "experts": 0.3,
        "norm": 0,
        "embedding": 0,
    }


def test_rates_multiply_and_the_last_pattern_counts() -> None:
    rates = {"encoder": 0.5, "experts": 2.0, "norm": optax.linear_schedule(0.0, 1.0, 1)}
    assert moved(parameter_groups(sgd(0.1), rates=rates), steps=2) == {
        "router": 0.2,
        "experts": 1.2,
        "norm": 0.4,  # Nothing in the first step, all in the second.
        "embedding": 1.0,
    }


def test_a_frozen_gradient_counts_in_no_norm() -> None:
    only = parameter_groups(sgd(1.0, clip_by_global_norm=1.0), trained=("embedding",))
    assert moved(only)["embedding"] == pytest.approx(0.5)  # Four equal entries of norm 1.


def test_the_state_is_sharded_as_the_parameters() -> None:
    factory = parameter_groups(adafactor(0.1), frozen=("router",))
    state = factory(AXES).init(PARAMS)
    axes = state_axes(state, PARAMS, AXES)
    assert axes[1] == ()
    assert moved(factory)["router"] == 0


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("routers",), "parameter_groups has the pattern 'routers', which no parameter fits. Did you mean 'router'?"),
        (("(",), "parameter_groups has the pattern '(', which is malformed"),
    ],
)
def test_a_pattern_without_a_parameter_is_refused(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parameter_groups(sgd(0.1), frozen=patterns)(AXES)
    assert str(error.value).startswith(message)
