"""A stack of blocks, written out one by one or scanned.

Scanned, the parameters of one period of the layer pattern (for instance a dense and a sparse block) carry a
leading ``layers`` axis, and the compiler sees the period once. Both forms start from the same random numbers
and compute the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import ShapedArray
from jax.extend.core import Primitive

from switch_t5.layers.dropout import split_rng
from switch_t5.layers.parameter import gather_parameters
from switch_t5.model.blocks import Block, BlockInputs
from switch_t5.model.config import TransformerConfig
from switch_t5.partitioning.rules import gathers_parameters
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array

Pattern = tuple[tuple[bool, bool], ...]
"""For each block, whether its self-attention and whether its feed-forward is sparse."""


class Period(nnx.Module):
    """The blocks of one period of the layer pattern, named ``layers_0``, ``layers_1``, ..."""

    def __init__(self, config: TransformerConfig, pattern: Pattern, decoder: bool, keys: Array) -> None:
        self.num_blocks = len(pattern)
        for index, (sparse_attention, sparse) in enumerate(pattern):
            rngs = nnx.Rngs(params=keys[index])
            block = Block(config, sparse=sparse, decoder=decoder, rngs=rngs, sparse_attention=sparse_attention)
            setattr(self, f"layers_{index}", block)

    def __call__(
        self, x: Array, inputs: BlockInputs, rngs: list[Array | None], remat: bool
    ) -> tuple[Array, RouterStats | None]:
        """Applies the blocks in turn; statistics are stacked over their sparse layers, block by block."""
        stats: list[RouterStats] = []
        for index, rng in enumerate(rngs):
            x, block_stats = _apply(getattr(self, f"layers_{index}"), x, inputs, rng, remat)
            stats += block_stats
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats) if stats else None


def _apply(
    block: Block, x: Array, inputs: BlockInputs, rng: Array | None, remat: bool
) -> tuple[Array, tuple[RouterStats, ...]]:
    graph, params = nnx.split(block)

    def call(
        params: nnx.State, x: Array, inputs: BlockInputs, rng: Array | None
    ) -> tuple[Array, tuple[RouterStats, ...]]:
        return gather_parameters(nnx.merge(graph, params))(x, inputs, rng)

    if remat:
        call = jax.checkpoint(call)
    elif gathers_parameters():
        call = jax.checkpoint(call, policy=_all_but_kernels(params))
    return call(params, x, inputs, rng)


def _all_but_kernels(params: nnx.State) -> Callable[..., bool]:
    """What is kept for the backward pass: all but gathered parameters and their casts, which are made again."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}

    def is_kept(primitive: Primitive, *inputs: ShapedArray, **_: Any) -> bool:
        return primitive.name not in ("sharding_constraint", "convert_element_type") or inputs[0].shape not in shapes

    return is_kept


class Stack(nnx.Module):
    """All blocks of an encoder or decoder, in ``blocks``."""

    def __init__(
        self,
        config: TransformerConfig,
        sparse: tuple[bool, ...],
        sparse_attention: tuple[bool, ...] | None = None,
        *,
        decoder: bool,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the blocks.

        Args:
          config: their numbers.
          sparse: for each block whether its feed-forward is sparse.
          sparse_attention: the same of its self-attention; None for nowhere.
          decoder: whether the blocks have cross-attention.
          rngs: for the parameters.
        """
        self.config = config
        self.num_layers = len(sparse)
        pattern = tuple(zip(sparse_attention or (False,) * len(sparse), sparse, strict=True))
        self.period = shortest_period(pattern) if config.scan_layers else len(pattern)
        keys = jax.random.split(rngs.params(), len(pattern))

        def build(keys: Array) -> Period:
            return Period(config, pattern[: self.period], decoder, keys)

        if self.period == self.num_layers:
            self.blocks = build(keys)
        else:
            self.blocks = _stacked(build, keys.reshape(-1, self.period, *keys.shape[1:]))

    def __call__(self, x: Array, inputs: BlockInputs, rng: Array | None) -> tuple[Array, RouterStats | None]:
        """Applies the stack.

        Args:
          x: ``[batch, length, embed]``.
          inputs: what every block reads.
          rng: None where nothing is random.

        Returns:
          ``[batch, length, embed]``, and statistics with a leading axis over sparse layers (None if there
          are none): block by block, and in a block in the order of :data:`switch_t5.model.blocks.SPARSE_LAYERS`.
        """
        if self.period == self.num_layers:
            return self.blocks(x, inputs, split_rng(rng, self.num_layers), self.config.remat)
        repeats = self.num_layers // self.period
        graph, params = nnx.split(self.blocks)

        def body(x: Array, scanned: tuple[nnx.State, Array | None]) -> tuple[Array, RouterStats | None]:
            layer_params, keys = scanned
            rngs = [None if keys is None else keys[index] for index in range(self.period)]
            return nnx.merge(graph, layer_params)(x, inputs, rngs, self.config.remat)

        keys = None if rng is None else jax.random.split(rng, self.num_layers).reshape(repeats, self.period)
        x, stats = jax.lax.scan(body, x, (params, keys))
        return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)


def shortest_period(pattern: tuple[Any, ...]) -> int:
    """The length of the shortest pattern whose repetition is the whole: 2 for dense, sparse, dense, sparse."""
    return next(
        period
        for period in range(1, len(pattern) + 1)
        if len(pattern) % period == 0 and pattern == pattern[:period] * (len(pattern) // period)
    )


def _stacked(build, keys: Array) -> Period:  # noqa: ANN001
    graph, one = nnx.split(build(keys[0]))
    stacked = jax.vmap(lambda key: nnx.split(build(key))[1])(keys)
    params = jax.tree.map(
        lambda leaf, single: leaf.replace(axes=("layers", *single.get_metadata()["axes"])),
        stacked,
        one,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
    )
    return nnx.merge(graph, params)
