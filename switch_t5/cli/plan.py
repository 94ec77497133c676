"""``switch-t5 plan``: what a model costs, on which meshes it fits, and what limits it; no accelerator is needed."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any

from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.cli.build import RunSpec
    from switch_t5.cli.configuration import Configuration
    from switch_t5.planning.chips import Topology
    from switch_t5.planning.plan import MeshPlan, Plan
    from switch_t5.planning.workload import MeshShape, Workload

DEFAULT_RUN = "runs/pretrain.gin"
"""What is trained where the configuration has no batch of its own: the paper's 2^20 tokens."""

LEFT_OPEN = {"MODEL_DIR": "unused", "VOCABULARY_PATH": "unused"}
"""Macros of the packaged runs that a plan has no use for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own flags."""
    parser.add_argument("--topology", metavar="TPU:SHAPE", help="a TPU slice, such as v5p:8x8x8")
    parser.add_argument("--devices", metavar="KIND:N", help="other devices: gpu:H100x256, gpu:A100x64 or cpu:8")
    parser.add_argument(
        "--mesh", metavar="DxExM[xF]", type=_mesh_shape, help="this mesh of data x expert x model (x fsdp) alone"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the step for these devices, and compare XLA's counts"
    )
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Plans, prints tables on standard error and returns 0.

    Raises:
      UserError: the topology or the mesh does not exist, or no mesh fits.
    """
    if (args.topology is None) == (args.devices is None):
        raise UserError("give either --topology=TPU:SHAPE, such as v5p:8x8x8, or --devices=KIND:N, such as cpu:8.")
    from switch_t5.planning.chips import parse_devices, parse_topology

    topology = parse_devices(args.devices) if args.topology is None else parse_topology(args.topology)
    _without_accelerator(topology if args.compile else None)
    from switch_t5.planning.plan import make_plan

    configuration = load(args)
    from switch_t5.cli.build import RunSpec

    spec = RunSpec.read(configuration)
    mesh = args.mesh or configured_mesh(spec, topology)
    with configuration.locating_errors():
        workload, active = workload_of(spec)
        plan = make_plan(workload, topology, lambda workload, mesh: check_mesh(spec, workload, mesh))
    if mesh is not None:
        plan = _only(plan, mesh)
    from switch_t5.cli import plan_report

    result = plan_report.as_json(plan, active)
    plan_report.show(plan, active)
    if args.compile:
        result["compiled"] = _compile(spec, plan)
    write_json(result, args.json)
    if not plan.fitting:
        raise UserError(_why_nothing_fits(plan))
    return 0


def load(args: argparse.Namespace) -> Configuration:
    """The configuration, completed where it is a model alone."""
    from switch_t5.cli.configuration import Configuration

    files = list(args.gin_file)
    names = Configuration.names_set(files, args.gin_search_paths)
    if "DataConfig" not in names:
        files.append(DEFAULT_RUN)
        names = Configuration.names_set(files, args.gin_search_paths)
    open_macros = [f"{name}={value}" for name, value in LEFT_OPEN.items() if name in names]
    return Configuration.load(files, [*open_macros, *args.gin_bindings], args.gin_search_paths)


def workload_of(spec: RunSpec) -> tuple[Workload, int]:
    """A run's step as a plan sees it, and the parameters that a token passes. Traces shapes; computes nothing."""
    import jax

    from switch_t5.model.functional import Model
    from switch_t5.planning.counts import active_parameter_count
    from switch_t5.planning.workload import Arrays, Workload
    from switch_t5.training.optimizers import state_axes

    model = Model(spec.transformer)
    opt_state = jax.eval_shape(spec.train.optimizer(model.axes).init, model.abstract_params)
    lengths, rules = spec.data.task_feature_lengths, spec.mesh.axis_rules
    workload = Workload(
        config=spec.transformer,
        batch=spec.data.batch_size,
        encoder_length=lengths["inputs"],
        decoder_length=lengths["targets"],
        params=Arrays.of(model.abstract_params, model.axes, rules),
        opt_state=Arrays.of(opt_state, state_axes(opt_state, model.abstract_params, model.axes), rules),
        microbatches=spec.train.microbatches,
        rules=rules,
    )
    return workload, active_parameter_count(spec.transformer, model.abstract_params, model.axes)


def configured_mesh(spec: RunSpec, topology: Topology) -> MeshShape | None:
    """The mesh that a run of this configuration has on so many devices; None where it leaves the partitions open.

    Raises:
      UserError: the devices cannot be divided so.
    """
    from switch_t5.planning.workload import MeshShape

    config = spec.mesh
    inner = config.num_expert_partitions, config.num_model_partitions, config.num_fsdp_partitions
    if inner == (1, 1, 1):
        return None
    rest, over = divmod(topology.num_devices, math.prod(inner))
    if over:
        named = " x ".join(f"{count} {axis}" for count, axis in zip(inner, ("expert", "model", "fsdp"), strict=True))
        raise UserError(
            f"the configuration asks for {named} partitions, which do not divide the {topology.num_devices} devices of "
            f"{topology.name}; set others, or give --mesh, which is planned in their place."
        )
    return MeshShape(rest, *inner)


