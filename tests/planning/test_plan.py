"""Which meshes fit, in which order, and what would."""

from __future__ import annotations

import dataclasses

import pytest

from switch_t5.errors import ConfigError
from switch_t5.layers.rematerialization import RematPolicy
from switch_t5.planning.chips import TPUS, Topology
from switch_t5.planning.plan import make_plan, mesh_shapes, plan_mesh
from switch_t5.planning.workload import MeshShape, Workload
from tests.planning.workloads import small_config, workload_of

V5E = Topology("v5e:2x4", TPUS["v5e"], 8)


def no_check(workload: Workload, mesh: MeshShape) -> None:
    """Lets every mesh pass."""


def with_memory(nbytes: int) -> Topology:
    return dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, memory=nbytes))


def test_meshes_are_all_ways_to_divide_the_devices_that_experts_and_heads_allow():
    found = set(mesh_shapes(workload_of(small_config()), 8))  # 4 experts, 2 heads
    whole = {mesh[:3] for mesh in found if mesh.fsdp == 1}
    assert whole == {(8, 1, 1), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2)}
    assert {mesh[:3] for mesh in mesh_shapes(workload_of(small_config(moe=None)), 8)} >= {(8, 1, 1), (4, 1, 2)}
    # What experts and model leave is data or fsdp: 8, 4, 2, 4, 2 and 1 in as many ways as they have divisors.
    assert len(found) == 4 + 3 + 2 + 3 + 2 + 1 and all(mesh.size == 8 for mesh in found)


def test_meshes_that_fit_come_best_first():
    plan = make_plan(workload_of(small_config()), V5E, no_check)
    assert len(plan.fitting) == 15 and not plan.too_large and not plan.refused and plan.change is None
    assert [one.rank for one in plan.fitting] == sorted(one.rank for one in plan.fitting)


def test_the_steps_time_is_the_longest_of_three():
    workload = workload_of(small_config())
    one = plan_mesh(workload, V5E, MeshShape(2, 2, 2))
    assert one.compute_seconds == pytest.approx(one.executed_flops / 197e12)
    assert one.memory_seconds == pytest.approx(one.memory_bytes / 819e9)
    assert one.communication_seconds >= sum(transfer.sent for transfer in one.transfers) / 200e9 * (1 - 1e-9)
    slow_links = dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, link_bandwidth=1e3))
    assert plan_mesh(workload, slow_links, MeshShape(2, 2, 2)).limited_by == "communication"
    slow_memory = dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, memory_bandwidth=1e3))
    assert plan_mesh(workload, slow_memory, MeshShape(2, 2, 2)).limited_by == "memory bandwidth"
    slow = dataclasses.replace(V5E, chip=dataclasses.replace(V5E.chip, peak_flops={"float32": 1e3}))
    bound = plan_mesh(workload, slow, MeshShape(4, 2, 1))
    assert bound.limited_by == "compute"
    # Nothing is recomputed and no router is routed twice, so nothing but products takes time.
    assert bound.mfu_bound == pytest.approx(1.0)


def test_a_mesh_that_cannot_be_says_why():
    def check(workload: Workload, mesh: MeshShape) -> None:
        if mesh.expert == 4:
            raise ConfigError("MeshConfig.num_expert_partitions", "is four.")

    plan = make_plan(workload_of(small_config()), V5E, check)
    assert plan.refused == (
        (MeshShape(2, 4, 1), "MeshConfig.num_expert_partitions is four."),
        (MeshShape(1, 4, 1, 2), "MeshConfig.num_expert_partitions is four."),
        (MeshShape(1, 4, 2), "MeshConfig.num_expert_partitions is four."),
    )
    assert {one.mesh.expert for one in plan.fitting} == {1, 2}


def test_what_does_not_fit_says_by_how_much_and_what_would():
    workload = workload_of(small_config())
    sizes = [plan_mesh(workload, V5E, mesh).memory.total for mesh in mesh_shapes(workload, 8)]
    plan = make_plan(workload, with_memory(min(sizes) - 1), no_check)
    assert not plan.fitting
    assert [one.excess for one in plan.too_large] == sorted(size - min(sizes) + 1 for size in sizes)
    assert plan.change is not None and plan.change.words == "TransformerConfig.remat_policy='minimal'"
    assert plan.change.plan.excess == 0


def test_microbatches_come_before_the_recomputation_of_everything():
    def least(policy: RematPolicy, parts: int) -> int:
        changed = workload.with_changes(remat_policy=policy, microbatches=parts)
        return min(plan_mesh(changed, V5E, mesh).memory.total for mesh in mesh_shapes(workload, 8))

    def words(size: int) -> str:
        change = make_plan(workload, with_memory(size), no_check).change
        assert change is not None
        return change.words

    workload = workload_of(small_config())
    assert least("none", 2) < least("full", 1) < least("minimal", 1)
    assert words(least("full", 1)) == "MICROBATCHES=2"
    few = least("minimal", 64) - 1
    assert least("full", 64) <= few < least("none", 64)
    assert words(few).startswith("TransformerConfig.remat_policy='full' and MICROBATCHES=")


def test_more_devices_are_the_last_resort():
    workload = workload_of(small_config())
    meshes = [mesh for mesh in mesh_shapes(workload, 8) if mesh.fsdp == 1]
    state = min(plan_mesh(workload, V5E, mesh).memory.parameters for mesh in meshes)

    def check(workload: Workload, mesh: MeshShape) -> None:
        if workload.microbatches > 1:
            raise ConfigError("DataConfig.batch_size", "cannot be cut.")

    # Parameters, state and gradients alone leave a third of that for the rest.
    plan = make_plan(workload, with_memory(round(3.3 * state)), check)
    assert plan.change is not None
    assert plan.change.words.endswith("devices")
    count = int(plan.change.words.split()[0])
    assert plan.change.plan.mesh.size == count > 8
    assert make_plan(workload, with_memory(100), check).change is None
