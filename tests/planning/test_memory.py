"""Bytes of a device and of a host, by hand."""

from __future__ import annotations

import dataclasses

import pytest

from switch_t5.errors import ConfigError
from switch_t5.partitioning.rules import AXIS_RULES, AxisRules
from switch_t5.planning.counts import parameter_count
from switch_t5.planning.memory import DeviceMemory, device_memory, host_memory
from switch_t5.planning.workload import MeshShape
from tests.planning.workloads import BATCH, INPUTS, TARGETS, small_config, workload_of

DEVICES = 8


def large_enough_to_factor():
    return small_config(emb_dim=128, mlp_dim=256)


def test_on_one_device_parameters_are_whole():
    from switch_t5.model.functional import Model

    memory = device_memory(workload_of(small_config()), MeshShape(1, 1, 1))
    assert memory.parameters == 4 * parameter_count(Model(small_config()).abstract_params)
    assert memory.gradients == memory.parameters


def test_experts_are_split_over_their_axis_and_kernels_over_the_models():
    workload = workload_of(small_config())
    whole, spread, split = (
        device_memory(workload, mesh).parameters
        for mesh in (MeshShape(8, 1, 1), MeshShape(2, 4, 1), MeshShape(4, 1, 2))
    )
    experts = 2 * 4 * 2 * 16 * 32 * 4
    assert whole - spread == experts * 3 / 4
    # Norms (2 + 3 a layer and 1 a stack), and routers, are whole everywhere.
    not_split = (2 * 2 + 2 * 3 + 2) * 16 * 4 + 2 * 16 * 4 * 4
    assert split == (whole - not_split) / 2 + not_split


def test_fsdp_leaves_a_part_of_parameters_state_and_gradients_and_gathers_a_block_at_a_time():
    workload = workload_of(small_config())
    whole, parts = (device_memory(workload, mesh) for mesh in (MeshShape(8, 1, 1), MeshShape(1, 1, 1, 8)))
    biases = 2 * 2 * 32 * 4  # position biases have no dim of the residual stream
    assert parts.parameters == (whole.parameters - biases) / 8 + biases
    assert parts.gradients == parts.parameters and parts.optimizer == parts.parameters + 4
    assert (parts.activations, parts.logits, whole.gathered) == (whole.activations, whole.logits, 0)
    ends = 384 * 16 * 4 + 2 * 16 * 4  # embedding and final norms
    experts = 4 * 2 * 16 * 32 * 4
    routers, dense = 2 * 16 * 4 * 4, whole.parameters - biases - ends - 2 * experts - 2 * 16 * 4 * 4
    assert parts.gathered == 2 * (ends + experts + (dense + routers) / 4)


def test_parameters_lie_as_the_rules_of_a_run_say():
    rules = AxisRules.changed({}, {"embed": ("fsdp", "data")})
    plain, spread = (workload_of(small_config(), rules=one) for one in (AXIS_RULES, rules))
    along_fsdp, along_data = (
        device_memory(workload, mesh)
        for workload, mesh in ((plain, MeshShape(1, 1, 1, 8)), (spread, MeshShape(8, 1, 1)))
    )
    assert along_data == along_fsdp


def test_scanned_kernels_are_cast_before_the_loop_unless_they_are_gathered_in_it():
    config = small_config(dtype="bfloat16", scan_layers=True)
    mesh = MeshShape(2, 4, 1)
    heads, hidden = 16 * 2 * 8, 16 * 32
    # Of two layers a stack: four projections, of the decoder eight; a dense feed-forward and a fourth of four experts.
    kernels = 2 * 4 * heads + 2 * 8 * heads + 2 * (2 * hidden + 2 * hidden)
    assert device_memory(workload_of(config), mesh).cast == 2 * kernels
    assert device_memory(workload_of(config), MeshShape(1, 4, 1, 2)).cast == 0
    for changes in ({"scan_layers": False}, {"dtype": "float32"}):
        assert device_memory(workload_of(dataclasses.replace(config, **changes)), mesh).cast == 0


