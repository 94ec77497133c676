"""The T5 encoder-decoder.

Source: Raffel et al. 2020; with Switch layers, Fedus et al. 2022.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from switch_t5.layers.attention import for_each_part_of_heads, mask_bias
from switch_t5.layers.dropout import dropout, split_rng
from switch_t5.layers.embedding import Embedding, LogitsDense
from switch_t5.layers.normalization import RMSNorm
from switch_t5.model.blocks import RESIDUAL_AXES, BlockInputs, position_bias, self_positions
from switch_t5.model.config import TransformerConfig
from switch_t5.model.stack import Stack
from switch_t5.partitioning.rules import constrain
from switch_t5.routing.balance import RouterStats
from switch_t5.types import Array, Batch


@partial(jax.tree_util.register_dataclass, data_fields=["encoder", "decoder"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ModelStats:
    """Router statistics of each stack, with a leading axis over its sparse layers; None where it has none."""

    encoder: RouterStats | None
    decoder: RouterStats | None

    def stacks(self) -> dict[str, RouterStats]:
        """The stacks that have sparse layers, by name."""
        both = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stats for name, stats in both.items() if stats is not None}


class Coder(nnx.Module):
    """An encoder or a decoder between embedding and logits: position bias, blocks, final norm."""

    def __init__(self, config: TransformerConfig, *, decoder: bool, rngs: nnx.Rngs) -> None:
        self.config = config
        if not config.relpos_per_layer:
            self.relative_position = position_bias(config, decoder=decoder, rngs=rngs)
        self.stack = Stack(config, *config.patterns(decoder=decoder), decoder=decoder, rngs=rngs)
        self.norm = RMSNorm(config.emb_dim, rngs=rngs)

    def __call__(self, x: Array, inputs: BlockInputs, rng: Array | None) -> tuple[Array, RouterStats | None]:
        """``[batch, length, embed]`` to the same; the inputs come without ``positions``."""
        rate = self.config.dropout_rate
        input_rng, stack_rng, output_rng = split_rng(rng, 3)
        if not self.config.relpos_per_layer:
            inputs = dataclasses.replace(inputs, positions=self_positions(self.relative_position, x.shape[1]))
        x = constrain(dropout(x, rate, input_rng), RESIDUAL_AXES)
        x, stats = self.stack(x, inputs, stack_rng)
        return dropout(self.norm(x), rate, output_rng), stats


class SwitchTransformer(nnx.Module):
    """Tokens in, logits out. A batch's features are described in :mod:`switch_t5.data.pipeline`."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes = (config.vocab_size, config.emb_dim, config.initialization)
        self.embedding = Embedding(*sizes, rngs=rngs)
        self.encoder = Coder(config, decoder=False, rngs=rngs)
        self.decoder = Coder(config, decoder=True, rngs=rngs)
        if not config.tied_logits:
            self.logits_dense = LogitsDense(*sizes, rngs=rngs)

    def encode(
        self, tokens: Array, segments: Array | None = None, *, train: bool = False, rng: Array | None = None
    ) -> tuple[Array, RouterStats | None]:
        """Reads the input.

        Args:
          tokens: ``[batch, length]`` int32; 0 is padding.
          segments: ``[batch, length]`` int32, which packed example each position is of.
          train: chooses the experts' capacity.
          rng: for dropout and jitter; None for neither.

        Returns:
          ``[batch, length, embed]`` and the encoder's router statistics.
        """
        mask = tokens > 0
        # Nobody reads what padding attends to, unless its routes count: where nothing is packed one row of mask serves.
        moes = self.config.moe, self.config.attention_moe
        one_row = segments is None and not any(moe is not None and moe.reads_padding for moe in moes)
        queries = jnp.ones_like(mask[:, :1]) if one_row else mask
        bias = mask_bias(queries, mask, query_segments=segments, key_segments=segments)
        inputs = BlockInputs(
            tokens, mask, bias, None, None, None, self.config.sequences_per_group(tokens.shape[1]), train
        )
        return self.encoder(self.embedding(tokens, self.config.activation_dtype), inputs, rng)

    def decode(
        self,
        encoded: Array,
        encoder_tokens: Array,
        input_tokens: Array,
        mask: Array,
        encoder_segments: Array | None = None,
        segments: Array | None = None,
        *,
        train: bool = False,
        rng: Array | None = None,
    ) -> tuple[Array, RouterStats | None]:
        """Runs the decoder, teacher-forced.

        Args:
          encoded: ``[batch, encoder length, embed]``.
          encoder_tokens: ``[batch, encoder length]`` int32, for the mask.
          input_tokens: ``[batch, length]`` int32: the targets shifted right.
          mask: ``[batch, length]`` bool: positions with a target.
          encoder_segments: ``[batch, encoder length]`` int32.
          segments: ``[batch, length]`` int32.
          train: chooses the experts' capacity.
          rng: None for neither dropout nor jitter.

        Returns:
          ``[batch, length, embed]`` float32, to be multiplied by :meth:`output_kernel`, and the statistics.
        """
        self_mask = mask_bias(mask, mask, query_segments=segments, key_segments=segments, causal=True)
        cross_mask = mask_bias(mask, encoder_tokens > 0, query_segments=segments, key_segments=encoder_segments)
        inputs = BlockInputs(
            input_tokens,
            mask,
            self_mask,
            None,
            for_each_part_of_heads(encoded),
            cross_mask,
            self.config.sequences_per_group(encoder_tokens.shape[1]),
            train,
        )
        x, stats = self.decoder(self.embedding(input_tokens, self.config.activation_dtype), inputs, rng)
        return self.before_logits(x), stats

    def before_logits(self, x: Array) -> Array:
        """The decoder's normalized ``[..., embed]`` as what :meth:`output_kernel` multiplies, in float32."""
        # Tied logits are divided by sqrt(embed): here, where the array is small.
        scale = 1 / math.sqrt(self.config.emb_dim) if self.config.tied_logits else 1.0
        return x.astype(jnp.float32) * scale

    def output_kernel(self) -> Array:
        """``[vocab, embed]`` float32: logits are the decoder's output times its transpose."""
        return (self.embedding if self.config.tied_logits else self.logits_dense).output_kernel()

    def __call__(self, batch: Batch, *, train: bool = False, rng: Array | None = None) -> tuple[Array, ModelStats]:
        """Runs encoder and decoder on a batch.

        Returns:
          The decoder's output ``[batch, length, embed]`` before the logits, so that a loss may compute them
          piecewise, and the router statistics.
        """
        encoder_rng, decoder_rng = split_rng(rng, 2)
        encoder_tokens, encoder_segments = batch["encoder_input_tokens"], batch.get("encoder_segment_ids")
        encoded, encoder_stats = self.encode(encoder_tokens, encoder_segments, train=train, rng=encoder_rng)
        hidden, decoder_stats = self.decode(
            encoded,
            encoder_tokens,
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"] > 0,
            encoder_segments,
            batch.get("decoder_segment_ids"),
            train=train,
            rng=decoder_rng,
        )
        return hidden, ModelStats(encoder_stats, decoder_stats)


def logits(hidden: Array, output_kernel: Array) -> Array:
    """``[..., embed]`` and ``[vocab, embed]`` to ``[..., vocab]``, in float32."""
    return jnp.einsum("...d,vd->...v", hidden.astype(jnp.float32), output_kernel)
