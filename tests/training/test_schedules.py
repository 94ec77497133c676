"""Learning rates by hand, and what the schedules refuse."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import ConfigError
from switch_t5.training.schedules import constant_schedule, cosine_decay, linear_decay, rsqrt_decay


def rates(schedule, steps):
    """The rates under ``jax.jit`` with an int32 step, which must equal those of a Python int."""
    traced = [float(jax.jit(schedule)(jnp.asarray(step, jnp.int32))) for step in steps]
    np.testing.assert_allclose(traced, [float(schedule(step)) for step in steps], rtol=1e-6)
    return traced


def test_rsqrt_decay_is_t5s_by_default():
    actual = rates(rsqrt_decay(), [0, 1, 9_999, 10_000, 10_001, 40_000, 1_000_000])
    np.testing.assert_allclose(actual, [0.01, 0.01, 0.01, 0.01, 10_001**-0.5, 0.005, 0.001], rtol=1e-6)


def test_rsqrt_decay_scales_with_the_base_rate_and_warmup():
    actual = rates(rsqrt_decay(base_learning_rate=2.0, warmup_steps=4), [0, 4, 16])
    np.testing.assert_allclose(actual, [1.0, 1.0, 0.5], rtol=1e-6)


def test_rsqrt_decay_climbs_from_zero_where_asked():
    actual = rates(rsqrt_decay(base_learning_rate=2.0, warmup_steps=4, linear_warmup=True), [0, 1, 2, 4, 16])
    np.testing.assert_allclose(actual, [0.0, 0.25, 0.5, 1.0, 0.5], rtol=1e-6)


def test_constant_schedule_climbs_and_stays():
    assert rates(constant_schedule(0.5), [0, 7]) == [0.5, 0.5]
    np.testing.assert_allclose(rates(constant_schedule(0.5, warmup_steps=4), [0, 1, 4, 9]), [0, 0.125, 0.5, 0.5])


def test_linear_decay_reaches_its_final_rate_at_the_total_step_and_stays():
    schedule = linear_decay(1.0, total_steps=10, warmup_steps=2, final_learning_rate=0.2)
    np.testing.assert_allclose(rates(schedule, [0, 1, 2, 6, 10, 99]), [0, 0.5, 1.0, 0.6, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rates(linear_decay(1.0, total_steps=4), [0, 1, 4]), [1.0, 0.75, 0.0], rtol=1e-6)


def test_cosine_decay_reaches_its_final_rate_at_the_total_step_and_stays():
    schedule = cosine_decay(1.0, total_steps=10, warmup_steps=2, final_learning_rate=0.2)
    quarter = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(
        rates(schedule, [0, 1, 2, 4, 6, 10, 99]), [0, 0.5, 1.0, quarter, 0.6, 0.2, 0.2], rtol=1e-6
    )
    np.testing.assert_allclose(rates(cosine_decay(1.0, total_steps=4), [0, 2, 4]), [1.0, 0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize(
    ("make", "arguments", "parameter", "sentence"),
    [
        (rsqrt_decay, {"base_learning_rate": 0}, "base_learning_rate", "must be a number above 0, got 0."),
        (rsqrt_decay, {"warmup_steps": 0}, "warmup_steps", "must be an integer at least 1, got 0."),
        (rsqrt_decay, {"warmup_steps": 1e4}, "warmup_steps", "must be an integer at least 1, got 10000.0."),
        (rsqrt_decay, {"linear_warmup": 1}, "linear_warmup", "must be True or False, got 1."),
        (
            constant_schedule,
            {"base_learning_rate": "1"},
            "base_learning_rate",
            "must be a number at least 0, got '1'.",
        ),
        (
            constant_schedule,
            {"base_learning_rate": math.nan},
            "base_learning_rate",
            "must be a number at least 0, got nan.",
        ),
        (
            constant_schedule,
            {"base_learning_rate": True},
            "base_learning_rate",
            "must be a number at least 0, got True.",
        ),
        (
            linear_decay,
            {"base_learning_rate": 1.0, "total_steps": 5, "warmup_steps": 5},
            "warmup_steps",
            "must be an integer at least 0 and below 5, got 5.",
        ),
        (
            linear_decay,
            {"base_learning_rate": 1.0, "total_steps": 0},
            "total_steps",
            "must be an integer at least 1, got 0.",
        ),
        (
            cosine_decay,
            {"base_learning_rate": 1.0, "total_steps": 5, "final_learning_rate": 2.0},
            "final_learning_rate",
            "must be a number at least 0 and at most 1.0, got 2.0.",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_sentence(make, arguments, parameter, sentence):
    with pytest.raises(ConfigError) as error:
        make(**arguments)
    assert error.value.parameter == f"{make.__name__}.{parameter}"
    assert str(error.value) == f"{make.__name__}.{parameter} {sentence}"
