"""A model split once into structure and parameters, so that steps are pure functions of a dictionary."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from switch_t5.layers.parameter import parameter_axes
from switch_t5.model.config import TransformerConfig
from switch_t5.model.transformer import SwitchTransformer
from switch_t5.partitioning.rules import gather_parameter
from switch_t5.types import Array, Axes, Params


class Model:
    """The structure of a :class:`SwitchTransformer`, without parameters.

    Attributes:
      config: its numbers.
      abstract_params: a nested dictionary of ``jax.ShapeDtypeStruct``.
      axes: the same dictionary with each parameter's logical axes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config
        abstract = nnx.eval_shape(lambda: SwitchTransformer(config, rngs=nnx.Rngs(params=0)))
        self._graph, self._state = nnx.split(abstract)
        self.abstract_params: Params = nnx.to_pure_dict(self._state)
        self.axes: dict[str, Any] = nnx.to_pure_dict(parameter_axes(self._state))

    def init(self, rng: Array) -> Params:
        """Draws the parameters; a pure function, to be jitted with the shardings of its result."""
        module = SwitchTransformer(self.config, rngs=nnx.Rngs(params=rng))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def bind(self, params: Params) -> SwitchTransformer:
        """The module with these parameters in place, those outside the blocks gathered; blocks gather their own."""

        def gathered(path: jax.tree_util.KeyPath, leaf: Array, axes: Axes) -> Array:
            return leaf if jax.tree_util.DictKey("blocks") in path else gather_parameter(leaf, axes)

        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, jax.tree_util.tree_map_with_path(gathered, params, self.axes))
        return nnx.merge(self._graph, state)
