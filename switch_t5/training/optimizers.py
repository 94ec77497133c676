"""The optimizers that a configuration names, and the axis names of their states.

Each factory takes numbers and a learning-rate schedule, and returns an ``OptimizerFactory``, which becomes an
``optax.GradientTransformation`` once the model exists and its parameters' axis names are known::

    make = adafactor(learning_rate=rsqrt_decay())
    transformation = make(parameter_axes)
    opt_state = transformation.init(params)
    axes = state_axes(opt_state, params, parameter_axes)
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from switch_t5.errors import ConfigError, closest
from switch_t5.training.adafactor import (
    AdafactorOptions,
    AxesTree,
    adafactor_transformation,
    factor_dims,
    named_axes,
    path_names,
)
from switch_t5.training.schedules import check_flag, check_number
from switch_t5.types import Axes

OPTAX_OPTIMIZERS = (
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "amsgrad",
    "lion",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "sgd",
    "sign_sgd",
    "yogi",
)
"""What ``optax_optimizer`` makes: those of optax that move each entry of a parameter by its own gradients.

One that takes norms of whole parameters (LAMB, LARS, optax's Adafactor) would mix the experts of a stack.
"""


@dataclasses.dataclass(frozen=True)
class OptimizerFactory:
    """An optimizer in want of the parameters' axis names.

    Attributes:
      name: what the configuration called it.
      learning_rate: its schedule, for those who report the rate.
      build: makes the transformation, learning rate, sign and clipping included.
    """

    name: str
    learning_rate: optax.Schedule
    build: Callable[[AxesTree], optax.GradientTransformation]

    def __call__(self, parameter_axes: AxesTree) -> optax.GradientTransformation:
        """Returns the transformation for parameters with these axis names."""
        return self.build(parameter_axes)


def adafactor(
    learning_rate: optax.Schedule | float,
    *,
    decay_rate: float = 0.8,
    step_offset: int = 0,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    beta1: float | None = None,
    weight_decay_rate: float | None = None,
    factored: bool = True,
    min_dim_size_to_factor: int = 128,
    factor_small_stacks: bool = False,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    clip_by_global_norm: float | None = None,
) -> OptimizerFactory:
    """Returns Adafactor with T5X's semantics; ``AdafactorOptions`` says what each argument does.

    Raises:
      ConfigError: an argument of the wrong type or out of its range.
    """
    schedule = _as_schedule("adafactor", learning_rate)
    options = AdafactorOptions(
        decay_rate=decay_rate,
        step_offset=step_offset,
        clipping_threshold=clipping_threshold,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        beta1=beta1,
        weight_decay_rate=weight_decay_rate,
        factored=factored,
        min_dim_size_to_factor=min_dim_size_to_factor,
        factor_small_stacks=factor_small_stacks,
        epsilon1=epsilon1,
        epsilon2=epsilon2,
        clip_by_global_norm=clip_by_global_norm,
    )
    return OptimizerFactory("adafactor", schedule, lambda axes: adafactor_transformation(schedule, options, axes))


def adamw(
    learning_rate: optax.Schedule | float,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    decay_vectors: bool = False,
    clip_by_global_norm: float | None = None,
) -> OptimizerFactory:
    """Returns AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
      learning_rate: a schedule, or a rate that stays.
      b1: decay of the mean of gradients.
      b2: decay of the mean of squared gradients.
      eps: added to the root in the denominator.
      weight_decay: the share of a parameter taken away at each update, times the learning rate.
      decay_vectors: decays the scales of normalization layers too, which otherwise only matrices are; one
        scanned over layers still is a vector.
      clip_by_global_norm: scales all gradients down together to this l2 norm at most; None never does.

    Raises:
      ConfigError: an argument of the wrong type or out of its range.
    """
    schedule = _as_schedule("adamw", learning_rate)
    check_number("adamw.b1", b1, at_least=0, below=1)
    check_number("adamw.b2", b2, at_least=0, below=1)
    check_number("adamw.eps", eps, at_least=0)
    check_number("adamw.weight_decay", weight_decay, at_least=0)
    check_flag("adamw.decay_vectors", decay_vectors)
    check_number("adamw.clip_by_global_norm", clip_by_global_norm, above=0, optional=True)

    def build(parameter_axes: AxesTree) -> optax.GradientTransformation:
        mask = None if decay_vectors else _matrices(parameter_axes)
        return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)

    return _with_clipping("adamw", schedule, build, clip_by_global_norm)


def sgd(
    learning_rate: optax.Schedule | float,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    clip_by_global_norm: float | None = None,
) -> OptimizerFactory:
    """Returns stochastic gradient descent.

    Args:
      learning_rate: a schedule, or a rate that stays.
      momentum: decay of the sum of past gradients; None keeps none.
      nesterov: looks one momentum step ahead.
      clip_by_global_norm: scales all gradients down together to this l2 norm at most; None never does.

    Raises:
      ConfigError: an argument of the wrong type or out of its range.
    """
    schedule = _as_schedule("sgd", learning_rate)
    check_number("sgd.momentum", momentum, at_least=0, below=1, optional=True)
    check_flag("sgd.nesterov", nesterov)
    check_number("sgd.clip_by_global_norm", clip_by_global_norm, above=0, optional=True)
    return _with_clipping("sgd", schedule, lambda _: optax.sgd(schedule, momentum, nesterov), clip_by_global_norm)


def optax_optimizer(
    name: str,
    learning_rate: optax.Schedule | float,
    *,
    clip_by_global_norm: float | None = None,
    **arguments: Any,
) -> OptimizerFactory:
    """Returns an optimizer of optax by its name.

    Args:
      name: one of ``OPTAX_OPTIMIZERS``.
      learning_rate: a schedule, or a rate that stays.
      clip_by_global_norm: scales all gradients down together to this l2 norm at most; None never does.
      **arguments: the optimizer's other arguments, as optax calls them.

    Raises:
      ConfigError: no such optimizer, an argument that it does not take, or one out of its range.
    """
    if name not in OPTAX_OPTIMIZERS:
        hint = closest(str(name), OPTAX_OPTIMIZERS) or f" There are {', '.join(OPTAX_OPTIMIZERS)}."
        raise ConfigError("optax_optimizer.name", f"must be an optimizer of optax, got {name!r}.{hint}")
    schedule = _as_schedule("optax_optimizer", learning_rate)
    check_number("optax_optimizer.clip_by_global_norm", clip_by_global_norm, above=0, optional=True)
    make = getattr(optax, name)
    defaults = {key: taken.default for key, taken in inspect.signature(make).parameters.items()}
    del defaults["learning_rate"]
    for key, value in arguments.items():
        if key not in defaults:
            hint = closest(key, defaults) or f" It takes {', '.join(defaults) or 'none'}."
            raise ConfigError(f"optax_optimizer.{key}", f"is no argument of optax.{name}.{hint}")
        if isinstance(defaults[key], bool):
            check_flag(f"optax_optimizer.{key}", value)
        elif isinstance(defaults[key], int | float):
            check_number(f"optax_optimizer.{key}", value)
    try:
        transformation = make(schedule, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError("optax_optimizer", f"cannot make optax.{name} of {arguments}: {error}.") from error
    return _with_clipping(name, schedule, lambda _: transformation, clip_by_global_norm)


def state_axes(opt_state: Any, params: Any, parameter_axes: AxesTree) -> Any:
    """Returns the axis names of each array of an optimizer's state, so that it is sharded as its parameter.

    The state may be that of any transformation that keeps its arrays in trees shaped as the parameters. A
    scalar has no axes; an array of its parameter's shape has its parameter's; Adafactor's ``v_row`` and
    ``v_col`` have those that are left of its parameter's.

    Args:
      opt_state: the state, or its ``jax.eval_shape``.
      params: the parameters, or their shapes.
      parameter_axes: the axis names of each parameter.

    Returns:
      A tree shaped as the state with a tuple of names for each array. Tuples being trees themselves, go
      through both together: ``jax.tree.map(function, opt_state, axes)`` gets each array with its tuple.

    Raises:
      ValueError: an array belongs to no parameter, or its shape follows from none of the rules; it is
        named. Or parameters and axis names do not fit.
    """
    parameters = {names: (leaf.shape, axes) for names, leaf, axes in named_axes(params, parameter_axes)}

    def axes_of(path: jax.tree_util.KeyPath, leaf: Any) -> Axes:
        found = np.shape(leaf)
        if found == ():
            return ()
        names = path_names(path)
        owner = _owner(names, parameters)
        if owner is None:
            raise ValueError(f"{'/'.join(names)} {found} in the optimizer's state belongs to no parameter.")
        shape, axes = parameters[owner]
        kept = factor_dims(axes).get(names[-1], tuple(range(len(axes))))
        if found != tuple(shape[dim] for dim in kept):
            raise ValueError(
                f"{'/'.join(names)} {found} in the optimizer's state is neither shaped as its parameter "
                f"{'/'.join(owner)} {shape} nor a factor of it along {axes}."
            )
        return tuple(axes[dim] for dim in kept)

    return jax.tree_util.tree_map_with_path(axes_of, opt_state)


def _owner(names: tuple[str, ...], parameters: dict[tuple[str, ...], Any]) -> tuple[str, ...] | None:
    """Returns the longest path of a parameter that stands anywhere inside ``names``."""
    for length in range(len(names), 0, -1):
        for start in range(len(names) - length + 1):
            if names[start : start + length] in parameters:
                return names[start : start + length]
    return None


def _as_schedule(optimizer: str, learning_rate: optax.Schedule | float) -> optax.Schedule:
    if callable(learning_rate):
        if "base_learning_rate" in inspect.signature(learning_rate).parameters:
            raise ConfigError(
                f"{optimizer}.learning_rate",
                "must be a schedule, got what makes one; call it, as in @rsqrt_decay().",
            )
        return learning_rate
    check_number(f"{optimizer}.learning_rate", learning_rate, at_least=0)
    return optax.constant_schedule(learning_rate)


def _with_clipping(
    name: str,
    schedule: optax.Schedule,
    build: Callable[[AxesTree], optax.GradientTransformation],
    clip_by_global_norm: float | None,
) -> OptimizerFactory:
    if clip_by_global_norm is None:
        return OptimizerFactory(name, schedule, build)
    clip = optax.clip_by_global_norm(clip_by_global_norm)
    return OptimizerFactory(name, schedule, lambda axes: optax.chain(clip, build(axes)))


def _matrices(parameter_axes: AxesTree) -> Any:
    """Returns a tree shaped as the parameters, True for those with two dims beside ``layers``, ``expert``."""

    def is_matrix(axes: Axes) -> bool:
        return sum(axis not in ("layers", "expert") for axis in axes) > 1

    return jax.tree.map(is_matrix, parameter_axes, is_leaf=lambda node: isinstance(node, tuple))
