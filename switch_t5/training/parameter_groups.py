"""Parameters that stay, and parameters with a rate of their own, by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from switch_t5.errors import ConfigError, closest
from switch_t5.training.adafactor import AxesTree
from switch_t5.training.optimizers import OptimizerFactory
from switch_t5.types import Array

Factor = float | optax.Schedule


def parameter_groups(
    optimizer: OptimizerFactory,
    frozen: tuple[str, ...] = (),
    trained: tuple[str, ...] = (),
    rates: Mapping[str, Factor] | None = None,
) -> OptimizerFactory:
    """Returns an optimizer that treats groups of parameters apart.

    Patterns are regular expressions, looked for anywhere in names such as
    ``encoder/stack/blocks/layers_1/mlp/experts/wi``: ``router`` is every router, ``experts`` all experts.

    Args:
      optimizer: what updates the parameters.
      frozen: what stays as it is.
      trained: what alone is trained, where there is any; ``frozen`` stays all the same.
      rates: what the learning rate is multiplied by: a number, or a schedule of the step. Of several patterns that fit,
        the last counts.

    Raises:
      ConfigError: a pattern is malformed, or nothing is called so (told when the model is known).
    """
    factors = dict(rates or {})
    for pattern in (*frozen, *trained, *factors):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                "parameter_groups", f"has the pattern {pattern!r}, which is malformed: {error}."
            ) from None

    def build(parameter_axes: AxesTree) -> optax.GradientTransformation:
        names = _names(parameter_axes)
        every = jax.tree.leaves(names)
        for pattern in (*frozen, *trained, *factors):
            if not any(re.search(pattern, name) for name in every):
                parts = {part for name in every for part in name.split("/")}
                raise ConfigError(
                    "parameter_groups",
                    f"has the pattern {pattern!r}, which no parameter fits.{closest(pattern, parts)}",
                )

        def factor(name: str) -> Factor:
            if any(re.search(pattern, name) for pattern in frozen):
                return 0.0
            if trained and not any(re.search(pattern, name) for pattern in trained):
                return 0.0
            return next((value for pattern, value in reversed(factors.items()) if re.search(pattern, name)), 1.0)

        return _by_factor(optimizer(parameter_axes), jax.tree.map(factor, names))

    return OptimizerFactory(optimizer.name, optimizer.learning_rate, build)


def _names(parameter_axes: AxesTree) -> Any:
    """A tree shaped as the parameters with each one's name."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
        parameter_axes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _by_factor(inner: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """``inner`` with each update multiplied: every optimizer's update is in proportion to its learning rate."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        inner_state, step = state
        # A frozen parameter's gradient counts in no norm either.
        grads = _map(lambda factor, grad: jnp.zeros_like(grad) if factor == 0 else grad, factors, updates)
        updates, inner_state = inner.update(grads, inner_state, params)
        updates = _map(lambda factor, update: _times(factor, step, update), factors, updates)
        return updates, (inner_state, step + 1)

    return optax.GradientTransformation(lambda params: (inner.init(params), jnp.zeros((), jnp.int32)), update)


def _map(function: Callable[[Factor, Array], Array], factors: Any, arrays: Any) -> Any:
    return jax.tree.map(function, factors, arrays, is_leaf=callable)


def _times(factor: Factor, step: Array, update: Array) -> Array:
    if callable(factor):
        return (update * factor(step)).astype(update.dtype)
    return jnp.zeros_like(update) if factor == 0 else update if factor == 1 else update * factor
