"""Sparse upcycling: a sparse model that begins as a dense one (Komatsuzaki et al. 2022, arXiv 2212.05055)."""

from __future__ import annotations

import dataclasses

from switch_t5.errors import ConfigError, check_types
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class UpcyclingConfig:
    """How experts come from a dense feed-forward: each is a copy of it.

    Attributes:
      expert_noise: standard deviation of a normal that is added to each copy, in root mean squares of the copied
        kernel; 0 leaves every expert the same, so that the router alone tells them apart.
      seed: of the noise, which no mesh changes.
      compensate_weights: multiplies the experts' output kernels by the inverse of :func:`even_weight`, so that the
        sparse layer begins with the dense one's output whatever weights its router gives: 1 for renormalised
        weights, E / k for raw ones. False copies the kernels as they are.
    """

    expert_noise: float = 0.0
    seed: int = 0
    compensate_weights: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("expert_noise", "seed"):
            if getattr(self, field) < 0:
                raise ConfigError(f"UpcyclingConfig.{field}", f"must not be negative, got {getattr(self, field)}.")

    def output_scale(self, config: MoEConfig) -> float:
        """What the output kernels of a sparse layer's experts are multiplied by."""
        return 1 / even_weight(config) if self.compensate_weights else 1.0


def even_weight(config: MoEConfig) -> float:
    """The sum of a token's combine weights where its router prefers no expert and no slot is missing.

    Of ``expert_choice`` it is the mean over tokens in training, for a token's number of experts varies.
    """
    router, share = config.router, 1 / config.num_experts
    match router.router:
        case "gshard_top_2" | "hash" | "random":
            return 1.0
        case "sigmoid_top_k":
            return router.weight_scale
        case "no_token_left_behind":
            return share
        case "expert_choice":
            return config.train_capacity_factor * share
        case _:
            return 1.0 if router.renormalize_weights else router.num_selected_experts * share


def check_upcycled(config: TransformerConfig) -> None:
    """Checks that a model can begin as a dense one.

    Raises:
      ConfigError: it is dense itself, or has parts that no dense model has a counterpart of.
    """
    layers = [moe for decoder in (False, True) for moe in config.sparse_configs(decoder=decoder)]
    if not layers:
        raise ConfigError(
            "TrainConfig.upcycling",
            "makes sparse layers of dense ones, and this model has none: give TransformerConfig.moe, or set None.",
        )
    if any(map(any, (config.encoder_attention_pattern, config.decoder_attention_pattern))):
        raise ConfigError(
            "TransformerConfig.attention_moe",
            "is not made from a dense checkpoint: upcycling copies feed-forwards alone; set it to None.",
        )
    if any(moe.num_shared_experts for moe in layers):
        raise ConfigError(
            "MoEConfig.num_shared_experts",
            "is not made from a dense checkpoint: every token would pass the dense feed-forward twice; set it to 0.",
        )
