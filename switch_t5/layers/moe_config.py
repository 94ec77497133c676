"""The numbers of a sparse layer, validated once."""

from __future__ import annotations

import dataclasses
from typing import Literal

from switch_t5.errors import ConfigError, check_types
from switch_t5.routing.balance import BalanceScope
from switch_t5.routing.capacity import GroupSize, Rounding, expert_capacity
from switch_t5.routing.dispatch import DispatchMethod
from switch_t5.routing.router import RouterConfig

Padding = Literal["ignored", "counted", "zeroed", "routed"]
Exchange = Literal["constraints", "all_to_all"]

_MOST_EXPERTS = 2**16
"""More than any model has (Switch-C: 2048); indices of slots stay far from the end of int32."""

MOST_CAPACITY_FACTOR = 1e6
"""More than any number of experts, with as many of which no token is ever dropped."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What a sparse layer has beyond a dense one.

    Attributes:
      num_experts: experts in each sparse layer.
      group_size: encoder tokens routed together, or ``sequence`` for each sequence on its own, see
        :func:`switch_t5.routing.capacity.group_shape`. A group's tokens compete for an expert's slots, so this
        is part of the model and never of the mesh.
      train_capacity_factor: slots per token in training.
      eval_capacity_factor: slots per token in evaluation.
      min_expert_capacity: the least slots of an expert for a group.
      capacity_rounding: ``floor`` (Mesh TensorFlow), ``round`` (T5X) or ``ceil``.
      expert_capacity: slots of an expert for a group, in training and evaluation, in place of factors, rounding
        and least (Hugging Face); None computes them.
      padding: ``ignored`` takes no slot and counts nowhere; ``counted`` takes no slot, but is among the tokens
        of the load-balance loss (Mesh TensorFlow); ``routed`` is a token as any other (Hugging Face);
        ``zeroed`` too, but its input is zero, so that it chooses the first expert (T5X).
      router: which router, and its own numbers.
      jitter_noise: the router's input is multiplied by U(1 - jitter, 1 + jitter) in training.
      router_input_dropout_rate: dropout of the router's input, another exploration of the paper's appendix C.
      router_dtype: ``float32`` is the paper's selective precision; ``bfloat16`` reproduces its table 2.
      balance_scope: whether the load-balance loss wants each ``group`` balanced, or the ``batch`` as a whole.
      num_shared_experts: experts beside the routed ones that every token passes (DeepSeekMoE, Dai et al. 2024).
      expert_dropout_rate: dropout inside the experts, in place of ``dropout_rate`` (table 4).
      exchange: how slots reach the devices of their experts and come back: by ``constraints`` on arrays, of which
        the compiler makes all-to-alls, or by an explicit ``all_to_all`` of each device, which adds a token's parts
        before it sums them over the model axis. The numbers are the same but for rounding.
      dispatch: ``gather``; ``einsum``, the reference; ``auto``, the fastest that computes what
        ``gather`` does; or ``dropless``, which has no capacity and drops nothing.
    """

    num_experts: int
    group_size: GroupSize = 4096
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_expert_capacity: int = 4
    capacity_rounding: Rounding = "floor"
    expert_capacity: int | None = None
    padding: Padding = "ignored"
    router: RouterConfig = dataclasses.field(default_factory=RouterConfig)
    jitter_noise: float = 1e-2
    router_input_dropout_rate: float = 0.0
    router_dtype: Literal["float32", "bfloat16"] = "float32"
    balance_scope: BalanceScope = "group"
    num_shared_experts: int = 0
    expert_dropout_rate: float = 0.0
    exchange: Exchange = "constraints"
    dispatch: DispatchMethod = "gather"

    def __post_init__(self) -> None:
        check_types(self)
        self._check_counts()
        self._check_capacity_factors()
        for field in ("jitter_noise", "router_input_dropout_rate", "expert_dropout_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be in [0, 1), got {getattr(self, field)}.")
        if self.padding == "counted" and self.router.router in ("expert_choice", "sinkhorn"):
            raise ConfigError(
                "MoEConfig.padding",
                f"'counted' has no meaning for the router {self.router.router!r}, whose choices depend on all tokens "
                "that are routed; give 'ignored' or 'routed'.",
            )
        if self.dispatch == "dropless":
            self._check_dropless()
        self.router.check_experts(self.num_experts)
        if not self.router.has_kernel:
            self._refuse_what_is_of_logits()

    def _check_counts(self) -> None:
        for field in ("num_experts", "group_size", "min_expert_capacity", "expert_capacity"):
            value = getattr(self, field)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"MoEConfig.{field}", f"must be at least 1, got {value}.")
        if self.num_shared_experts < 0:
            raise ConfigError("MoEConfig.num_shared_experts", f"must not be negative, got {self.num_shared_experts}.")
        for field in ("num_experts", "num_shared_experts"):
            value = getattr(self, field)
            if value > _MOST_EXPERTS:
                raise ConfigError(f"MoEConfig.{field}", f"must be at most {_MOST_EXPERTS}, got {value}.")

    def _refuse_what_is_of_logits(self) -> None:
        # Not jitter_noise, which is on by default and set by the conventions.
        for field, default in (("router_input_dropout_rate", 0.0), ("router_dtype", "float32")):
            if getattr(self, field) != default:
                raise ConfigError(
                    f"MoEConfig.{field}",
                    f"has no effect on the router {self.router.router!r}, which multiplies no input; "
                    f"leave it at {default!r}.",
                )

    def _check_capacity_factors(self) -> None:
        for field in ("train_capacity_factor", "eval_capacity_factor"):
            value = getattr(self, field)
            if value <= 0:
                raise ConfigError(f"MoEConfig.{field}", f"must be above 0, got {value}.")
            if value > MOST_CAPACITY_FACTOR:
                raise ConfigError(
                    f"MoEConfig.{field}",
                    f"must be at most {MOST_CAPACITY_FACTOR:.0e}, got {value}; num_experts, {self.num_experts}, is "
                    "room for every token.",
                )

    def _check_dropless(self) -> None:
        if self.expert_capacity is not None:
            raise ConfigError(
                "MoEConfig.expert_capacity", "has no effect on 'dropless', which has no capacity: leave it at None."
            )
        if self.exchange != "constraints":
            raise ConfigError(
                "MoEConfig.exchange",
                "has no effect on 'dropless', which exchanges no slots: leave it at 'constraints'.",
            )
        if self.router.needs_capacity:
            raise ConfigError(
                "MoEConfig.dispatch",
                f"'dropless' has no capacity, which {self.router.needs_capacity} is about; give 'gather'.",
            )

    @property
    def exchanges_by_itself(self) -> bool:
        """Whether each device sends and sums what is the experts' by itself, rather than as the compiler sees fit."""
        return self.dispatch == "dropless" or self.exchange == "all_to_all"

    @property
    def reads_padding(self) -> bool:
        """Whether it matters which experts padding chooses."""
        return self.padding in ("counted", "routed")

    def capacity(self, tokens: int, train: bool) -> int:
        """Slots of an expert for a group of so many tokens."""
        if self.expert_capacity is not None:
            return min(self.expert_capacity, tokens)
        return expert_capacity(
            tokens,
            self.num_experts,
            self.train_capacity_factor if train else self.eval_capacity_factor,
            min_expert_capacity=self.min_expert_capacity,
            rounding=self.capacity_rounding,
        )
