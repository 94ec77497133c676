"""The two verbs of a sparse layer: dispatch tokens to expert slots, combine expert outputs into tokens.

Two interchangeable methods compute the same function and the same gradients:

* ``gather`` reads rows by index in the forward pass and, through its own derivatives, in the backward pass too: an
  assignment is one-to-one between choices and slots, so the transpose of a gather by ``token`` is a sum over a
  token's few slots. Where a token may have many (expert choice), the rows are added into their tokens instead.
* ``einsum`` multiplies by one-hot masks ``[G, S, E, C]`` as the paper's pseudocode does (appendix F). It costs
  a matrix multiplication as large as a dense layer's, and is kept as the reference.

Without capacity there are no slots, and a CPU leaves empty ones out: :func:`dispatch_rows` and :func:`combine_rows` are
the two verbs on rows that are sorted by expert, gathered as ``gather`` does.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.routing.assignment import Assignment, RowOrder
from switch_t5.routing.data_flow import zero_after
from switch_t5.types import Array

DispatchMethod = Literal["auto", "gather", "einsum", "dropless"]

_GATHERED_CHOICES = 8
"""More choices than this are added up by slot, which reads each row once."""


class Dispatcher(Protocol):
    """The interface that every method with a capacity offers."""

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """``[G, S, D]`` tokens to ``[G, E, C, D]`` slots; an empty slot is zero."""
        ...

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """``[G, E, C, D]`` expert outputs to ``[G, S, D]``: sums over choices, each scaled by its weight."""
        ...


class Gather:
    """Rows by index, both ways and in both passes."""

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        rows = _to_slots(x, assignment.slot, assignment.token)
        return rows.reshape(x.shape[0], assignment.num_experts, assignment.capacity, x.shape[-1])

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        rows = y.reshape(y.shape[0], assignment.num_experts * assignment.capacity, y.shape[-1])
        return _to_tokens(rows, assignment.weight.astype(y.dtype), assignment.slot, assignment.entry)


class Einsum:
    """One-hot masks, multiplied, in full precision: a mask selects and must not round.

    An expert's output that is not finite reaches its whole group, for zero times it is no number.
    """

    def dispatch(self, x: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        # A row without a slot is multiplied by zero, which would not stop a NaN.
        x = jnp.where(assignment.kept[..., None], x, 0)
        return _full_einsum("gsec,gsd->gecd", _masks(assignment, jnp.ones_like(assignment.weight, x.dtype)), x)

    def combine(self, y: Array, assignment: Assignment) -> Array:
        """See :class:`Dispatcher`."""
        return _full_einsum("gsec,gecd->gsd", _masks(assignment, assignment.weight.astype(y.dtype)), y)


_full_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

DISPATCHERS: dict[DispatchMethod, Dispatcher] = {"gather": Gather(), "einsum": Einsum()}


def dispatcher(method: DispatchMethod) -> Dispatcher:
    """The method of that name, for a router with a capacity; ``auto`` is the fastest that computes the same function.

    That is ``gather``: no group is so small that products with masks would be faster (``moe_layer.py`` among the
    benchmarks). ``dropless`` computes another function, which ``auto`` leaves to who asks for it.
    """
    return DISPATCHERS["gather" if method == "auto" else method]


def dispatch_rows(x: Array, order: RowOrder) -> Array:
    """``[N, D]`` tokens to ``[R, D]`` rows sorted by expert; a row past the last choice is zero."""
    return _to_slots(x[None], order.row[None], order.entry[None] // order.row.shape[-1])[0]


def combine_rows(y: Array, weight: Array, order: RowOrder) -> Array:
    """``[R, D]`` rows to ``[N, D]``: sums over choices, each scaled by its weight ``[N, K]``."""
    return _to_tokens(y[None], weight[None].astype(y.dtype), order.row[None], order.entry[None])[0]


def _masks(assignment: Assignment, weight: Array) -> Array:
    """``[G, S, E, C]``: the choice's ``weight`` ``[G, S, K]`` at its slot."""
    groups, tokens, choices = assignment.slot.shape
    experts, capacity = assignment.num_experts, assignment.capacity
    flat = sum(
        jax.nn.one_hot(assignment.slot[..., choice], experts * capacity, dtype=weight.dtype) * weight[..., choice, None]
        for choice in range(choices)
    )
    return jnp.asarray(flat).reshape(groups, tokens, experts, capacity)


def _rows(x: Array, index: Array) -> Array:
    """``x[g, index[g, n]]``, zero where the index is past the end."""
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


def _sum_by_token(rows: Array, slot: Array, token: Array) -> Array:
    """``[G, E * C, D]`` rows to ``[G, S, D]``: the sum of each token's rows."""
    groups, tokens, choices = slot.shape
    if choices <= _GATHERED_CHOICES:
        first, *others = (_rows(rows, slot[..., choice]) for choice in range(choices))
        return sum(others, start=first)
    group = jnp.arange(groups)[:, None]
    return jnp.zeros((groups, tokens, rows.shape[-1]), rows.dtype).at[group, token].add(rows, mode="drop")


def _no_gradient(index: Array) -> np.ndarray:
    return np.zeros(index.shape, jax.dtypes.float0)


@jax.custom_vjp
def _to_slots(x: Array, slot: Array, token: Array) -> Array:
    """``[G, S, D]`` to ``[G, E * C, D]`` by ``token``; ``slot`` is what the derivative reads."""
    del slot
    return _rows(x, token)


def _to_slots_forward(x: Array, slot: Array, token: Array) -> tuple[Array, tuple[Array, Array]]:
    return _rows(x, token), (slot, token)


def _to_slots_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    slot, token = residuals
    return _sum_by_token(dy, slot, token), _no_gradient(slot), _no_gradient(token)


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def _to_tokens(rows: Array, weight: Array, slot: Array, entry: Array) -> Array:
    """``[G, E * C, D]`` to ``[G, S, D]``: each row times its weight ``[G, S, K]``, summed by token."""
    return _to_tokens_forward(rows, weight, slot, entry)[0]


def _to_tokens_forward(rows: Array, weight: Array, slot: Array, entry: Array) -> tuple[Array, tuple[Array, ...]]:
    of_slot = _rows(weight.reshape(weight.shape[0], -1, 1), entry)
    return _sum_by_token(rows * of_slot, slot, entry // slot.shape[-1]), (rows, of_slot, slot, entry)


def _to_tokens_backward(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, np.ndarray, np.ndarray]:
    rows, of_slot, slot, entry = residuals
    dy_rows = _rows(dy, entry // slot.shape[-1])
    # A product with ones: XLA's CPU backend would fuse the sum that it is with what reads it, and be slow.
    d_of_slot = jnp.matmul(
        dy_rows * rows, jnp.ones((rows.shape[-1], 1), rows.dtype), precision=jax.lax.Precision.HIGHEST
    )
    d_weight = _rows(d_of_slot, slot.reshape(slot.shape[0], -1)).reshape(slot.shape)
    # After the weights' gradient in the flow of data: XLA would keep rows and dy_rows until the experts are done.
    of_slot += zero_after(d_of_slot)
    return dy_rows * of_slot, d_weight, _no_gradient(slot), _no_gradient(entry)


_to_tokens.defvjp(_to_tokens_forward, _to_tokens_backward)
