"""The numbers that define a model, validated once."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from switch_t5.errors import ConfigError, check_types
from switch_t5.layers.initializers import Initialization
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.routing.capacity import sequences_per_group

LayerLayout = int | str | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A T5 encoder-decoder, dense or with Switch layers.

    Attributes:
      vocab_size: rows of the embedding, padding rows included.
      emb_dim: size of the residual stream.
      num_heads: attention heads.
      head_dim: size of one head.
      mlp_dim: hidden size of a feed-forward, dense or expert.
      num_encoder_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder.
      mlp_activations: one name for a plain feed-forward (``("relu",)``), two for a gated one, multiplied
        (``("gelu", "linear")``).
      tied_logits: the output uses the embedding, scaled by ``1 / sqrt(emb_dim)``, instead of its own matrix.
      dropout_rate: of embeddings, attention, feed-forwards and residual branches; shared along the length.
      relpos_num_buckets: buckets of the relative position bias.
      relpos_max_distance: distances from here on share the last bucket.
      dtype: of activations and matrix multiplications; parameters are float32.
      initialization: ``paper`` (truncated normal of scale 0.1), ``t5x`` or ``t5x_switch`` (as the released dense
        and Switch models), see :mod:`switch_t5.layers.initializers`.
      scan_layers: compile one period of the layer pattern and scan it over the depth.
      remat: recompute a block's activations in the backward pass.
      moe: the sparse layers; None for a dense model.
      decoder_moe: the decoder's, where they differ from the encoder's; ``group_size`` is one for both.
      encoder_sparse_layers: which encoder blocks are sparse, see :func:`sparse_layers`.
      decoder_sparse_layers: the same for the decoder.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    mlp_activations: tuple[str, ...] = ("relu",)
    tied_logits: bool = True
    dropout_rate: float = 0.0
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    initialization: Initialization = "paper"
    scan_layers: bool = False
    remat: bool = False
    moe: MoEConfig | None = None
    decoder_moe: MoEConfig | None = None
    encoder_sparse_layers: LayerLayout = 2
    decoder_sparse_layers: LayerLayout = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        check_types(self)
        for field in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "head_dim",
            "mlp_dim",
            "num_encoder_layers",
            "num_decoder_layers",
        ):
            if getattr(self, field) < 1:
                raise ConfigError(f"TransformerConfig.{field}", f"must be at least 1, got {getattr(self, field)}.")
        if not 0 <= self.dropout_rate < 1:
            raise ConfigError("TransformerConfig.dropout_rate", f"must be in [0, 1), got {self.dropout_rate}.")
        unknown = set(self.mlp_activations) - {"relu", "gelu", "silu", "linear"}
        if unknown or not 1 <= len(self.mlp_activations) <= 2:
            raise ConfigError(
                "TransformerConfig.mlp_activations",
                f"must be one or two of 'relu', 'gelu', 'silu', 'linear', got {self.mlp_activations}.",
            )
        if self.relpos_num_buckets < 4 or self.relpos_num_buckets % 2:
            raise ConfigError(
                "TransformerConfig.relpos_num_buckets", f"must be even and at least 4, got {self.relpos_num_buckets}."
            )
        if self.relpos_max_distance <= self.relpos_num_buckets // 2:
            raise ConfigError(
                "TransformerConfig.relpos_max_distance",
                f"must be above half of relpos_num_buckets, {self.relpos_num_buckets // 2}, got "
                f"{self.relpos_max_distance}.",
            )
        _ = self.encoder_pattern
        if any(self.decoder_pattern):
            self._check_decoder()

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    def _check_decoder(self) -> None:
        moe = self.moe_of(decoder=True)
        assert self.moe is not None and moe is not None
        if moe.group_size != self.moe.group_size:
            raise ConfigError(
                "TransformerConfig.decoder_moe",
                f"has group_size {moe.group_size}, but both stacks group the same sequences: give it the encoder's, "
                f"{self.moe.group_size}.",
            )
        router = moe.router
        if router.sees_future_tokens and not router.allow_future_tokens:
            what = "batch_prioritized" if router.batch_prioritized else f"the router {router.router!r}"
            raise ConfigError(
                "RouterConfig.router" if not router.batch_prioritized else "RouterConfig.batch_prioritized",
                f"cannot serve a decoder: {what} chooses a token's experts by later tokens, which leaks the future "
                "into training and has no meaning in decoding; give TransformerConfig.decoder_moe another router, or "
                "set RouterConfig.allow_future_tokens = True.",
            )

    def moe_of(self, *, decoder: bool) -> MoEConfig | None:
        """The sparse layers of one stack; None for a dense model."""
        return self.decoder_moe if decoder and self.decoder_moe is not None else self.moe

    def sequences_per_group(self, encoder_length: int) -> int:
        """Sequences in a routing group, of both stacks; 1 for a dense model."""
        return 1 if self.moe is None else sequences_per_group(self.moe.group_size, encoder_length)

    @property
    def encoder_pattern(self) -> tuple[bool, ...]:
        """For each encoder block, whether it is sparse."""
        return self._pattern("encoder_sparse_layers", self.num_encoder_layers)

    @property
    def decoder_pattern(self) -> tuple[bool, ...]:
        """For each decoder block, whether it is sparse."""
        return self._pattern("decoder_sparse_layers", self.num_decoder_layers)

    def _pattern(self, field: str, num_layers: int) -> tuple[bool, ...]:
        if self.moe is None:
            return (False,) * num_layers
        try:
            return sparse_layers(getattr(self, field), num_layers)
        except ValueError as error:
            raise ConfigError(f"TransformerConfig.{field}", str(error)) from None


def sparse_layers(layout: LayerLayout, num_layers: int) -> tuple[bool, ...]:
    """Tells which of ``num_layers`` blocks are sparse.

    Args:
      layout: ``k``: the last of every k blocks (1 for all of them, 2 for every other, as in the paper);
        ``"none"``; ``"first:n"`` or ``"last:n"``: the n blocks nearest the input or the output; or the indices
        of the sparse blocks.
      num_layers: blocks in the stack.

    Raises:
      ValueError: the layout is none of these, or names blocks that do not exist.
    """
    if isinstance(layout, tuple | list):
        wrong = [index for index in layout if not 0 <= index < num_layers]
        if wrong:
            raise ValueError(f"names block {wrong[0]}, but the blocks are 0 to {num_layers - 1}.")
        return tuple(index in layout for index in range(num_layers))
    if isinstance(layout, int):
        if not 1 <= layout <= num_layers:
            raise ValueError(f"must be from 1 to {num_layers} where it is a frequency, got {layout}.")
        return tuple(index % layout == layout - 1 for index in range(num_layers))
    end, _, count = layout.partition(":")
    if layout == "none":
        return (False,) * num_layers
    if end in ("first", "last") and count.isdigit() and 1 <= int(count) <= num_layers:
        chosen = range(int(count)) if end == "first" else range(num_layers - int(count), num_layers)
        return tuple(index in chosen for index in range(num_layers))
    raise ValueError(
        f"must be a frequency, 'none', 'first:n', 'last:n' (n from 1 to {num_layers}) or a tuple of indices, "
        f"got {layout!r}."
    )
