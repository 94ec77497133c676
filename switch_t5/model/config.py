"""The numbers that define a model, validated once."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from switch_t5.errors import ConfigError, check_types, closest
from switch_t5.layers.attention import PROJECTIONS, Projection
from switch_t5.layers.initializers import Initialization
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.layers.switch_attention import ExpertDtype
from switch_t5.routing.capacity import GroupSize, sequences_per_group

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
      relpos_per_layer: every block has a position bias of its own, as T5X's scanned models have.
      dtype: of activations and matrix multiplications; parameters are float32.
      initialization: ``paper`` (truncated normal of scale 0.1), ``t5x`` or ``t5x_switch`` (as the released dense
        and Switch models), see :mod:`switch_t5.layers.initializers`.
      scan_layers: compile one period of the layer pattern and scan it over the depth.
      remat_policy: what of a block the backward pass computes again: ``none``, ``minimal`` (no product but that of
        queries and keys, and nothing that devices send) or ``full`` (everything).
      moe: the sparse layers; None for a dense model.
      decoder_moe: the decoder's, where they differ from the encoder's; ``group_size`` is one for both.
      encoder_sparse_layers: which encoder blocks are sparse, see :func:`sparse_layers`.
      decoder_sparse_layers: the same for the decoder.
      attention_moe: the sparse projections of self-attention, see :mod:`switch_t5.layers.switch_attention`. Where a
        stack has sparse feed-forwards too, both have as many experts, groups of one size, and treat padding alike.
      attention_sparse_projections: which projections are sparse: of ``query``, ``key``, ``value`` and ``out``.
      attention_expert_dtype: of the matrix multiplications of the sparse projections, whatever ``dtype`` is.
      encoder_sparse_attention: the encoder blocks with sparse self-attention, as ``encoder_sparse_layers``.
      decoder_sparse_attention: the same for the decoder.
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
    relpos_per_layer: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    initialization: Initialization = "paper"
    scan_layers: bool = False
    remat_policy: RematPolicy = "none"
    moe: MoEConfig | None = None
    decoder_moe: MoEConfig | None = None
    encoder_sparse_layers: LayerLayout = 2
    decoder_sparse_layers: LayerLayout = 2
    attention_moe: MoEConfig | None = None
    attention_sparse_projections: tuple[str, ...] = ("query", "key", "value")
    attention_expert_dtype: ExpertDtype = "float32"
    encoder_sparse_attention: LayerLayout = "none"
    decoder_sparse_attention: LayerLayout = "none"

    def __post_init__(self) -> None:
        for field in ("mlp_activations", "attention_sparse_projections"):
            if not isinstance(getattr(self, field), str):  # Which would come apart in letters.
                object.__setattr__(self, field, tuple(getattr(self, field)))
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
        self._check_positions()
        if self.decoder_moe is not None and self.moe is None:
            raise ConfigError(
                "TransformerConfig.decoder_moe",
                "has no effect without TransformerConfig.moe, of which it is the decoder's variant; for sparse layers "
                "in the decoder alone set moe, and encoder_sparse_layers = 'none'.",
            )
        if self.decoder_moe is not None and not any(self.decoder_pattern):
            raise ConfigError(
                "TransformerConfig.decoder_moe",
                "has no effect: no block of the decoder has a sparse feed-forward; set "
                "TransformerConfig.decoder_sparse_layers, or decoder_moe = None.",
            )
        self._check_attention()
        for decoder in (False, True):
            self._check_sparse_layers(decoder=decoder)

    @property
    def activation_dtype(self) -> jnp.dtype:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    def _check_positions(self) -> None:
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

    def _check_attention(self) -> None:
        projections = self.attention_sparse_projections
        for name in projections:
            if name not in PROJECTIONS:
                raise ConfigError(
                    "TransformerConfig.attention_sparse_projections",
                    f"must be some of 'query', 'key', 'value', 'out', got {name!r}.{closest(name, PROJECTIONS)}",
                )
        if not projections or len(set(projections)) < len(projections):
            raise ConfigError(
                "TransformerConfig.attention_sparse_projections",
                f"must be some of 'query', 'key', 'value', 'out', each once, got {projections}.",
            )
        patterns = (self.encoder_attention_pattern, self.decoder_attention_pattern)
        if self.attention_moe is None:
            for field in ("attention_sparse_projections", "attention_expert_dtype"):
                if getattr(self, field) != getattr(type(self), field):
                    raise ConfigError(
                        f"TransformerConfig.{field}",
                        f"has no effect without TransformerConfig.attention_moe; leave it at "
                        f"{getattr(type(self), field)!r}, or give attention_moe = @attention/MoEConfig().",
                    )
            return
        if not any(map(any, patterns)):
            raise ConfigError(
                "TransformerConfig.attention_moe",
                "has no effect: no block has sparse attention; set TransformerConfig.encoder_sparse_attention or "
                "decoder_sparse_attention, or attention_moe = None.",
            )
        for field in ("num_shared_experts", "expert_dropout_rate"):
            if value := getattr(self.attention_moe, field):
                raise ConfigError(
                    "TransformerConfig.attention_moe",
                    f"has {field} {value}, which is of feed-forward experts, and those of attention are single "
                    f"matrices: set it to 0, where attention_moe = @attention/MoEConfig() by "
                    f"attention/MoEConfig.{field} = 0.",
                )

    def _check_sparse_layers(self, *, decoder: bool) -> None:
        """Checks that one stack's sparse layers fit together, and that a decoder's see no later token."""
        configs = self.sparse_configs(decoder=decoder)
        stack = "decoder" if decoder else "encoder"
        for config in configs:
            field = "attention_moe" if config is self.attention_moe else "decoder_moe"
            if config.group_size != self.group_size:
                whose = "the encoder's" if field == "decoder_moe" else "that of TransformerConfig.moe"
                raise ConfigError(
                    f"TransformerConfig.{field}",
                    f"has group_size {config.group_size}, but all sparse layers of both stacks group the same "
                    f"sequences: give it {whose}, {self.group_size}.",
                )
            if decoder:
                _check_causal(config, "moe" if config is self.moe else field)
        for field in ("num_experts", "padding"):
            values = [getattr(config, field) for config in configs]
            if len(set(values)) > 1:
                raise ConfigError(
                    "TransformerConfig.attention_moe",
                    f"has {field} {values[1]!r} and the {stack}'s sparse feed-forwards {values[0]!r}, but their "
                    "statistics are kept together: give both the same.",
                )

    def moe_of(self, *, decoder: bool) -> MoEConfig | None:
        """The sparse feed-forwards of one stack; None where the model has none."""
        return self.decoder_moe if decoder and self.decoder_moe is not None else self.moe

    @property
    def sparse_projections(self) -> tuple[Projection, ...]:
        """``attention_sparse_projections`` in the order of all projections."""
        return tuple(name for name in PROJECTIONS if name in self.attention_sparse_projections)

    def patterns(self, *, decoder: bool) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """For each block of one stack, whether its feed-forward is sparse, and whether its self-attention is."""
        if decoder:
            return self.decoder_pattern, self.decoder_attention_pattern
        return self.encoder_pattern, self.encoder_attention_pattern

    def sparse_configs(self, *, decoder: bool) -> tuple[MoEConfig, ...]:
        """What the blocks of one stack have of sparse layers: feed-forwards, then attention; empty for dense blocks."""
        feed_forward, attention = self.patterns(decoder=decoder)
        kinds = ((self.moe_of(decoder=decoder), feed_forward), (self.attention_moe, attention))
        return tuple(config for config, pattern in kinds if config is not None and any(pattern))

    @property
    def group_size(self) -> GroupSize | None:
        """Encoder tokens routed together, in all sparse layers; None for a dense model."""
        configs = (*self.sparse_configs(decoder=False), *self.sparse_configs(decoder=True))
        return configs[0].group_size if configs else None

    def sequences_per_group(self, encoder_length: int) -> int:
        """Sequences in a routing group, of both stacks; 1 for a dense model."""
        return 1 if self.group_size is None else sequences_per_group(self.group_size, encoder_length)

    @property
    def encoder_pattern(self) -> tuple[bool, ...]:
        """For each encoder block, whether its feed-forward is sparse."""
        return self._pattern("encoder_sparse_layers", self.num_encoder_layers, self.moe)

    @property
    def decoder_pattern(self) -> tuple[bool, ...]:
        """For each decoder block, whether its feed-forward is sparse."""
        return self._pattern("decoder_sparse_layers", self.num_decoder_layers, self.moe)

    @property
    def encoder_attention_pattern(self) -> tuple[bool, ...]:
        """For each encoder block, whether its self-attention is sparse."""
        return self._attention_pattern("encoder_sparse_attention", self.num_encoder_layers)

    @property
    def decoder_attention_pattern(self) -> tuple[bool, ...]:
        """For each decoder block, whether its self-attention is sparse."""
        return self._attention_pattern("decoder_sparse_attention", self.num_decoder_layers)

    def _attention_pattern(self, field: str, num_layers: int) -> tuple[bool, ...]:
        layout = getattr(self, field)
        if self.attention_moe is None and layout not in ("none", (), []):
            raise ConfigError(
                "TransformerConfig.attention_moe",
                f"is missing, but {field} is {layout!r}: give attention_moe = @MoEConfig(), or {field} = 'none'.",
            )
        return self._pattern(field, num_layers, self.attention_moe)

    def _pattern(self, field: str, num_layers: int, moe: MoEConfig | None) -> tuple[bool, ...]:
        if moe is None:
            return (False,) * num_layers
        try:
            return sparse_layers(getattr(self, field), num_layers)
        except ValueError as error:
            raise ConfigError(f"TransformerConfig.{field}", str(error)) from None


def _check_causal(config: MoEConfig, field: str) -> None:
    """Refuses a router that looks ahead in a decoder, which ``TransformerConfig``'s ``field`` gave it."""
    router = config.router
    if router.sees_future_tokens and not router.allow_future_tokens:
        what = "batch_prioritized" if router.batch_prioritized else f"the router {router.router!r}"
        why = f"{what} chooses a token's experts by later tokens, which leaks the future into training and has no "
        why += "meaning in decoding"
        if field != "moe":
            raise ConfigError(
                f"TransformerConfig.{field}",
                f"cannot serve a decoder: {why}; give its RouterConfig another router, or allow_future_tokens = True.",
            )
        raise ConfigError(
            "RouterConfig.router" if not router.batch_prioritized else "RouterConfig.batch_prioritized",
            f"cannot serve a decoder: {why}; give TransformerConfig.decoder_moe another router, or set "
            "RouterConfig.allow_future_tokens = True.",
        )


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