def spec_on(spec: RunSpec, workload: Workload, mesh: MeshShape) -> RunSpec:
    """The run that a plan speaks of: with its rematerialisation and microbatches, on its mesh."""
    return dataclasses.replace(
        spec,
        transformer=workload.config,
        mesh=dataclasses.replace(
            spec.mesh,
            num_expert_partitions=mesh.expert,
            num_model_partitions=mesh.model,
            num_fsdp_partitions=mesh.fsdp,
            num_devices=mesh.size,
        ),
        train=dataclasses.replace(spec.train, microbatches=workload.microbatches),
    )


def check_mesh(spec: RunSpec, workload: Workload, mesh: MeshShape) -> None:
    """Checks the batch as a run does.

    Raises:
      ConfigError: it cannot be divided so.
    """
    from typing import cast

    from jax.sharding import Mesh

    from switch_t5.cli.build import check_batch

    check_batch(spec_on(spec, workload, mesh), cast("Mesh", mesh.abstract()))


def _without_accelerator(compile_for: Topology | None) -> None:
    """Keeps JAX from waking devices, which it would take from whoever trains on them."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    if compile_for is not None and compile_for.chip.name == "cpu":
        jax.config.update("jax_num_cpu_devices", compile_for.num_devices)


def _mesh_shape(text: str) -> MeshShape:
    from switch_t5.planning.workload import MeshShape

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise UserError(f"--mesh={text}: give devices along data, expert and model (and fsdp), such as 2x64x4.")
    return MeshShape(*map(int, text.split("x")))


def _only(plan: Plan, mesh: MeshShape) -> Plan:
    """The plan of one mesh.

    Raises:
      UserError: it is none of these devices, or was refused.
    """
    from switch_t5.planning.plan import most_experts

    if mesh.size != plan.topology.num_devices:
        raise UserError(
            f"the mesh {mesh} is of {mesh.size} devices; {plan.topology.name} has {plan.topology.num_devices}."
        )
    for shape, reason in plan.refused:
        if shape == mesh:
            raise UserError(f"the mesh {mesh}: {reason}")
    fitting = tuple(one for one in plan.fitting if one.mesh == mesh)
    too_large = tuple(one for one in plan.too_large if one.mesh == mesh)
    if not fitting and not too_large:
        config = plan.workload.config
        raise UserError(
            f"the mesh {mesh} has {mesh.expert} expert and {mesh.model} model partitions, and the model "
            f"{most_experts(config)} experts and {config.num_heads} heads to divide among them."
        )
    return dataclasses.replace(plan, fitting=fitting, too_large=too_large, refused=())


def _why_nothing_fits(plan: Plan) -> str:
    from switch_t5.cli.plan_report import size

    if not plan.too_large:
        nearest, reason = min(plan.refused, key=lambda refused: refused[0].batch_shards)
        return f"no mesh of {plan.topology.name} divides this model and batch; of {nearest}, the nearest, {reason}"
    least: MeshPlan = plan.too_large[0]
    sentence = (
        f"the step does not fit on {plan.topology.name}: on the mesh {least.mesh} a device needs "
        f"{size(least.memory.total)}, {size(least.excess)} more than its {size(plan.topology.chip.memory)}"
    )
    if plan.fitting or plan.change is None:
        return f"{sentence}."
    return f"{sentence}; the smallest change that fits is {plan.change.words} (mesh {plan.change.plan.mesh})."


def _compile(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    """Compiles the best mesh's step, prints its counts beside the plan's, and returns them.

    Raises:
      UserError: nothing fits, or this machine cannot compile for these devices.
    """
    import resource
    import time

    from switch_t5.cli.build import Run
    from switch_t5.cli.plan_report import comparison_json, show_comparison
    from switch_t5.partitioning.mesh import make_mesh
    from switch_t5.planning.compiled import compare

    if not plan.fitting:
        raise UserError(_why_nothing_fits(plan))
    best = plan.fitting[0]
    devices = _compile_devices(plan.topology)
    spec = spec_on(spec, plan.workload, best.mesh)
    start = time.perf_counter()
    program = Run(spec, make_mesh(spec.mesh, devices)).compile_train_step()
    seconds = time.perf_counter() - start
    rows = compare(best, program)
    host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in kB.
    show_comparison(rows, best, seconds, host_bytes)
    return comparison_json(rows, best, seconds, host_bytes)


def _compile_devices(topology: Topology) -> Any:
    """Devices to compile for, which for a TPU are descriptions alone."""
    import os

    import jax

    if topology.chip.name == "cpu":
        return jax.devices()
    if not topology.chip.torus_dims:
        raise UserError(f"--compile: XLA compiles for a GPU only where there is one; plan {topology.name} without it.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:  # JAX has no narrower one for a compiler that is missing.
        raise UserError(
            f"--compile: JAX has no compiler for {topology.name} here ({str(error).splitlines()[0]}); it is in libtpu, "
            "of the extra 'tpu'."
        ) from None
