"""Bytes on the wire, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.partitioning.rules import AxisRules
from switch_t5.planning.communication import Transfer, ring_bytes, total_sent, transfers
from switch_t5.planning.workload import MeshShape
from tests.planning.workloads import BATCH, INPUTS, TARGETS, small_config, workload_of


def by_purpose(mesh: MeshShape, merged: bool = False, **changes) -> dict[str, Transfer]:
    return {one.purpose: one for one in transfers(workload_of(small_config(**changes)), mesh, merged=merged)}


def test_rings_send_what_they_must():
    assert ring_bytes("all-reduce", 4, 100) == 150
    assert ring_bytes("all-gather", 4, 100) == ring_bytes("all-to-all", 4, 100) == 75
    assert ring_bytes("collective-permute", 4, 100) == 100
    assert ring_bytes("all-reduce", 1, 100) == 0


def test_one_device_sends_nothing():
    assert transfers(workload_of(small_config()), MeshShape(1, 1, 1), merged=False) == []


def test_tokens_go_to_their_experts_and_back_in_both_passes():
    sent = by_purpose(MeshShape(2, 4, 1))["tokens to experts and back"]
    slots = BATCH // 8 * 4 * (10 + 5)  # of a device's sequences
    assert (sent.axis, sent.collective) == ("expert", "all-to-all")
    assert sent.sent == slots * 16 * 4 * 2 * 2 * 3 / 4
    assert sent.minimum == sent.sent
    for policy, times in (("minimal", 1), ("full", 1.5)):
        again = by_purpose(MeshShape(2, 4, 1), remat_policy=policy)["tokens to experts and back"]
        assert again.sent == again.minimum == times * sent.sent


def test_slots_beyond_the_capacity_factor_are_told_apart():
    added = "slots that rounding and the least capacity add"
    # Capacity 1.25 of 48 tokens, where no group rounds.
    plain = by_purpose(MeshShape(2, 4, 1))
    assert added not in plain
    found = by_purpose(MeshShape(2, 4, 1), moe=MoEConfig(4, group_size=32, min_expert_capacity=8))
    sent = found["tokens to experts and back"]
    assert sent == plain["tokens to experts and back"]
    assert (found[added].sent, found[added].minimum) == (sent.sent * (8 - 5) / (10 + 5), 0)


def test_gradients_are_summed_over_devices_with_the_same_part():
    found = by_purpose(MeshShape(2, 4, 1))
    experts, dense = found["gradients of experts"], found["gradients of dense layers"]
    assert (experts.axis, dense.axis) == ("data", "data+expert")
    assert experts.sent == experts.minimum == ring_bytes("all-reduce", 2, 2 * 1 * 2 * 16 * 32 * 4)
    biases = 2 * 2 * 32 * 4  # which are summed by distance
    params = workload_of(small_config()).params.nbytes - 2 * 4 * 2 * 16 * 32 * 4 - biases
    assert dense.minimum == pytest.approx(ring_bytes("all-reduce", 8, params))
    # Each of the embedding's three uses has a gradient of its own.
    assert dense.sent - dense.minimum == pytest.approx(ring_bytes("all-reduce", 8, 2 * 384 * 16 * 4))
    untied = by_purpose(MeshShape(2, 4, 1), tied_logits=False)["gradients of dense layers"]
    assert untied.sent == dense.sent


def test_where_experts_are_whole_everywhere_they_are_summed_as_others():
    found = by_purpose(MeshShape(8, 1, 1))
    assert found["gradients of experts"].axis == found["gradients of dense layers"].axis == "data"
    assert found["gradients of experts"].minimum == ring_bytes("all-reduce", 8, 2 * 4 * 2 * 16 * 32 * 4)
    assert "tokens to experts and back" not in found


def test_what_lies_in_parts_is_gathered_in_each_pass_and_its_gradient_dealt_out():
    mesh, plain = MeshShape(1, 1, 1, 8), MeshShape(8, 1, 1)
    found, whole = by_purpose(mesh, merged=True), by_purpose(plain, merged=True)
    biases = 2 * 2 * 32 * 4  # position biases [heads, buckets], whole everywhere
    params = workload_of(small_config()).params.nbytes - biases
    embedding = 384 * 16 * 4
    ends = embedding + 2 * 16 * 4  # and two final norms
    assert found["parameters"].collective == "all-gather"
    assert found["parameters"].minimum == found["parameters"].sent == ring_bytes("all-gather", 8, 2 * params - ends)
    assert found["gradients of experts"].collective == "reduce-scatter"
    assert found["gradients of experts"].sent == whole["gradients of experts"].sent / 2
    # A compiler that joins nothing sums whole gradients.
    assert by_purpose(mesh)["gradients of experts"].sent == by_purpose(plain)["gradients of experts"].sent


@pytest.mark.parametrize("merged", [False, True])
def test_parts_of_which_others_have_terms_are_summed_whole_and_could_be_dealt_out_first(merged: bool):
    found = transfers(workload_of(small_config()), MeshShape(2, 2, 1, 2), merged=merged)
    (experts,) = [one for one in found if one.purpose == "gradients of experts"]
    assert (experts.axis, experts.collective) == ("data+fsdp", "all-reduce")
    kernels = 2 * 4 * 2 * 16 * 32 * 4 / 2  # of the half of the experts that a device's neighbours along expert lack
    assert experts.sent == ring_bytes("all-reduce", 4, kernels)
    dealt_out = ring_bytes("reduce-scatter", 2, kernels) + ring_bytes("all-reduce", 2, kernels / 2)
    assert experts.minimum == dealt_out < experts.sent


def test_what_the_rules_leave_whole_is_not_summed():
    mesh = MeshShape(4, 1, 2)
    rules = AxisRules.changed({"vocab": None, "heads": None}, {})
    found = {one.purpose for one in transfers(workload_of(small_config(), rules=rules), mesh, merged=True)}
    assert set(by_purpose(mesh, merged=True)) - found == {"attention", "cross-attention", "embedding", "logits"}


def test_position_biases_are_summed_once_for_all_layers_by_distance():
    mesh = MeshShape(8, 1, 1)
    sent = by_purpose(mesh)["gradients of position biases"]
    by_distance, by_bucket = 2 * 2 * (INPUTS + TARGETS) * 4, 2 * 2 * 32 * 4
    assert sent.sent == ring_bytes("all-reduce", 8, by_distance)
    # The decoder's are no more than buckets.
    assert sent.minimum == ring_bytes("all-reduce", 8, by_bucket / 2 + min(by_bucket / 2, 2 * 2 * TARGETS * 4))
    assert by_purpose(mesh, relpos_per_layer=True)["gradients of position biases"].sent == 2 * sent.sent


def test_what_is_split_over_the_model_axis_is_summed_over_it():
    found = by_purpose(MeshShape(4, 1, 2), moe=None)
    row = 16 * 4 * BATCH // 4
    both = row * (INPUTS + TARGETS)
    # Of each of two layers the output, and the gradients of queries, keys and values.
    assert found["attention"].sent == ring_bytes("all-reduce", 2, 2 * 4 * both)
    assert found["attention"].minimum == ring_bytes("all-reduce", 2, 2 * 2 * both)
    assert found["feed-forward"].sent == found["feed-forward"].minimum == ring_bytes("all-reduce", 2, 2 * 2 * both)
    cross = 2 * 2 * row * TARGETS + row * INPUTS  # Of two layers, and once the encoder's output.
    assert found["cross-attention"].sent == found["cross-attention"].minimum == ring_bytes("all-reduce", 2, cross)
    assert all(one.axis == "model" for name, one in found.items() if not name.startswith("gradients"))


def test_without_capacity_tokens_are_gathered_and_sums_dealt_out():
    moe = MoEConfig(4, group_size=32, dispatch="dropless")
    found = transfers(workload_of(small_config(moe=moe)), MeshShape(2, 4, 1), merged=False)
    sent = {one.collective: one.sent for one in found if one.axis == "expert"}
    tokens = BATCH // 8 * (INPUTS + TARGETS)
    assert sent == dict.fromkeys(("all-gather", "reduce-scatter"), 2 * 3 * tokens * 16 * 4)


def test_an_explicit_all_to_all_sums_tokens_and_their_weights_over_the_model_axis():
    moe = MoEConfig(4, group_size=32, exchange="all_to_all")
    found = by_purpose(MeshShape(2, 2, 2), moe=moe)
    # Of one sparse layer a stack the output, the gradient of its input, and that of a weight a token.
    row = (16 + 16 + 1) * 4
    assert found["experts"].sent == ring_bytes("all-reduce", 2, BATCH // 4 * (INPUTS + TARGETS) * row)
    by_constraints = by_purpose(MeshShape(2, 2, 2))
    assert found["tokens to experts and back"] == by_constraints["tokens to experts and back"]


def test_sparse_projections_send_what_they_take_and_give():
    moe = MoEConfig(4, group_size=32)
    changes = {"attention_moe": moe, "encoder_sparse_attention": 1, "decoder_sparse_attention": 1}
    plain, more = (by_purpose(MeshShape(2, 4, 1), **some)["tokens to experts and back"] for some in ({}, changes))
    # Queries take 16 and give 2 x 8; keys and values take 16 and give 2 x 2 x 8; two layers a stack.
    slots = BATCH // 8 * 4 * (10 + 5)
    assert more.sent - plain.sent == 2 * slots * 4 * ((16 + 16) + (16 + 32)) * 2 * 3 / 4


def test_microbatches_send_gradients_again_and_activations_once():
    once, twice = (
        {
            one.purpose: one
            for one in transfers(workload_of(small_config(), microbatches=n), MeshShape(2, 2, 2), merged=False)
        }
        for n in (1, 2)
    )
    assert twice["gradients of experts"].sent == 2 * once["gradients of experts"].sent
    assert twice["gradients of experts"].minimum == once["gradients of experts"].minimum
    assert twice["attention"] == once["attention"]


def test_nothing_is_less_than_the_least():
    config = small_config(remat_policy="full", mlp_activations=("gelu", "linear"), tied_logits=False)
    for mesh in (MeshShape(2, 2, 2), MeshShape(8, 1, 1), MeshShape(1, 4, 2), MeshShape(4, 1, 2)):
        found = transfers(workload_of(config), mesh, merged=False)
        assert all(one.sent >= one.minimum * (1 - 1e-9) for one in found)
        assert total_sent(found) == pytest.approx(sum(dataclasses.asdict(one)["sent"] for one in found))


def test_a_compiler_that_adds_first_sends_less():
    mesh = MeshShape(2, 2, 2)
    apart, merged = (by_purpose(mesh, merged, dtype="bfloat16") for merged in (False, True))
    # Experts' gradients in bfloat16; one sum for queries, keys and values in place of three.
    assert merged["gradients of experts"].sent == apart["gradients of experts"].sent / 2
    assert merged["attention"].sent == merged["attention"].minimum == apart["attention"].sent / 2
    for name in ("tokens to experts and back", "feed-forward", "experts", "embedding", "logits"):
        assert merged[name] == apart[name]
