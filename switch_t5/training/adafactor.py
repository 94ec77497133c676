"""Adafactor (Shazeer and Stern, arXiv 1804.04235) as T5X runs it, factored by logical axes.

Adafactor keeps two vectors of second moments for a matrix, the means of the squared gradient over its
columns (``v_row``) and over its rows (``v_col``), and takes ``v_row v_col / mean(v_row)`` for the moments
of its entries. It clips the root mean square of each parameter's update, and scales it by the parameter's.

What is *one* matrix is read from a parameter's axis names, never guessed from its shape:

* leading ``layers`` and ``expert`` axes stack parameters: every scanned layer and every expert has factors,
  a clipping and a parameter scale of its own. An ``expert`` axis that does not lead is an ordinary dim;
* neighbouring ``heads`` and ``kv`` count as one dim, so that an attention kernel is the matrix from or to
  ``embed`` that it multiplies by;
* a parameter with ``relpos_buckets`` is a table, whose moments are kept whole.

The matrix is factored when both its dims reach ``min_dim_size_to_factor``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from switch_t5.training.schedules import check_flag, check_number
from switch_t5.types import Array, Axes

AxesTree = Any
"""A nested dict shaped as the parameters, each leaf a parameter's axis names, one a dim."""
Moments = dict[str, Array]
"""What is kept for one parameter, all float32: ``v_row`` and ``v_col``, or ``v``; and ``m`` with momentum."""

_STACKED_AXES = ("layers", "expert")
_MERGED_AXES = ("heads", "kv")
_TABLE_AXIS = "relpos_buckets"


@dataclasses.dataclass(frozen=True)
class AdafactorOptions:
    """The numbers of Adafactor; the defaults are T5X's and T5's.

    Attributes:
      decay_rate: the second moments' decay at update t, counted from 1, is ``1 - t ** -decay_rate``.
      step_offset: updates not counted in t: when fine-tuning resumes a pre-training state, the step it starts
        from, so that the moments are forgotten and gathered anew. Until the offset is reached t stays 1.
      clipping_threshold: the highest root mean square of an update before the rate; None never clips.
      multiply_by_parameter_scale: the learning rate is relative to the parameter's root mean square.
      beta1: decay of the momentum, which is gathered from finished updates; None keeps none.
      weight_decay_rate: the share of each parameter taken away at each update, the learning rate left out of
        it as in T5X; None takes nothing.
      factored: False keeps every second moment whole.
      min_dim_size_to_factor: a matrix with a smaller dim keeps its second moments whole.
      factor_small_stacks: factors stacked matrices (experts, scanned layers) whatever their size, and those
        with a dim that has no name (scanned routers) never, which is what T5X does; False treats a stack as
        its members.
      epsilon1: added to the squared gradient.
      epsilon2: the least parameter scale.
      clip_by_global_norm: scales all gradients down together to this l2 norm at most, first of all; None
        never does.

    Raises:
      ConfigError: a value of the wrong type or out of its range, named as ``adafactor.<attribute>``.
    """

    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    beta1: float | None = None
    weight_decay_rate: float | None = None
    factored: bool = True
    min_dim_size_to_factor: int = 128
    factor_small_stacks: bool = False
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3
    clip_by_global_norm: float | None = None

    def __post_init__(self) -> None:
        check_number("adafactor.decay_rate", self.decay_rate, above=0)
        check_number("adafactor.step_offset", self.step_offset, at_least=0, integer=True)
        check_number("adafactor.clipping_threshold", self.clipping_threshold, above=0, optional=True)
        check_flag("adafactor.multiply_by_parameter_scale", self.multiply_by_parameter_scale)
        check_number("adafactor.beta1", self.beta1, at_least=0, below=1, optional=True)
        check_number("adafactor.weight_decay_rate", self.weight_decay_rate, at_least=0, below=1, optional=True)
        check_flag("adafactor.factored", self.factored)
        check_number("adafactor.min_dim_size_to_factor", self.min_dim_size_to_factor, at_least=1, integer=True)
        check_flag("adafactor.factor_small_stacks", self.factor_small_stacks)
        check_number("adafactor.epsilon1", self.epsilon1, at_least=0)
        check_number("adafactor.epsilon2", self.epsilon2, at_least=0)
        check_number("adafactor.clip_by_global_norm", self.clip_by_global_norm, above=0, optional=True)


