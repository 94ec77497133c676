"""What a configuration amounts to, by arithmetic on shapes alone: parameters and floating-point operations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.switch_attention import routed_together
from switch_t5.model.config import TransformerConfig
from switch_t5.routing.capacity import group_shape


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
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        is_attention = "self_attention" in names
        moe = config.attention_moe if is_attention else config.moe_of(decoder=names[0] == "decoder")
        assert moe is not None
        return math.prod(leaf.shape) // moe.num_experts * moe.router.experts_per_token

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(active, abstract_params, axes)))


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Floating-point operations of the matrix products of a forward pass, by kind; a multiply-add is two.

    Attributes:
      attention: projections of queries, keys, values and outputs, and the products of queries, keys and values.
      scores: of those the products of queries and keys.
      feed_forward: dense feed-forwards and shared experts.
      feed_forward_out: of those the last product, which a recomputation in the backward pass can leave out.
      experts: feed-forward experts, with all their slots.
      attention_experts: what sparse projections add to dense ones for their slots.
      router: tokens by router kernels.
      logits: the output.
    """

    attention: int = 0
    scores: int = 0
    feed_forward: int = 0
    feed_forward_out: int = 0
    experts: int = 0
    attention_experts: int = 0
    router: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.attention + self.feed_forward + self.experts + self.attention_experts + self.router + self.logits

    def __add__(self, other: ForwardFlops) -> ForwardFlops:
        fields = (field.name for field in dataclasses.fields(self))
        return ForwardFlops(**{name: getattr(self, name) + getattr(other, name) for name in fields})


def forward_flops(
    config: TransformerConfig, batch: int, encoder_length: int, decoder_length: int, *, train: bool = True
) -> int:
    """:attr:`ForwardFlops.total` of :func:`forward_flops_by_kind`; a training step takes three times as many."""
    return forward_flops_by_kind(config, batch, encoder_length, decoder_length, train=train).total


def forward_flops_by_kind(
    config: TransformerConfig, batch: int, encoder_length: int, decoder_length: int, *, train: bool = True
) -> ForwardFlops:
    """Floating-point operations of the matrix products of one forward pass.

    Experts count with all their slots, filled or not, for that is what is multiplied; without capacity, with a row
    for each choice of a token, padding too.
    """
    c, width = config, config.num_heads * config.head_dim
    matrices = len(c.mlp_activations) + 1

    def attention(queries: int, keys: int) -> ForwardFlops:
        projections = 2 * c.emb_dim * width * (2 * queries + 2 * keys)
        scores = batch * 2 * queries * keys * width
        return ForwardFlops(attention=batch * projections + 2 * scores, scores=scores)

    def self_attention(length: int, sparse: bool) -> ForwardFlops:
        total, moe = attention(length, length), c.attention_moe
        if not sparse:
            return total
        assert moe is not None
        slots = expert_slots(moe, batch, length, c.sequences_per_group(encoder_length), train)
        for names in routed_together(c.sparse_projections):
            router_input = width if names == ("out",) else c.emb_dim
            total += ForwardFlops(
                attention_experts=len(names) * 2 * c.emb_dim * width * (slots - batch * length),
                router=2 * router_input * moe.num_experts * batch * length * moe.router.has_kernel,
            )
        return total

    def feed_forward(length: int, sparse: bool, *, decoder: bool) -> ForwardFlops:
        tokens, product = batch * length, 2 * c.emb_dim * c.mlp_dim
        if not sparse:
            return ForwardFlops(feed_forward=matrices * product * tokens, feed_forward_out=product * tokens)
        moe = c.moe_of(decoder=decoder)
        assert moe is not None
        slots = expert_slots(moe, batch, length, c.sequences_per_group(encoder_length), train)
        return ForwardFlops(
            router=2 * c.emb_dim * moe.num_experts * tokens * moe.router.has_kernel,
            experts=matrices * product * slots,
            feed_forward=matrices * product * moe.num_shared_experts * tokens,
        )

    total = ForwardFlops(logits=2 * batch * decoder_length * c.emb_dim * c.vocab_size)
    for sparse, sparse_attention in zip(*c.patterns(decoder=False), strict=True):
        total += self_attention(encoder_length, sparse_attention)
        total += feed_forward(encoder_length, sparse, decoder=False)
    for sparse, sparse_attention in zip(*c.patterns(decoder=True), strict=True):
        total += self_attention(decoder_length, sparse_attention) + attention(decoder_length, encoder_length)
        total += feed_forward(decoder_length, sparse, decoder=True)
    return total


def expert_slots(moe: MoEConfig, batch: int, length: int, sequences: int, train: bool = True) -> int:
    """Slots of all experts of a layer for a batch, or without capacity its rows; ``sequences`` are in a group."""
    if moe.dispatch == "dropless":
        return batch * length * moe.router.experts_per_token
    groups, tokens = group_shape(batch, length, moe.group_size, sequences)
    return groups * moe.capacity(tokens, train) * moe.num_experts
