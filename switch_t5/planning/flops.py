"""Floating-point operations of a training step, by arithmetic: the model's, and those that one device executes."""

from __future__ import annotations

import dataclasses

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


def step_flops(workload: Workload) -> StepFlops:
    """Counts a whole step."""
    forward = _forward(workload)
    return StepFlops(3 * forward.total, _recomputed(workload, forward), workload.tokens)


def device_flops(workload: Workload, mesh: MeshShape) -> dict[str, float]:
    """Executed operations of one device in a step, by the dtype that is multiplied.

    All are shared out evenly, but for the router's: every device routes its own tokens over all experts, and those
    of one model partition do so alike.
    """
    forward = _forward(workload)
    times = workload.forward_passes + 2
    narrow = 3 * (forward.total - forward.router - forward.logits)
    narrow += _recomputed(workload, forward) - forward.router * (times - 3)
    rates = {"float32": 3 * forward.logits / mesh.size + times * forward.router / mesh.batch_shards}
    rates[workload.config.dtype] = rates.get(workload.config.dtype, 0) + narrow / mesh.size
    return rates


def _forward(workload: Workload) -> ForwardFlops:
    return forward_flops_by_kind(
        workload.config, workload.batch, workload.encoder_length, workload.decoder_length, train=True
    )


def _recomputed(workload: Workload, forward: ForwardFlops) -> int:
    match workload.config.remat_policy:
        case "none":
            return 0
        case "minimal":
            return forward.scores
        case "full":
            # A second forward pass of the blocks, without a dense feed-forward's last product, which nothing asks for.
            return forward.total - forward.logits - forward.feed_forward_out
