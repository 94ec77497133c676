"""What a compiled step sends on each mesh: the kinds, counts and bytes of its collectives against theory."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import pytest

from switch_t5.cli.build import Run, RunSpec
from switch_t5.cli.configuration import Configuration
from switch_t5.cli.plan import spec_on, workload_of
from switch_t5.planning.communication import transfers
from switch_t5.planning.hlo import read_program
from switch_t5.planning.workload import MeshShape, Workload
from tests.integration.conftest import TINY

pytestmark = pytest.mark.multidevice

SIZES = ("MODEL_DIR=unused", "TEXTS=unused", "text_task.name='texts_of_collectives'", "BATCH_SIZE=16")
SIZES += ("TransformerConfig.dropout_rate=0", "TransformerConfig.num_heads=8", "TransformerConfig.head_dim=2")
SIZES += ("MoEConfig.num_experts=8", "MoEConfig.group_size=64")


MESHES = [
    pytest.param(MeshShape(8, 1, 1), {"data": {"all-reduce"}}, id="data 8"),
    pytest.param(MeshShape(1, 8, 1), {"expert": {"all-reduce", "all-to-all"}}, id="expert 8", marks=pytest.mark.slow),
    pytest.param(MeshShape(1, 1, 8), {"model": {"all-reduce"}}, id="model 8", marks=pytest.mark.slow),
    pytest.param(
        MeshShape(2, 2, 2),
        {"data": {"all-reduce"}, "data+expert": {"all-reduce"}, "expert": {"all-to-all"}, "model": {"all-reduce"}},
        id="data 2, expert 2, model 2",
        marks=pytest.mark.slow,
    ),
    pytest.param(MeshShape(1, 1, 1, 8), {"fsdp": {"all-gather", "all-reduce"}}, id="fsdp 8", marks=pytest.mark.slow),
    pytest.param(
        MeshShape(1, 2, 2, 2),
        {
            "fsdp": {"all-gather", "all-reduce"},
            "fsdp+expert": {"all-reduce"},
            "expert": {"all-to-all"},
            "model": {"all-reduce"},
        },
        id="fsdp 2, expert 2, model 2",
        marks=pytest.mark.slow,
    ),
]


SMALL = 8
"""Numbers of what is not counted: scalars and statistics of 8 experts."""

SUMS_OVER_MODEL = {
    "self-attention, of each layer the output and the gradients of what query, key and value read": 4 * (1 + 3),
    "cross-attention, of each layer the output and the query's gradient, and once the encoder's output's": 2 * 2 + 1,
    "dense feed-forwards, output and gradient": 2 * 2,
    "experts, output and gradient": 2 * 2,
    "rows of the embedding": 2,
    "logits: their maximum, sum of exponentials and target's row, and the gradient of what met them": 4,
}
"""Of two encoder and two decoder layers, half of which are sparse."""


def arrays_in_theory(workload: Workload, mesh: MeshShape, sums_over_model: int) -> Counter[tuple[str, str]]:
    """How many arrays of more than SMALL numbers a step sums or gathers, by mesh axes and collective."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind, number, name in workload.params.kinds:
        over = [axis for axis in ("data", "fsdp", "expert") if axis != "expert" or "expert" not in kind.axes]
        # The embedding has a gradient as the encoder's rows, the decoder's and the output's kernel.
        uses = 3 if name == "embedding/table" else 1
        counts["+".join(axis for axis in over if mesh.axes()[axis] > 1), "all-reduce"] += number * uses
        if "embed" in kind.axes and mesh.fsdp > 1:
            passes = 2 if kind.in_blocks else 1
            counts["fsdp", "all-gather"] += number * passes
    counts["model" if mesh.model > 1 else "", "all-reduce"] += sums_over_model
    return Counter({key: count for key, count in counts.items() if key[0]})


def check(
    mesh: MeshShape, kinds: dict[str, set[str]], *bindings: str, sums_over_model: int = sum(SUMS_OVER_MODEL.values())
) -> None:
    """Compiles a step, and compares what it sends with the plan."""
    spec = RunSpec.read(Configuration.load([str(TINY)], (*SIZES, *bindings)))
    workload, _ = workload_of(spec)
    text = Run(spec_on(spec, workload, mesh)).compile_train_step().as_text()
    assert text is not None
    program = read_program(text, mesh.size)
    assert not program.loops_of_unknown_length

    found: dict[str, set[str]] = defaultdict(set)
    all_to_alls = 0
    arrays: Counter[tuple[str, str]] = Counter()  # Compilers join collectives; how many arrays are sent stays.
    for one in program.collectives:
        axes = "+".join(one.axes(mesh.axes()))
        found[axes].add(one.kind)
        if one.kind == "all-to-all":
            all_to_alls += one.times
        else:
            large = sum(math.prod(shape) > SMALL for _, shape in one.arrays)
            arrays[axes, one.kind] += large * one.times
    assert found == kinds
    sparse = sum(sum(workload.config.patterns(decoder=decoder)[0]) for decoder in (False, True))
    # To the experts and back, forward and backward.
    assert all_to_alls == (4 * sparse if mesh.expert > 1 else 0)
    assert +arrays == arrays_in_theory(workload, mesh, sums_over_model)

    sent = program.sent_by(mesh.axes())
    if mesh.expert > 1:
        # Of every token 1.25 slots, there and back in both passes of one sparse layer a stack; 32 and 16 positions.
        slots = 1.25 * 16 * (32 + 16) / mesh.batch_shards
        rows = 2 * 2 * slots * workload.config.emb_dim * 4 * (mesh.expert - 1) / mesh.expert
        assert sent["expert", "all-to-all"] == rows
    planned: dict[tuple[str, str], float] = defaultdict(float)
    for one in transfers(workload, mesh, merged=False):
        planned[one.axis, one.collective] += one.sent
    assert planned.keys() == {(axes, kind) for axes, of_axes in kinds.items() for kind in of_axes}
    for (axis, kind), nbytes in planned.items():
        # Beside the plan's are statistics, and norms of what is updated.
        slack = {"rel": 0.01, "abs": 512} if kind == "all-reduce" else {"rel": 1e-9}
        assert sent[axis, kind] == pytest.approx(nbytes, **slack), (axis, kind)


@pytest.mark.parametrize(("mesh", "kinds"), MESHES)
def test_a_step_sends_what_theory_says_and_nothing_else(mesh: MeshShape, kinds: dict[str, set[str]]) -> None:
    check(mesh, kinds)


@pytest.mark.slow
def test_an_explicit_all_to_all_sends_slots_alike_and_sums_tokens_alone() -> None:
    mesh, kinds = MeshShape(2, 2, 2), {"data": {"all-reduce"}, "data+expert": {"all-reduce"}}
    kinds |= {"expert": {"all-to-all"}, "model": {"all-reduce"}}
    # A device sums the gradients of tokens' weights besides.
    sums = sum(SUMS_OVER_MODEL.values()) + 2
    check(mesh, kinds, "MoEConfig.exchange='all_to_all'", sums_over_model=sums)
