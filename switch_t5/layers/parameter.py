"""A parameter and the logical axes of its dimensions."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.initializers import Initializer
from switch_t5.partitioning.rules import gather_parameter, gathers_parameters
from switch_t5.types import Axes

M = TypeVar("M", bound=nnx.Module)


def parameter(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """Creates a float32 parameter that carries its logical axes as ``axes``.

    The name is not Flax's own ``sharding``, which newer versions act upon: placing parameters on a mesh is
    the partitioning package's work alone.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} cannot have the axes {axes}")
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def parameter_axes(params: nnx.State) -> Any:
    """The logical axes of each parameter, in the structure of ``params``; of one layer where a scan holds several."""
    return jax.tree.map(
        lambda leaf: leaf.get_metadata()["axes"][-leaf.get_value().ndim :],
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )


def gather_parameters(module: M) -> M:
    """A module with its parameters as layers use them: see :func:`switch_t5.partitioning.rules.gather_parameter`."""
    if not gathers_parameters():
        return module
    graph, params = nnx.split(module)

    def gathered(leaf: nnx.Param, axes: Axes) -> nnx.Variable:
        return leaf.replace(gather_parameter(leaf.get_value(), axes))

    is_leaf = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(gathered, params, parameter_axes(params), is_leaf=is_leaf))