def test_adafactors_factors_are_split_as_what_is_left_of_a_parameters_axes():
    workload = workload_of(large_enough_to_factor())
    one = device_memory(workload, MeshShape(8, 1, 1)).optimizer
    spread = device_memory(workload, MeshShape(2, 4, 1)).optimizer
    # Each sparse layer holds, for each of two kernels of an expert, a row and a column.
    factors = 2 * 2 * 4 * (128 + 256) * 4
    assert one - spread == factors * 3 / 4
    # Whole second moments of small parameters are as large as they are.
    small = device_memory(workload_of(small_config()), MeshShape(8, 1, 1))
    assert small.optimizer == small.parameters + 4  # and a count


def test_activations_are_of_a_microbatch_and_gradients_then_there_twice():
    whole, half = (device_memory(workload_of(small_config(), microbatches=n), MeshShape(2, 2, 2)) for n in (1, 2))
    assert half.logits == whole.logits / 2 == 2 * BATCH * TARGETS / 4 / 2 * 384 / 2 * 4
    assert half.activations == pytest.approx(whole.activations / 2, abs=1)
    assert half.dispatch_buffers == whole.dispatch_buffers / 2
    assert half.gradients == 2 * whole.gradients


def test_dispatch_buffers_hold_each_slot_on_its_way_there_and_back():
    memory = device_memory(workload_of(small_config()), MeshShape(2, 4, 1))
    encoder, decoder = (BATCH / DEVICES * 4 * capacity * 16 * 2 * 4 for capacity in (10, 5))
    # Kept of both layers, and the larger one's gradients.
    assert memory.dispatch_buffers == encoder + decoder + encoder


def test_recomputation_keeps_a_blocks_input_and_one_block():
    def memory(policy: str, layers: int = 12) -> DeviceMemory:
        workload = workload_of(small_config(num_encoder_layers=layers, remat_policy=policy))
        return device_memory(workload, MeshShape(8, 1, 1))

    plain, again, deeper = memory("none"), memory("full"), memory("full", 14)
    assert again.activations < plain.activations / 3
    assert deeper.activations - again.activations == 2 * BATCH / DEVICES * INPUTS * 16 * 4


def test_recomputation_of_what_is_cheap_keeps_what_products_gave():
    def memory(policy: str, layers: int) -> DeviceMemory:
        workload = workload_of(small_config(num_encoder_layers=layers, remat_policy=policy))
        return device_memory(workload, MeshShape(8, 1, 1))

    two_more = memory("minimal", 14).activations - memory("minimal", 12).activations
    tokens = BATCH // 8 * INPUTS
    # Of a dense and a sparse block: the stream before attention and feed-forward, queries, keys, values and context;
    # hidden activations; and the router's logits.
    assert two_more == 4 * (2 * tokens * (2 * 16 + 4 * 16) + tokens * 32 + BATCH // 8 * 4 * 10 * 32 + tokens * 4)
    assert two_more < memory("none", 14).activations - memory("none", 12).activations
    buffers = [memory(policy, 12).dispatch_buffers for policy in ("none", "minimal", "full")]
    assert buffers[0] == buffers[1] > buffers[2]


def test_a_mesh_that_does_not_divide_a_parameter_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="'heads' of size 2, which 4 partitions along 'model' do not divide"):
        device_memory(workload_of(small_config()), MeshShape(2, 1, 4))


def test_a_host_loads_each_part_that_its_devices_hold_once():
    workload = workload_of(small_config())
    state = workload.params.nbytes + workload.opt_state.nbytes
    assert host_memory(workload, MeshShape(8, 1, 1), 8).loading == state
    # All parts are on one host of eight; and where two devices share out the experts, half of them on one of one.
    assert host_memory(workload, MeshShape(4, 2, 1), 8).saving == state
    alone = device_memory(workload, MeshShape(4, 2, 1))
    assert host_memory(workload, MeshShape(4, 2, 1), 1).loading == alone.parameters + alone.optimizer


def test_all_at_once_is_the_sum_of_what_is_told():
    memory = device_memory(workload_of(small_config()), MeshShape(2, 2, 2))
    assert memory.total == sum(dataclasses.astuple(memory))
