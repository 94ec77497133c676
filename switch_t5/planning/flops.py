"""Floating-point operations of a training step, by arithmetic: the model's, and those that one device executes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from switch_t5.planning.counts import ForwardFlops, forward_flops_by_kind
from switch_t5.planning.workload import MeshShape, Workload


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of matrix products in one step.

    Attributes:
      model: three forward passes: what is learned from, and what model FLOP utilisation counts.
      recomputed: what rematerialisation computes a second time.
      tokens: encoder and decoder tokens of a step.
    """

    model: int
    recomputed: int
    tokens: int

    @property
    def executed(self) -> int:
        """All that is multiplied."""
        return self.model + self.recomputed

    @property
    def per_token(self) -> float:
        """The model's operations a token."""
        return self.model / self.tokens


_SPLIT = {
    "attention": "heads",
    "attention_experts": "heads",
    "feed_forward": "mlp",
    "experts": "expert_mlp",
    "logits": "vocab",
}
"""The logical axis of each kind of product that devices share out, besides the batch; a router has none."""


def step_flops(workload: Workload) -> StepFlops:
    """Counts a whole step."""
    model = 3 * _forward(workload).total
    return StepFlops(model, sum(_executed(workload).values()) - model, workload.tokens)


def device_flops(workload: Workload, mesh: MeshShape) -> dict[str, float]:
    """Executed operations of one device in a step, by the dtype that is multiplied.

    Devices share out the batch, heads, hidden activations and the vocabulary, as the rules have it. What is not split
    several devices compute alike, such as routers, of which each device routes its own tokens over all experts.
    """
    rates: dict[str, float] = defaultdict(float)
    for kind, flops in _executed(workload).items():
        dtype = "float32" if kind in ("router", "logits") else workload.config.dtype
        shared_by = workload.parts(_SPLIT[kind], mesh) if kind in _SPLIT else 1
        rates[dtype] += flops / mesh.batch_shards / shared_by
    return dict(rates)


def _forward(workload: Workload) -> ForwardFlops:
    return forward_flops_by_kind(
        workload.config, workload.batch, workload.encoder_length, workload.decoder_length, train=True
    )


def _executed(workload: Workload) -> dict[str, int]:
    """All that is multiplied in a step, by kind: three forward passes, and what is computed again."""
    forward = _forward(workload)
    times = {kind: 3 * getattr(forward, kind) for kind in (*_SPLIT, "router")}
    match workload.config.remat_policy:
        case "minimal":
            times["attention"] += forward.scores
        case "full":
            for kind in times.keys() - {"logits"}:
                times[kind] += getattr(forward, kind)
            times["feed_forward"] -= forward.feed_forward_out  # Nothing asks for a block's last product again.
    return times
