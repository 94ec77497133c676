"""A stack of blocks, written out one by one or scanned.

Scanned, the parameters of one period of the layer pattern (for instance a dense and a sparse block) carry a
leading ``layers`` axis, and the compiler sees the period once. Both forms start from the same random numbers
and compute the same function.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.dropout import split_rng
from switch_t5.layers.parameter import gather_parameters
from switch_t5.layers.rematerialization import RematPolicy, rematerialized
from switch_t5.model.blocks import Block, BlockInputs
from switch_t5.model.config import TransformerConfig
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
        self, x: Array, inputs: BlockInputs, rngs: list[Array | None], remat_policy: RematPolicy
    ) -> tuple[Array, RouterStats | None]:
        """Applies the blocks in turn; statistics are stacked over their sparse layers, block by block."""
        stats: list[RouterStats] = []
        for index, rng in enumerate(rngs):
            x, block_stats = _apply(getattr(self, f"layers_{index}"), x, inputs, rng, remat_policy)
            stats += block_stats
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats) if stats else None


def _apply(
    block: Block, x: Array, inputs: BlockInputs, rng: Array | None, remat_policy: RematPolicy
) -> tuple[Array, tuple[RouterStats, ...]]:
    graph, params = nnx.split(block)

    def call(
        params: nnx.State, x: Array, inputs: BlockInputs, rng: Array | None
    ) -> tuple[Array, tuple[RouterStats, ...]]:
        return gather_parameters(nnx.merge(graph, params))(x, inputs, rng)

    return rematerialized(call, remat_policy, params)(params, x, inputs, rng)


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
            return self.blocks(x, inputs, split_rng(rng, self.num_layers), self.config.remat_policy)
        repeats = self.num_layers // self.period
        graph, params = nnx.split(self.blocks)

        def body(x: Array, scanned: tuple[nnx.State, Array | None]) -> tuple[Array, RouterStats | None]:
            layer_params, keys = scanned
            rngs = [None if keys is None else keys[index] for index in range(self.period)]
            return nnx.merge(graph, layer_params)(x, inputs, rngs, self.config.remat_policy)

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
