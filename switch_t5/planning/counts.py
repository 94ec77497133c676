"""What a configuration amounts to, by arithmetic on shapes alone: parameters and floating-point operations."""

from __future__ import annotations

import math
from typing import Any

import jax

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.routing.capacity import group_shape, sequences_per_group


def parameter_count(abstract_params: Any) -> int:
    """All parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params))


def active_parameter_count(config: TransformerConfig, abstract_params: Any, axes: Any) -> int:
    """Parameters that one token passes: of the experts' only its own experts' share.

    Args:
      config: of the model.
      abstract_params: arrays or shapes.
      axes: the same tree, a tuple of logical axes for each.
    """

    def active(path: jax.tree_util.KeyPath, leaf: Any, leaf_axes: tuple[str | None, ...]) -> int:
        if "expert" not in leaf_axes:
            return math.prod(leaf.shape)
        moe = config.moe_of(decoder=jax.tree_util.keystr(path[:1], simple=True) == "decoder")
        assert moe is not None
        return math.prod(leaf.shape) // moe.num_experts * moe.router.experts_per_token

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(active, abstract_params, axes)))


def forward_flops(
    config: TransformerConfig, batch: int, encoder_length: int, decoder_length: int, *, train: bool = True
) -> int:
    """Floating-point operations of the matrix multiplications of one forward pass; a multiply-add is two.

    A training step takes three times as many. Experts count with all their slots, filled or not, for that is
    what is multiplied.
    """
    c, width = config, config.num_heads * config.head_dim
    matrices = len(c.mlp_activations) + 1

    def attention(queries: int, keys: int) -> int:
        projections = 2 * c.emb_dim * width * (2 * queries + 2 * keys)
        return projections + 2 * 2 * queries * keys * width

    def feed_forward(length: int, sparse: bool, *, decoder: bool) -> int:
        tokens = batch * length
        if not sparse:
            return 2 * matrices * c.emb_dim * c.mlp_dim * tokens
        moe = c.moe_of(decoder=decoder)
        assert moe is not None
        router = 2 * c.emb_dim * moe.num_experts * tokens * moe.router.has_kernel
        slots = _slots(moe, batch, length, sequences_per_group(moe.group_size, encoder_length), train)
        return router + 2 * matrices * c.emb_dim * c.mlp_dim * (slots + moe.num_shared_experts * tokens)

    total = 2 * batch * decoder_length * c.emb_dim * c.vocab_size
    for sparse in c.encoder_pattern:
        total += batch * attention(encoder_length, encoder_length) + feed_forward(encoder_length, sparse, decoder=False)
    for sparse in c.decoder_pattern:
        total += batch * attention(decoder_length, decoder_length) + feed_forward(decoder_length, sparse, decoder=True)
        total += batch * attention(decoder_length, encoder_length)
    return total


def _slots(moe: MoEConfig, batch: int, length: int, sequences: int, train: bool) -> int:
    groups, tokens = group_shape(batch, length, moe.group_size, sequences)
    return groups * moe.capacity(tokens, train) * moe.num_experts
