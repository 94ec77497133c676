"""The reader of compiled programs, on text whose counts are known and on one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.planning.hlo import Collective, largest, read_program

MESH = {"data": 2, "expert": 2, "model": 2}

LOOP = """\
HloModule step, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_condition (s: (s32[], f32[8,16])) -> pred[] {
  %s = (s32[], /*index=1*/f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%inner_body (s.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %v = f32[8,16]{1,0:T(8,128)} get-tuple-element(%s.1), index=1
  %exchanged = (f32[4,16]{1,0}, f32[4,16]{1,0}) all-to-all(%v, %v), channel_id=1, replica_groups=REPLICAS
  ROOT %t = (s32[], f32[8,16]{1,0}) tuple(%s.1, %v)
}

%body (s.2: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %s.2 = (s32[], f32[8,16]{1,0}) parameter(0)
  %w = f32[8,16]{1,0} get-tuple-element(%s.2), index=1
  %product = f32[8,8]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %inner = (s32[], f32[8,16]{1,0}) while(%s.2), condition=%inner_condition, body=%inner_body
}

%condition (s.3: (s32[], f32[8,16])) -> pred[] {
  %s.3 = (s32[], f32[8,16]{1,0}) parameter(0)
  ROOT %p = pred[] get-tuple-element(%s.3), index=0
}

ENTRY %main (p0: f32[8,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %start = (s32[], f32[8,16]{1,0}) tuple(%p0, %p0)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body, OUTER
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""
EXPERT_GROUPS = "{{0,2},{1,3},{4,6},{5,7}}"
FIVE_TRIPS = 'backend_config={"known_trip_count":{"n":"5"}}'


def one_line(line: str) -> Collective:
    """The collective of a program that is this line."""
    (found,) = read_program(f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  {line}\n}}\n", 8).collectives
    return found


def test_what_stands_in_a_loop_counts_as_often_as_the_loops_around_it_run():
    program = read_program(LOOP.replace("REPLICAS", EXPERT_GROUPS).replace("OUTER", FIVE_TRIPS), 8)
    (found,) = program.collectives
    # Five trips by what the compiler says, three by what the condition compares.
    assert (found.kind, found.times, found.nbytes) == ("all-to-all", 15, 2 * 4 * 16 * 4)
    assert found.axes(MESH) == ("expert",)
    assert program.sent_by(MESH) == {("expert", "all-to-all"): 15 * 512 / 2}
    assert program.product_flops == 5 * 2 * 8 * 8 * 16
    assert program.loops_of_unknown_length == 0


@pytest.mark.parametrize(
    ("written", "products"),
    [
        # As TPUs write them: rows by columns; with dims of a batch (2) as spatial ones, of which each window meets one
        # entry; and with heads (3) of kv (5) columns.
        ("f32[7,4] convolution(f32[7,9] %x, f32[9,4] %k), dim_labels=bf_io->bf", 7 * 9 * 4),
        (
            "f32[2,7,4] convolution(f32[2,7,9] %x, f32[2,9,4] %k), window={size=2 stride=1 lhs_dilate=2}, "
            "dim_labels=0bf_0io->0bf",
            2 * 7 * 9 * 4,
        ),
        (
            "f32[3,7,5] convolution(f32[1,7,9] %x, f32[3,9,5] %k), window={size=3 pad=2_2 rhs_reversal=1}, "
            "dim_labels=0bf_0io->0bf",
            3 * 7 * 9 * 5,
        ),
        # Four places of a window of three, of which the padding takes one at each end.
        ("f32[1,4,1] convolution(f32[1,4,2] %x, f32[3,2,1] %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 20),
        ("f32[6,4] convolution(f32[6,8] %x, f32[2,4] %k), dim_labels=bf_io->bf, feature_group_count=4", 6 * 2 * 4),
    ],
)
def test_products_are_counted_where_they_are_written_as_convolutions(written: str, products: int):
    result, call = written.split(" ", 1)
    shapes = [part.split(" ")[0] for part in call.split("(", 1)[1].split("f32") if part]
    into, kernel = (f"f32{shape}" for shape in shapes[:2])
    text = f"""ENTRY %main (x: {into}) -> {result} {{
  %x = {into} parameter(0)
  %k = {kernel} constant(0)
  ROOT %y = {result} {call}
}}
"""
    assert read_program(text, 1).product_flops == 2 * products


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    program = read_program(LOOP.replace("REPLICAS", EXPERT_GROUPS).replace(", OUTER", ""), 8)
    assert [one.times for one in program.collectives] == [3]
    assert program.loops_of_unknown_length == 1


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("[4,2]<=[8]", ("model",)),
        ("[2,4]<=[8]", ("expert", "model")),
        ("[4,2]<=[2,2,2]T(0,2,1)", ("expert",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "expert")),
        ("[1,8]<=[8]", ("data", "expert", "model")),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", ("expert",)),
        ("mesh['a'=4,'b'=2] {'a'}", ("data", "expert")),
        ("mesh['a'=8] {'a':(2)2}", ("expert",)),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("data", "expert")),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ("data", "model")),
        ("{}", ("data", "expert", "model")),
    ],
)
def test_groups_in_every_spelling_are_of_the_axes_they_run_along(groups: str, axes: tuple[str, ...]):
    found = one_line(f"%r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert found.axes(MESH) == axes
    assert sorted(device for group in found.groups for device in group) == list(range(8))


@pytest.mark.parametrize(
    ("line", "kind", "nbytes", "sent"),
    [
        # Groups of four; a device gets, and hands on, as rings do.
        ("%r = bf16[4,6]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8]", "all-reduce", 48, 2 * 48 * 3 / 4),
        ("%r = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 32, 32 * 3 / 4),
        ("%r = f32[2]{0} reduce-scatter(%p), replica_groups=[2,4]<=[8]", "reduce-scatter", 32, 32 * 3 / 4),
        ("%r = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8]", "all-gather", 32, 24),
        ("%r = (f32[], s8[3]{0}) all-reduce-start(%p, %q), replica_groups=[2,4]<=[8]", "all-reduce", 7, 10.5),
        (
            "%r = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            20,
            20,
        ),
    ],
)
def test_bytes_are_of_the_whole_array_and_what_is_sent_by_the_kind(line: str, kind: str, nbytes: int, sent: float):
    found = one_line(line)
    assert (found.kind, found.nbytes, found.sent) == (kind, nbytes, sent)


def test_what_one_device_does_alone_is_no_collective():
    text = "ENTRY %main (p: f32[4]) -> f32[4] {\n  %r = f32[4]{0} all-reduce(%p), replica_groups=[8,1]<=[8]\n}\n"
    assert read_program(text, 8).collectives == ()


def test_an_asynchronous_collective_counts_once():
    text = """\
%wrapped (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} all-to-all(%p), replica_groups=[4,2]<=[8], dimensions={0}
}

ENTRY %main (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[4]{0}) async-start(%q), calls=%wrapped
  ROOT %d = f32[4]{0} async-done(%s), calls=%wrapped
}
"""
    assert [one.sent for one in read_program(text, 8).collectives] == [8.0]


def test_a_gather_of_a_tpu_that_fusions_hide_counts_once_a_turn_and_its_scatter_is_no_sum():
    text = """\
%start (p: bf16[1]) -> bf16[8] {
  %p = bf16[1]{0} parameter(0)
  ROOT %g.1 = bf16[8]{0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="5"}
}

%beside (p: bf16[1]) -> bf16[8] {
  %p = bf16[1]{0} parameter(0)
  ROOT %g.2 = bf16[8]{0} all-gather(%p), channel_id=3, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="5"}
}

%all-reduce-scatter.1 (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  %s = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %d = f32[2]{0} dynamic-slice(%s), dynamic_slice_sizes={2}
}

%body (p: bf16[1]) -> bf16[1] {
  %p = bf16[1]{0} parameter(0)
  %a = bf16[8]{0} fusion(%p), kind=kCustom, calls=%start
  ROOT %b = bf16[8]{0} fusion(%p), kind=kOutput, calls=%beside
}

ENTRY %main (q: bf16[1], r: f32[16]) -> f32[2] {
  %q = bf16[1]{0} parameter(0)
  %r = f32[16]{0} parameter(1)
  %w = bf16[1]{0} while(%q), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %t = f32[2]{0} fusion(%r), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    gather, scatter = read_program(text, 8).collectives
    assert (gather.kind, gather.times, gather.sent) == ("all-gather", 6, 6 * 7 / 8 * 16)
    assert (scatter.kind, scatter.times, scatter.sent) == ("reduce-scatter", 1, 7 / 8 * 64)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("hello", 8)
    with pytest.raises(ValueError, match="groups that cannot be read"):
        one_line("%r = f32[4]{0} all-reduce(%p), replica_groups=around")


@pytest.mark.multidevice
def test_a_compiled_loop_of_products_is_read_as_what_it_does():
    mesh = make_mesh(MeshConfig(num_expert_partitions=2, num_model_partitions=2))
    rows, inner, repeats = 16, 32, 7
    x = jax.ShapeDtypeStruct((rows, inner), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "model")))
    # A layer's kernel is split where its input is: each product is a sum over the model axis.
    kernels = jax.ShapeDtypeStruct(
        (repeats, inner, inner), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "model", None))
    )

    def forward(x: jax.Array, kernels: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            y = jax.lax.with_sharding_constraint(x @ kernel, NamedSharding(mesh, PartitionSpec("data", None)))
            return jax.lax.with_sharding_constraint(
                jnp.sin(y), NamedSharding(mesh, PartitionSpec("data", "model"))
            ), None

        return jax.lax.scan(layer, x, kernels)[0]

    text = jax.jit(forward).lower(x, kernels).compile().as_text()
    assert text is not None
    program = read_program(text, mesh.size)
    (summed,) = [one for one in program.collectives if one.kind == "all-reduce"]
    assert (summed.times, summed.nbytes, summed.axes(mesh.shape)) == (repeats, rows // 2 * inner * 4, ("model",))
    assert program.product_flops == repeats * 2 * rows // 2 * inner // 2 * inner
    assert largest(program, 1) == [summed]
