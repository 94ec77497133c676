"""Names of topologies, and the least times of collectives on them."""

from __future__ import annotations

import math

import pytest

from switch_t5.errors import UserError
from switch_t5.planning.chips import GPUS, TPUS, Topology, parse_devices, parse_topology


@pytest.mark.parametrize(
    ("name", "chip", "devices"),
    [("v5e:16x16", "v5e", 256), ("v5p:8x8x8", "v5p", 512), ("v4:2x2x1", "v4", 4), ("v6e:2x4", "v6e", 8)],
)
def test_a_slice_is_known_by_its_name(name: str, chip: str, devices: int):
    topology = parse_topology(name)
    assert (topology.name, topology.chip, topology.num_devices) == (name, TPUS[chip], devices)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5:16x16", "there is no TPU 'v5'. Did you mean 'v5p'?"),
        ("tpu:4x4", "There are v4, v5e, v5p, v6e"),
        ("v5e:16x32", "near it are v5e:16x16, v5e:8x16, v5e:8x8."),
        ("v5p:8x8", "near it are v5p:4x4x4,"),
        ("v5p:16x24x24", "near it are v5p:16x16x24,"),
        ("v5e", "near it are v5e:1x1, v5e:4x8, v5e:16x16."),
        ("v5e:16*16", "near it are v5e:16x16, v5e:8x16,"),
        ("v5e-16x16", "near it are v5e:16x16, v5e:8x16,"),
        ("V5E:4x4", "near it are v5e:4x4,"),
        ("v5litepod-256", "near it are v5e:16x16,"),
        ("v5p:08x8x8", "near it are v5p:8x8x8,"),
        ("v5p:500", "near it are v5p:8x8x8,"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused_with_what_is_near(name: str, said: str):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert said in str(error.value)


def test_devices_are_known_by_kind_and_number():
    gpus = parse_devices("gpu:H100x256")
    assert (gpus.chip, gpus.num_devices) == (GPUS["H100"], 256)
    two, eight = parse_devices("cpu:2"), parse_devices("cpu:8")
    assert eight.num_devices == 8
    assert two.chip.memory == pytest.approx(4 * eight.chip.memory, abs=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu:H10x8", "there is no GPU 'H10'. Did you mean 'H100'?"),
        ("gpu:V100", "give a GPU and how many"),
        ("cpu", "give a number of virtual devices"),
        ("cpu:0", "give a number of virtual devices"),
        ("gpus:H100x8", "there is no kind 'gpus'. Did you mean 'gpu'?"),
        ("v5e:4x4", "a TPU slice is given by --topology=v5e:4x4"),
    ],
)
def test_devices_that_do_not_exist_are_refused(text: str, said: str):
    with pytest.raises(UserError) as error:
        parse_devices(text)
    assert said in str(error.value)


def test_a_torus_sums_at_its_links_rate_and_exchanges_at_that_of_its_cut():
    v5e = Topology("v5e:16x16", TPUS["v5e"], 256)
    assert v5e.seconds("all-reduce", 200e9, 256, 1) == 1.0
    # Half of 256 chips' bytes cross the middle, a half of these each way: 64 x 200 GB over 2 x 16 links of 50 GB/s.
    assert v5e.seconds("all-to-all", 200e9, 256, 1) == pytest.approx(64 * 200e9 / (2 * 16 * 50e9))
    # Four chips, two by two, are bound by what each can send.
    assert v5e.seconds("all-to-all", 200e9, 4, 1) == 1.0


def test_nodes_of_gpus_use_the_network_for_what_leaves_them():
    h100 = Topology("gpu:H100x64", GPUS["H100"], 64)
    assert h100.seconds("all-reduce", 450e9, 8, 1) == 1.0
    # Eight of a node sum among themselves, and each sends an eighth to the other nodes.
    assert h100.seconds("all-reduce", 450e9, 64, 1) == pytest.approx(450e9 / 8 / 50e9)
    # Neighbours on this axis are eight apart: none is in the same node.
    assert h100.seconds("all-reduce", 450e9, 8, 8) == pytest.approx(450e9 / 50e9)
    assert h100.seconds("all-to-all", 63e9, 64, 1) == pytest.approx(56e9 / 50e9)


def test_rates_are_plausible_between_generations():
    for chip in (*TPUS.values(), *GPUS.values()):
        # Between the FLOPs a byte at which the slowest and the fastest of these chips turn from memory to products.
        assert 100 < chip.peak_flops["bfloat16"] / chip.memory_bandwidth < 600
        assert chip.link_bandwidth < chip.memory_bandwidth
        assert math.isfinite(chip.memory)
