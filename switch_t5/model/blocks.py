"""One block of an encoder or decoder: pre-normalized attention and feed-forward, each with its residual."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.attention import Attention, SelfAttend
from switch_t5.layers.dense import FeedForward
from switch_t5.layers.dropout import dropout, split_rng
from switch_t5.layers.moe import SwitchFeedForward
from switch_t5.layers.normalization import RMSNorm
from switch_t5.layers.relative_position import RelativePositionBias
from switch_t5.layers.rematerialization import kept
from switch_t5.layers.switch_attention import SPARSE_PROJECTIONS, SwitchAttention
from switch_t5.model.config import TransformerConfig
from switch_t5.partitioning.rules import constrain, num_shards
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array

RESIDUAL_AXES = ("batch", "length", "embed")

SPARSE_LAYERS = (*(("self_attention", name) for name in SPARSE_PROJECTIONS), ("mlp",))
"""Where in a block's parameters its sparse layers are, in the order of their statistics."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "mask", "self_mask", "positions", "encoded", "cross_mask"],
    meta_fields=["sequences", "train"],
)
@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """What every block of a stack reads besides the residual stream.

    Attributes:
      tokens: ``[batch, length]`` int32, the stack's input.
      mask: ``[batch, length]`` bool, False for padding.
      self_mask: ``[batch, 1, length, length]`` float32, what self-attention must not see; ``[batch, 1, 1, length]``
        where that is the same for all queries.
      positions: ``[batch shards, heads, length, length]`` float32, the relative position bias; None where
        each block has one.
      encoded: ``[batch, encoder length, embed]``, the encoder's output, or a copy for each part of the heads; None in
        the encoder.
      cross_mask: ``[batch, 1, length, encoder length]`` float32; None in the encoder.
      sequences: sequences in a routing group.
      train: chooses the experts' capacity.
    """

    tokens: Array
    mask: Array
    self_mask: Array
    positions: Array | None
    encoded: Array | None
    cross_mask: Array | None
    sequences: int
    train: bool


def position_bias(config: TransformerConfig, *, decoder: bool, rngs: nnx.Rngs) -> RelativePositionBias:
    """The position bias of a stack or, where each block has its own, of a block."""
    return RelativePositionBias(
        config.num_heads,
        config.relpos_num_buckets,
        config.relpos_max_distance,
        not decoder,
        config.initialization,
        rngs=rngs,
    )


def self_positions(bias: RelativePositionBias, length: int) -> Array:
    """``[batch shards, heads, length, length]`` float32: a stack's bias, or a block's, as training reads it."""
    return bias(length, length, jnp.dtype(jnp.float32), shards=num_shards("batch"))


class Block(nnx.Module):
    """Self-attention, in a decoder cross-attention, then a feed-forward; the first and the last dense or sparse."""

    def __init__(
        self, config: TransformerConfig, *, sparse: bool, decoder: bool, rngs: nnx.Rngs, sparse_attention: bool = False
    ) -> None:
        self.config, self.sparse, self.decoder = config, sparse, decoder
        attention_sizes = (config.emb_dim, config.num_heads, config.head_dim, config.initialization)
        if config.relpos_per_layer:
            self.relative_position = position_bias(config, decoder=decoder, rngs=rngs)
        self.self_attention_norm = RMSNorm(config.emb_dim, rngs=rngs)
        if sparse_attention:
            assert config.attention_moe is not None
            projections, dtype = config.sparse_projections, config.attention_expert_dtype
            self.self_attention = SwitchAttention(
                config.attention_moe, projections, *attention_sizes, expert_dtype=dtype, rngs=rngs
            )
        else:
            self.self_attention = Attention(*attention_sizes, rngs=rngs)
        if decoder:
            self.cross_attention_norm = RMSNorm(config.emb_dim, rngs=rngs)
            self.cross_attention = Attention(*attention_sizes, rngs=rngs)
        self.mlp_norm = RMSNorm(config.emb_dim, rngs=rngs)
        sizes = (config.emb_dim, config.mlp_dim, config.mlp_activations, config.initialization)
        if sparse:
            moe = config.moe_of(decoder=decoder)
            assert moe is not None
            self.mlp = SwitchFeedForward(moe, *sizes, rngs=rngs)
        else:
            self.mlp = FeedForward(*sizes, rngs=rngs)

    def __call__(self, x: Array, inputs: BlockInputs, rng: Array | None) -> tuple[Array, tuple[RouterStats, ...]]:
        """``[batch, length, embed]`` to the same, and each router's statistics, in the order of SPARSE_LAYERS."""
        rate = self.config.dropout_rate
        attention_rng, cross_rng, mlp_rng, *residual_rngs = split_rng(rng, 6)

        y, attention_stats = self.attend_to_self(self.self_attention_norm(x), inputs, attention_rng)
        x = kept(constrain(x + dropout(y, rate, residual_rngs[0]), RESIDUAL_AXES))

        if self.decoder:
            assert inputs.encoded is not None and inputs.cross_mask is not None
            y = self.cross_attention_norm(x)
            y = self.cross_attention(y, inputs.encoded, inputs.cross_mask, None, dropout_rate=rate, rng=cross_rng)
            x = kept(constrain(x + dropout(y, rate, residual_rngs[1]), RESIDUAL_AXES))

        y, mlp_stats = self.feed_forward(self.mlp_norm(x), inputs, mlp_rng)
        return constrain(x + dropout(y, rate, residual_rngs[2]), RESIDUAL_AXES), (*attention_stats, *mlp_stats)

    def attend_to_self(
        self, y: Array, inputs: BlockInputs, rng: Array | None, attending: SelfAttend | None = None
    ) -> tuple[Array, tuple[RouterStats, ...]]:
        """Self-attention of ``[batch, length, embed]``, and its routers' statistics; ``attending`` reads a cache."""
        rate, positions = self.config.dropout_rate, inputs.positions
        if positions is None and attending is None:
            positions = self_positions(self.relative_position, y.shape[1])
        if isinstance(self.self_attention, SwitchAttention):
            return self.self_attention(
                y,
                inputs.self_mask,
                positions,
                real=inputs.mask,
                tokens=inputs.tokens,
                sequences=inputs.sequences,
                train=inputs.train,
                dropout_rate=rate,
                rng=rng,
                attend_to_self=attending,
            )
        y = self.self_attention(y, y, inputs.self_mask, positions, dropout_rate=rate, rng=rng, attend_to_self=attending)
        return y, ()

    def feed_forward(self, y: Array, inputs: BlockInputs, rng: Array | None) -> tuple[Array, tuple[RouterStats, ...]]:
        """The feed-forward of ``[batch, length, embed]``, and its router's statistics where it is sparse."""
        if isinstance(self.mlp, SwitchFeedForward):
            y, stats = self.mlp(
                y, inputs.mask, tokens=inputs.tokens, sequences=inputs.sequences, train=inputs.train, rng=rng
            )
            return y, (stats,)
        axes = ("batch", "length", "mlp")
        return self.mlp(y, hidden_axes=axes, dropout_rate=self.config.dropout_rate, rng=rng), ()
