"""The two verbs of a sparse layer: dispatch tokens to expert slots, combine expert outputs into tokens.

Two interchangeable methods compute the same function and the same gradients:

* ``gather`` reads rows by index in the forward pass and, through its own derivative, in the backward pass
  too: an assignment is one-to-one, so the transpose of a gather by ``slot`` is a gather by ``token``.
* ``einsum`` multiplies by one-hot masks ``[G, S, E, C]`` as the paper's pseudocode does (appendix F). It costs
  a matrix multiplication as large as a dense layer's, and is kept as the reference.
"""

from __future__ import annotations

from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.routing.assignment import Assignment
from switch_t5.types import Array

DispatchMethod = Literal["gather", "einsum"]


class Dispatcher(Protocol):
    """The interface that every method offers."""

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """``[G, S, D]`` tokens to ``[G, E, C, D]`` slots; an empty slot is zero."""
        ...

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """``[G, E, C, D]`` expert outputs to ``[G, S, D]``, scaled by the weight; no slot gives zero."""
        ...


class Gather:
    """Rows by index, both ways and in both passes."""

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        rows = _take_rows(x, assignment.token, assignment.slot)
        return rows.reshape(x.shape[0], assignment.num_experts, assignment.capacity, x.shape[-1])

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        rows = y.reshape(y.shape[0], assignment.num_experts * assignment.capacity, y.shape[-1])
        weight = assignment.weight.astype(y.dtype)
        return _scale_rows(_take_rows(rows, assignment.slot, assignment.token), weight)


class Einsum:
    """One-hot masks, multiplied."""

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        return jnp.einsum("gsec,gsd->gecd", _one_hot(assignment, x.dtype), x)

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        weight = assignment.weight.astype(y.dtype)
        mask = _one_hot(assignment, y.dtype) * weight[..., None, None]
        return jnp.einsum("gsec,gecd->gsd", mask, y)


DISPATCHERS: dict[DispatchMethod, Dispatcher] = {"gather": Gather(), "einsum": Einsum()}


def _one_hot(assignment: Assignment, dtype: jnp.dtype) -> Array:
    """``[G, S, E, C]``: 1 at the token's slot."""
    experts, capacity = assignment.num_experts, assignment.capacity
    flat = jax.nn.one_hot(assignment.slot, experts * capacity, dtype=dtype)
    return flat.reshape(*assignment.slot.shape, experts, capacity)


def _rows(x: Array, index: Array) -> Array:
    """``x[g, index[g, n]]``, zero where the index is past the end."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def _take_rows(x: Array, index: Array, inverse: Array) -> Array:
    """Rows of ``x`` ``[G, N, D]`` by ``index`` ``[G, M]``; ``inverse`` ``[G, N]`` says who took each row."""
    del inverse
    return _rows(x, index)


def _take_rows_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rows(x, index), (index, inverse)


def _take_rows_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    index, inverse = residuals
    no_gradient = (np.zeros(index.shape, jax.dtypes.float0), np.zeros(inverse.shape, jax.dtypes.float0))
    return _rows(dy, inverse), *no_gradient


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _scale_rows(rows: Array, weight: Array) -> Array:
    """``[G, S, D]`` times ``[G, S]``.

    The weight's gradient is a product with ones: the sum that it is would be fused with the broadcast that
    follows, and computed slowly.
    """
    return rows * weight[..., None]


def _scale_rows_forward(rows: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return rows * weight[..., None], (rows, weight)


def _scale_rows_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    rows, weight = residuals
    return dy * weight[..., None], (dy * rows) @ jnp.ones(rows.shape[-1], rows.dtype)


_scale_rows.defvjp(_scale_rows_forward, _scale_rows_backward)