@partial(jax.tree_util.register_dataclass, data_fields=["count", "moments"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class AdafactorState:
    """The state of Adafactor.

    Attributes:
      count: int32 scalar, the updates made.
      moments: a nested dict shaped as the parameters, with the ``Moments`` of each in its place.
    """

    count: Array
    moments: Any


class Factoring(NamedTuple):
    """Which dims of a parameter are which, as positions.

    Attributes:
      own: the dims of one member of the stack; means for clipping and scale run over these.
      rows: the dims that ``v_row`` keeps and ``v_col`` averages; empty where the moments are kept whole.
      columns: the dims that ``v_col`` keeps and ``v_row`` averages; empty where the moments are kept whole.
    """

    own: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class _Update(NamedTuple):
    """What all parameters share in an update, float32 scalars; ``gradient_scale`` is None without a limit."""

    learning_rate: Array
    decay: Array
    gradient_scale: Array | None


def adafactor_transformation(
    learning_rate: optax.Schedule, options: AdafactorOptions, parameter_axes: AxesTree
) -> optax.GradientTransformation:
    """Returns Adafactor, learning rate and sign included, as a gradient transformation.

    Its updates are float32 whatever the dtype of parameters and gradients, and are to be added to the
    parameters; ``update`` needs the parameters. Under one ``jax.jit`` with ``optax.apply_updates`` they are
    fused into the addition, and nothing as large as a gradient is held beside the gradients themselves.

    Args:
      learning_rate: the rate of each update, asked with ``AdafactorState.count``.
      options: the other numbers.
      parameter_axes: the axis names of each parameter.

    Raises:
      ValueError: from ``init`` and ``update``, when a parameter and its axis names do not fit.
    """

    def init(params: Any) -> Any:
        plans = _plans(params, parameter_axes, options)
        leaves, treedef = jax.tree.flatten(params)
        moments = [_initial_moments(*leaf, options) for leaf in zip(leaves, plans, strict=True)]
        return AdafactorState(jnp.zeros([], jnp.int32), jax.tree.unflatten(treedef, moments))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("Adafactor needs the params to update them.")
        plans = _plans(params, parameter_axes, options)
        leaves, treedef = jax.tree.flatten(params)
        gradient_leaves = treedef.flatten_up_to(updates)
        squares = [_row_mean_square(*leaf) for leaf in zip(gradient_leaves, plans, strict=True)]
        t = jnp.maximum(state.count - options.step_offset + 1, 1).astype(jnp.float32)
        shared = _Update(
            learning_rate=jnp.asarray(learning_rate(state.count), jnp.float32),
            decay=1.0 - t**-options.decay_rate,
            gradient_scale=_gradient_scale(gradient_leaves, squares, options.clip_by_global_norm),
        )
        moment_leaves = treedef.flatten_up_to(state.moments)
        pairs = [
            _parameter_update(shared, options, *leaf)
            for leaf in zip(plans, leaves, gradient_leaves, squares, moment_leaves, strict=True)
        ]
        steps, moments = (jax.tree.unflatten(treedef, [pair[index] for pair in pairs]) for index in (0, 1))
        return steps, AdafactorState(jnp.asarray(optax.safe_increment(state.count)), moments)

    return optax.GradientTransformation(init, update)


def named_axes(params: Any, parameter_axes: AxesTree) -> Iterator[tuple[tuple[str, ...], Any, Axes]]:
    """Yields the path, the value and the axis names of each parameter, in the order of ``jax.tree.leaves``.

    Args:
      params: a nested dict of arrays, or of anything else with a shape.
      parameter_axes: the axis names of each parameter.

    Raises:
      ValueError: the trees differ, or names and dims differ in number; the parameter is named.
    """
    named = {
        path_names(path): axes
        for path, axes in jax.tree_util.tree_leaves_with_path(
            parameter_axes, is_leaf=lambda node: isinstance(node, tuple)
        )
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)
        if names not in named:
            raise ValueError(f"The parameter {'/'.join(names)} has no axis names.")
        axes = named.pop(names)
        if len(axes) != len(leaf.shape):
            raise ValueError(f"The parameter {'/'.join(names)} of shape {leaf.shape} has axis names {axes}.")
        yield names, leaf, axes
    if named:
        raise ValueError(f"There are axis names for {'/'.join(next(iter(named)))}, which is no parameter.")


def path_names(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    """Returns the keys, fields and positions of a path in a tree, as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def factor_dims(axes: Axes) -> dict[str, tuple[int, ...]]:
    """Returns which of a parameter's dims ``v_row`` and ``v_col`` keep, where it has those moments.

    Returns:
      Positions by the moment's name; empty for a parameter that is never factored.

    Raises:
      ValueError: the axes make neither a vector nor a matrix.
    """
    sides = _matrix_dims(axes)
    if sides is None:
        return {}
    rows, columns = sides
    dims = tuple(range(len(axes)))
    return {"v_row": _without(dims, columns), "v_col": _without(dims, rows)}


def _plans(params: Any, parameter_axes: AxesTree, options: AdafactorOptions) -> list[Factoring]:
    plans = []
    for names, leaf, axes in named_axes(params, parameter_axes):
        try:
            plans.append(_factoring(axes, leaf.shape, options))
        except ValueError as error:
            raise ValueError(f"Adafactor cannot take the parameter {'/'.join(names)}: {error}") from None
    return plans


def _factoring(axes: Axes, shape: tuple[int, ...], options: AdafactorOptions) -> Factoring:
    stacked = _num_stacked(axes)
    own = tuple(range(stacked, len(axes)))
    dims = _matrix_dims(axes)
    if dims is None or not options.factored:
        return Factoring(own, (), ())
    if stacked and options.factor_small_stacks:
        is_factored = None not in axes
    else:
        smaller = min(math.prod(shape[dim] for dim in side) for side in dims)
        is_factored = smaller >= options.min_dim_size_to_factor
    return Factoring(own, *dims) if is_factored else Factoring(own, (), ())


def _matrix_dims(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the positions of a matrix's first and second dim, or None for what is never factored."""
    sides: list[tuple[int, ...]] = []
    for dim in range(_num_stacked(axes), len(axes)):
        if sides and axes[dim - 1 : dim + 1] == _MERGED_AXES:
            sides[-1] += (dim,)
        else:
            sides.append((dim,))
    if len(sides) > 2:
        raise ValueError(f"its axes {axes} make neither a vector nor a matrix.")
    return None if len(sides) < 2 or _TABLE_AXIS in axes else (sides[0], sides[1])


def _num_stacked(axes: Axes) -> int:
    stacked = next((dim for dim, name in enumerate(axes) if name not in _STACKED_AXES), len(axes))
    if "layers" in axes[stacked:]:
        raise ValueError(f"'layers' must lead its axes {axes}.")
    return stacked


def _without(values: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(value for dim, value in enumerate(values) if dim not in dims)


def _initial_moments(parameter: Array, plan: Factoring, options: AdafactorOptions) -> Moments:
    shape = parameter.shape
    if plan.rows:
        shapes = {"v_row": _without(shape, plan.columns), "v_col": _without(shape, plan.rows)}
    else:
        shapes = {"v": shape}
    if options.beta1 is not None:
        shapes["m"] = shape
    return {name: jnp.zeros(value, jnp.float32) for name, value in shapes.items()}


def _row_mean_square(gradient: Array, plan: Factoring) -> Array | None:
    return _mean_square(gradient, plan.columns) if plan.rows else None


def _gradient_scale(gradients: list[Array], row_mean_squares: list[Array | None], limit: float | None) -> Array | None:
    """Returns ``min(1, limit / global norm)``; rows that were squared already are not read again."""
    if limit is None:
        return None
    sums = [
        jnp.sum(jnp.square(gradient.astype(jnp.float32))) if rows is None else jnp.mean(rows) * gradient.size
        for gradient, rows in zip(gradients, row_mean_squares, strict=True)
    ]
    return limit / jnp.maximum(limit, jnp.sqrt(jnp.sum(jnp.stack(sums))))


def _parameter_update(
    shared: _Update,
    options: AdafactorOptions,
    plan: Factoring,
    parameter: Array,
    gradient: Array,
    row_mean_square: Array | None,
    moments: Moments,
) -> tuple[Array, Moments]:
    """Returns the float32 update of one parameter (or stack of them) and its new moments."""
    factors, mean_square, new_moments = (
        _whole_factors(shared, options, plan, gradient, moments)
        if row_mean_square is None
        else _row_and_column_factors(shared, options, plan, gradient, row_mean_square, moments)
    )
    size = shared.learning_rate
    if options.clipping_threshold is not None:
        size = size / jnp.maximum(1.0, jnp.sqrt(mean_square) / options.clipping_threshold)
    if options.multiply_by_parameter_scale:
        scale = jnp.sqrt(_mean_square(parameter, plan.own))
        size = size * jnp.maximum(scale, options.epsilon2)
    if shared.gradient_scale is not None:
        size = size * shared.gradient_scale
    fresh_gradient, size = _afresh(gradient, size)
    step = fresh_gradient.astype(jnp.float32) * (size * factors[0])
    for factor in factors[1:]:
        step = step * factor
    if options.beta1 is not None:
        step = options.beta1 * moments["m"] + (1.0 - options.beta1) * step
        new_moments["m"] = step
    if options.weight_decay_rate:
        step = step + options.weight_decay_rate * parameter.astype(jnp.float32)
    return -step, new_moments


def _row_and_column_factors(
    shared: _Update,
    options: AdafactorOptions,
    plan: Factoring,
    gradient: Array,
    row_mean_square: Array,
    moments: Moments,
) -> tuple[list[Array], Array, Moments]:
    """Returns the factors of a matrix's update, its mean square before clipping, and the new moments.

    The gradient is read once for each mean, three times in all, and its square is never held: the mean square
    of the update is a mean over rows of means over columns, of which only the inner is as large as the
    gradient, and needs the column factor alone. Readings after the first go by ``_afresh``, without which XLA
    computes what they have in common once, keeps it, and spends more time on that array than on all the rest.
    """
    rows, columns = plan.rows, plan.columns
    v_row = _decayed(shared, options, jnp.expand_dims(moments["v_row"], columns), row_mean_square)
    v_col = _decayed(
        shared,
        options,
        jnp.expand_dims(moments["v_col"], rows),
        _mean_square(_afresh(gradient, v_row)[0], rows),
    )
    row_factor = jax.lax.rsqrt(v_row / jnp.mean(v_row, rows, keepdims=True))
    col_factor = jax.lax.rsqrt(v_col)
    fresh_gradient, fresh_factor = _afresh(gradient, col_factor)
    weighted = jnp.mean(jnp.square(fresh_gradient.astype(jnp.float32) * fresh_factor), columns, keepdims=True)
    mean_square = jnp.mean(_afresh(weighted)[0] * jnp.square(row_factor), rows, keepdims=True)
    if shared.gradient_scale is not None:
        mean_square = mean_square * jnp.square(shared.gradient_scale)
    new_moments = {"v_row": jnp.squeeze(v_row, columns), "v_col": jnp.squeeze(v_col, rows)}
    return [row_factor, col_factor], mean_square, new_moments


def _whole_factors(
    shared: _Update, options: AdafactorOptions, plan: Factoring, gradient: Array, moments: Moments
) -> tuple[list[Array], Array, Moments]:
    """Returns the factor of an update with whole moments, its mean square before clipping, the moments."""
    v = _decayed(shared, options, moments["v"], jnp.square(gradient.astype(jnp.float32)))
    fresh_gradient, fresh_v = _afresh(gradient, v)
    mean_square = _mean_square(fresh_gradient.astype(jnp.float32) * jax.lax.rsqrt(fresh_v), plan.own)
    factor = jax.lax.rsqrt(v)
    if shared.gradient_scale is not None:
        mean_square = mean_square * jnp.square(shared.gradient_scale)
    return [factor], mean_square, {"v": v}


def _decayed(shared: _Update, options: AdafactorOptions, moment: Array, mean_square: Array) -> Array:
    if shared.gradient_scale is not None:
        mean_square = mean_square * jnp.square(shared.gradient_scale)
    return shared.decay * moment + (1.0 - shared.decay) * (mean_square + options.epsilon1)


def _mean_square(values: Array, dims: tuple[int, ...]) -> Array:
    """Returns float32 means of squares over ``dims``, kept as dims of 1; over no dims, the squares."""
    return jnp.mean(jnp.square(values.astype(jnp.float32)), dims, keepdims=True)


def _afresh(*values: Array) -> tuple[Array, ...]:
    """Returns the same values, of which XLA does not know that they are the same."""
    return jax.lax.optimization_barrier(values)
