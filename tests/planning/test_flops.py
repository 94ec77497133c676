"""Operations of a step and of a device, from those of a forward pass, which test_counts.py checks."""

from __future__ import annotations

import pytest

from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.planning.counts import forward_flops, forward_flops_by_kind
from switch_t5.planning.flops import device_flops, step_flops
from switch_t5.planning.workload import MeshShape
from tests.planning.workloads import BATCH, INPUTS, TARGETS, small_config, workload_of


def test_kinds_add_up_to_the_forward_pass_and_are_counted_by_hand():
    config = small_config()
    kinds = forward_flops_by_kind(config, BATCH, INPUTS, TARGETS)
    assert kinds.total == forward_flops(config, BATCH, INPUTS, TARGETS)
    tokens = BATCH * (INPUTS + TARGETS)  # One dense and one sparse feed-forward a stack.
    assert kinds.feed_forward == 2 * 2 * 16 * 32 * tokens
    assert kinds.feed_forward_out == kinds.feed_forward // 2
    assert kinds.router == 2 * 16 * 4 * tokens
    # Groups of 32 and 16 tokens: 10 and 5 slots for each of 4 experts.
    assert kinds.experts == 2 * 2 * 16 * 32 * BATCH * 4 * (10 + 5)
    assert kinds.logits == 2 * 16 * 384 * BATCH * TARGETS


def test_a_step_is_three_forward_passes_and_recomputation_most_of_a_fourth():
    forward = forward_flops_by_kind(small_config(), BATCH, INPUTS, TARGETS)
    plain, cheap, again = (
        step_flops(workload_of(small_config(remat_policy=policy))) for policy in ("none", "minimal", "full")
    )
    assert (plain.model, plain.recomputed) == (3 * forward.total, 0)
    assert again.model == cheap.model == plain.model
    # Queries by keys of two layers a stack, and of the decoder's cross-attention; 2 heads of 8.
    assert cheap.recomputed == 2 * 2 * 16 * BATCH * (INPUTS**2 + TARGETS**2 + INPUTS * TARGETS)
    assert again.recomputed == forward.total - forward.logits - forward.feed_forward_out
    assert plain.per_token == plain.model / (BATCH * (INPUTS + TARGETS))


@pytest.mark.parametrize(("remat_policy", "routed"), [("none", 3), ("minimal", 3), ("full", 4)])
def test_devices_share_all_work_but_the_routers(remat_policy: RematPolicy, routed: int):
    workload = workload_of(small_config(remat_policy=remat_policy))
    step = step_flops(workload)
    assert sum(device_flops(workload, MeshShape(2, 4, 1)).values()) == pytest.approx(step.executed / 8)
    router = forward_flops_by_kind(small_config(), BATCH, INPUTS, TARGETS).router
    twice = sum(device_flops(workload, MeshShape(2, 2, 2)).values())
    assert twice == pytest.approx(step.executed / 8 + routed * router / 8)


def test_router_and_logits_are_multiplied_in_float32():
    workload = workload_of(small_config(dtype="bfloat16"))
    forward = forward_flops_by_kind(small_config(), BATCH, INPUTS, TARGETS)
    found = device_flops(workload, MeshShape(8, 1, 1))
    assert found["float32"] == pytest.approx(3 * (forward.router + forward.logits) / 8)
    assert found["bfloat16"] == pytest.approx(3 * (forward.total - forward.router - forward.logits) / 8)
