"""Learning-rate schedules: functions of the number of updates already made.

A schedule is an ``optax.Schedule``: it takes the step, an int or an int32 scalar that is 0 for the first
update, and returns the learning rate of that update as a float32 scalar. T5X counts the same way.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from switch_t5.errors import ConfigError
from switch_t5.types import Array


def rsqrt_decay(
    base_learning_rate: float = 1.0, warmup_steps: int = 10_000, linear_warmup: bool = False
) -> optax.Schedule:
    """Returns T5's pre-training schedule, ``base_learning_rate / sqrt(max(step, warmup_steps))``.

    With the defaults the rate is 0.01 for ten thousand steps and then falls with the root of the step.

    Args:
      base_learning_rate: the numerator; the highest rate is ``base_learning_rate / sqrt(warmup_steps)``.
      warmup_steps: how many updates the rate stays level, at least 1.
      linear_warmup: the rate climbs linearly from 0 over those updates, where T5's stays level; meant for
        optimizers of the Adam family.

    Raises:
      ConfigError: an argument is out of its range.
    """
    check_number("rsqrt_decay.base_learning_rate", base_learning_rate, above=0)
    check_number("rsqrt_decay.warmup_steps", warmup_steps, at_least=1, integer=True)
    check_flag("rsqrt_decay.linear_warmup", linear_warmup)

    def schedule(step: ArrayLike) -> Array:
        steps = jnp.asarray(step, jnp.float32)
        rate = base_learning_rate / jnp.sqrt(jnp.maximum(steps, warmup_steps))
        return rate * jnp.minimum(1.0, steps / warmup_steps) if linear_warmup else rate

    return schedule


def constant_schedule(base_learning_rate: float, warmup_steps: int = 0) -> optax.Schedule:
    """Returns a level rate, T5's for fine-tuning (0.001 there), after a linear climb from 0.

    Args:
      base_learning_rate: the rate after the climb.
      warmup_steps: updates of the climb; 0 starts at the full rate.

    Raises:
      ConfigError: an argument is out of its range.
    """
    check_number("constant_schedule.base_learning_rate", base_learning_rate, at_least=0)
    check_number("constant_schedule.warmup_steps", warmup_steps, at_least=0, integer=True)
    return _after_warmup(base_learning_rate, warmup_steps, optax.constant_schedule(base_learning_rate))


def linear_decay(
    base_learning_rate: float, total_steps: int, warmup_steps: int = 0, final_learning_rate: float = 0.0
) -> optax.Schedule:
    """Returns a linear climb from 0 to the base rate, then a straight line down to the final one.

    Args:
      base_learning_rate: the rate at the end of the climb.
      total_steps: the step at which the final rate is reached, warm-up included; it stays there.
      warmup_steps: updates of the climb; 0 starts at the full rate.
      final_learning_rate: the rate at and after ``total_steps``, at most the base rate.

    Raises:
      ConfigError: an argument is out of its range.
    """
    _check_decay("linear_decay", base_learning_rate, total_steps, warmup_steps, final_learning_rate)
    line = optax.linear_schedule(base_learning_rate, final_learning_rate, total_steps - warmup_steps)
    return _after_warmup(base_learning_rate, warmup_steps, line)


def cosine_decay(
    base_learning_rate: float, total_steps: int, warmup_steps: int = 0, final_learning_rate: float = 0.0
) -> optax.Schedule:
    """Returns a linear climb from 0 to the base rate, then half a cosine down to the final one.

    Args:
      base_learning_rate: the rate at the end of the climb.
      total_steps: the step at which the final rate is reached, warm-up included; it stays there.
      warmup_steps: updates of the climb; 0 starts at the full rate.
      final_learning_rate: the rate at and after ``total_steps``, at most the base rate.

    Raises:
      ConfigError: an argument is out of its range.
    """
    _check_decay("cosine_decay", base_learning_rate, total_steps, warmup_steps, final_learning_rate)
    cosine = optax.cosine_decay_schedule(
        base_learning_rate, total_steps - warmup_steps, final_learning_rate / base_learning_rate
    )
    return _after_warmup(base_learning_rate, warmup_steps, cosine)


def check_number(
    parameter: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Checks a number that a configuration gave.

    Args:
      parameter: the dotted name of the parameter, such as ``constant_schedule.warmup_steps``.
      value: what was given for it.
      above: it must be greater than this.
      at_least: it must not be less than this.
      below: it must be less than this.
      at_most: it must not be greater than this.
      integer: it must be a whole number, an int.
      optional: None passes too.

    Raises:
      ConfigError: the value is no number, or is outside the bounds.
    """
    if optional and value is None:
        return
    kinds = int if integer else (int, float)
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    if isinstance(value, kinds) and not isinstance(value, bool):
        inside = (
            (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
            and (at_most is None or value <= at_most)
        )
        if inside:
            return
    limits = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
    kind = " ".join(filter(None, ["an integer" if integer else "a number", limits]))
    raise ConfigError(parameter, f"must be {kind}{' or None' if optional else ''}, got {value!r}.")


def check_flag(parameter: str, value: object) -> None:
    """Checks a switch that a configuration gave.

    Raises:
      ConfigError: the value is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(parameter, f"must be True or False, got {value!r}.")


def _check_decay(
    name: str, base_learning_rate: float, total_steps: int, warmup_steps: int, final_learning_rate: float
) -> None:
    check_number(f"{name}.base_learning_rate", base_learning_rate, above=0)
    check_number(f"{name}.total_steps", total_steps, at_least=1, integer=True)
    check_number(f"{name}.warmup_steps", warmup_steps, at_least=0, below=total_steps, integer=True)
    check_number(f"{name}.final_learning_rate", final_learning_rate, at_least=0, at_most=base_learning_rate)


def _after_warmup(base_learning_rate: float, warmup_steps: int, schedule: optax.Schedule) -> optax.Schedule:
    if not warmup_steps:
        return schedule
    climb = optax.linear_schedule(0.0, base_learning_rate, warmup_steps)
    return optax.join_schedules([climb, schedule], [warmup_steps])
