"""What a checkpoint's arrays tell of a model: the sizes by which parameters are named and shaped."""

from __future__ import annotations

import dataclasses
from typing import Any

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig

STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The part of a :class:`TransformerConfig` that decides which parameters there are.

    Attributes:
      vocab_size: rows of the embedding.
      emb_dim: size of the residual stream.
      num_heads: attention heads.
      head_dim: size of one head.
      mlp_dim: hidden size of a feed-forward.
      relpos_num_buckets: buckets of the relative position bias.
      encoder: for each encoder block, whether its feed-forward is sparse.
      decoder: the same of the decoder.
      encoder_experts: experts of a sparse layer; 0 where the stack has none.
      decoder_experts: the same of the decoder.
      gated: whether feed-forwards have two input matrices.
      tied_logits: whether logits come from the embedding.
      relpos_per_layer: whether every block has a position bias of its own.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    relpos_num_buckets: int
    encoder: tuple[bool, ...]
    decoder: tuple[bool, ...]
    encoder_experts: int
    decoder_experts: int
    gated: bool
    tied_logits: bool
    relpos_per_layer: bool = False

    @classmethod
    def of(cls, config: TransformerConfig) -> Architecture:
        """The architecture of a configuration."""
        experts = {
            stack: moe.num_experts if (moe := config.moe_of(decoder=stack == "decoder")) else 0 for stack in STACKS
        }
        return cls(
            vocab_size=config.vocab_size,
            emb_dim=config.emb_dim,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            mlp_dim=config.mlp_dim,
            relpos_num_buckets=config.relpos_num_buckets,
            encoder=config.encoder_pattern,
            decoder=config.decoder_pattern,
            encoder_experts=experts["encoder"] if any(config.encoder_pattern) else 0,
            decoder_experts=experts["decoder"] if any(config.decoder_pattern) else 0,
            gated=len(config.mlp_activations) == 2,
            tied_logits=config.tied_logits,
            relpos_per_layer=config.relpos_per_layer,
        )

    @property
    def activations(self) -> tuple[str, ...]:
        """Those of every released model with such feed-forwards; no array tells which a model has."""
        return ("gelu", "linear") if self.gated else ("relu",)

    def config(self, moe: MoEConfig | None = None) -> TransformerConfig:
        """A configuration of this architecture, in float32.

        Args:
          moe: the sparse layers, for a model that has some; its experts are as many as the architecture's.
        """
        return TransformerConfig(
            vocab_size=self.vocab_size,
            emb_dim=self.emb_dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            num_encoder_layers=len(self.encoder),
            num_decoder_layers=len(self.decoder),
            mlp_activations=self.activations,
            tied_logits=self.tied_logits,
            relpos_num_buckets=self.relpos_num_buckets,
            relpos_per_layer=self.relpos_per_layer,
            moe=moe if self.is_sparse else None,
            encoder_sparse_layers=_layout(self.encoder),
            decoder_sparse_layers=_layout(self.decoder),
        )

    @property
    def is_sparse(self) -> bool:
        """Whether any feed-forward is."""
        return any(self.encoder + self.decoder)

    def blocks(self, stack: str) -> tuple[bool, ...]:
        """For each block of a stack, whether its feed-forward is sparse."""
        return self.encoder if stack == "encoder" else self.decoder

    def experts(self, stack: str) -> int:
        """Experts in each sparse layer of a stack."""
        return self.encoder_experts if stack == "encoder" else self.decoder_experts

    def size(self, axis: str, stack: str) -> int:
        """The size of a parameter's axis."""
        if axis == "expert":
            return self.experts(stack)
        fields = {
            "vocab": "vocab_size",
            "embed": "emb_dim",
            "heads": "num_heads",
            "kv": "head_dim",
            "mlp": "mlp_dim",
            "relpos_buckets": "relpos_num_buckets",
        }
        return getattr(self, fields[axis])

    @property
    def dense(self) -> Architecture:
        """The same sizes without sparse layers."""
        encoder, decoder = ((False,) * len(self.blocks(stack)) for stack in STACKS)
        return dataclasses.replace(self, encoder=encoder, decoder=decoder, encoder_experts=0, decoder_experts=0)

    def differences(self, wanted: Architecture) -> list[str]:
        """How this architecture differs from the one that a run wants, a clause a field, in gin's names."""
        mine, theirs = self.gin_values(), wanted.gin_values()
        return [
            f"{name} is {mine.get(name)!r} in the checkpoint and {theirs.get(name)!r} here"
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]

    def gin_values(self) -> dict[str, Any]:
        """Gin parameters that describe this architecture."""
        values: dict[str, Any] = {
            "TransformerConfig.vocab_size": self.vocab_size,
            "TransformerConfig.emb_dim": self.emb_dim,
            "TransformerConfig.num_heads": self.num_heads,
            "TransformerConfig.head_dim": self.head_dim,
            "TransformerConfig.mlp_dim": self.mlp_dim,
            "TransformerConfig.num_encoder_layers": len(self.encoder),
            "TransformerConfig.num_decoder_layers": len(self.decoder),
            "TransformerConfig.mlp_activations": self.activations,
            "TransformerConfig.tied_logits": self.tied_logits,
            "TransformerConfig.relpos_num_buckets": self.relpos_num_buckets,
        }
        if self.relpos_per_layer:
            values["TransformerConfig.relpos_per_layer"] = True
        for stack in STACKS:
            if self.is_sparse:
                values[f"TransformerConfig.{stack}_sparse_layers"] = _layout(self.blocks(stack))
        experts = {self.experts(stack) for stack in STACKS} - {0}
        if len(experts) == 1:
            values["MoEConfig.num_experts"] = experts.pop()
        elif experts:
            values["encoder/MoEConfig.num_experts"] = self.encoder_experts
            values["decoder/MoEConfig.num_experts"] = self.decoder_experts
        return values

    def gin(self) -> str:
        """The same as gin text, to stand in a file or after the flags of a command."""
        lines = [f"{name} = {value!r}" for name, value in self.gin_values().items()]
        if self.encoder_experts and self.decoder_experts and self.encoder_experts != self.decoder_experts:
            lines += [
                "TransformerConfig.moe = @encoder/MoEConfig()",
                "TransformerConfig.decoder_moe = @decoder/MoEConfig()",
            ]
        elif self.encoder_experts or self.decoder_experts:
            lines.append("TransformerConfig.moe = @MoEConfig()")
        return "\n".join(lines) + "\n"


def _layout(pattern: tuple[bool, ...]) -> int | str | tuple[int, ...]:
    """The shortest way to say which blocks are sparse, see :func:`switch_t5.model.config.sparse_layers`."""
    if not any(pattern):
        return "none"
    for every in range(1, len(pattern) + 1):
        if pattern == tuple(index % every == every - 1 for index in range(len(pattern))):
            return every
    return tuple(index for index, sparse in enumerate(pattern) if sparse)
