"""``switch-t5 train``: trains a model, from the start or from where the run was left."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from switch_t5.errors import UserError

if TYPE_CHECKING:
    from switch_t5.checkpoint.manager import Checkpointer
    from switch_t5.cli.build import Run
    from switch_t5.cli.configuration import Configuration
    from switch_t5.data.pipeline import BatchIterator, DataConfig
    from switch_t5.training.loop import Recorder
    from switch_t5.training.state import TrainState
    from switch_t5.training.step import Metrics
    from switch_t5.types import Batch

    StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

MAY_CHANGE = (
    "TrainConfig.model_dir",
    "TrainConfig.train_steps",
    "TrainConfig.*_period",
    "TrainConfig.eval_batches",
    "TransformerConfig.remat_policy",
    "MoEConfig.exchange",
    "CheckpointConfig.*",
    "MeshConfig.*",
    "RuntimeConfig.*",
    "DecodingConfig.*",
    "EvaluationConfig.*",
)
"""What a restarted run may set otherwise than before: none of it changes what is learned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``train`` has no flags beyond those of every gin command."""


def run(args: argparse.Namespace) -> int:
    """Trains; returns 0, or 143 or 130 after a signal, the state saved."""
    from switch_t5.checkpoint.manager import Checkpointer
    from switch_t5.cli.build import ROOTS, Run, RunSpec
    from switch_t5.cli.configuration import Configuration
    from switch_t5.cli.processes import is_first, settle
    from switch_t5.training.graceful_stop import GracefulStop
    from switch_t5.training.loop import train

    configuration = Configuration.load(args.gin_file, args.gin_bindings, args.gin_search_paths)
    configuration.check_flags_have_effect([*ROOTS, "RuntimeConfig"])
    settle(configuration, ROOTS)
    spec = RunSpec.read(configuration)
    with configuration.locating_errors():
        run = Run(spec)
    model_dir = Path(spec.train.model_dir)
    _check_restart(configuration, model_dir)
    step_fn, batches = _prepare(configuration, run)
    with Checkpointer(model_dir, spec.checkpoint) as checkpointer:
        resumes = checkpointer.latest_step() is not None
        state = _first_state(run, checkpointer, batches)
        first_step = int(state.step)
        _banner(run, first_step)
        if first_step >= spec.train.train_steps:
            if not resumes:
                raise UserError(
                    f"{spec.train.initial_checkpoint_path} is trained to step {first_step}, and TRAIN_STEPS is "
                    f"{spec.train.train_steps}: raise it to go on from there."
                )
            print(f"{model_dir} is trained to step {first_step} already; raise TRAIN_STEPS to go on.", file=sys.stderr)
            return 0
        if is_first():
            _tell_truncation(spec.data)
            # A start that was refused leaves no configuration, nor changes another run's.
            _write_configuration(configuration, model_dir)
        with GracefulStop() as stop, recorder(run, first_step, resumes=resumes) as record:
            state = train(
                state,
                spec.train,
                step_fn=step_fn,
                batches=batches,
                place=run.place,
                evaluate=run.evaluate,
                checkpointer=checkpointer,
                recorder=record,
                stop=stop,
                begins=not resumes,
                score=run.scorer and run.scorer.scores,
            )
    saved = resumes or int(state.step) > first_step
    _farewell(int(state.step), spec.train.train_steps, model_dir, saved=saved)
    return stop.exit_code


def _prepare(configuration: Configuration, run: Run) -> tuple[StepFunction, BatchIterator]:
    """Compiles the step in a thread and opens the data beside it: both take seconds.

    Raises:
      UserError: the data or the teacher cannot be used; nothing was written.
    """
    from switch_t5.cli.trained import load_teacher
    from switch_t5.data.pipeline import BatchIterator

    pool = ThreadPoolExecutor(1)
    try:
        compiled = pool.submit(run.compile_train_step)
        with configuration.locating_errors():
            _check_vocabulary(run)
            batches = BatchIterator(run.spec.data, repeat=True, rows=run.rows)
            if run.spec.train.eval_batches:
                _ = run.evaluation_batches
            _ = run.scorer
            teacher = load_teacher(run)
            step_fn = compiled.result()
            # The teacher's parameters are given at each step, which only reads them.
            return step_fn if teacher is None else lambda state, batch: step_fn(state, batch, teacher), batches
    finally:
        # A mistake in the data is told at once, and not after the compilation.
        pool.shutdown(wait=False)


def _check_restart(configuration: Configuration, model_dir: Path) -> None:
    """Refuses a restart that would train something else."""
    path = model_dir / "config.gin"
    if path.exists() and _is_begun(model_dir):
        differences = configuration.difference(path.read_text(), MAY_CHANGE, place=str(path))
        if differences:
            raise UserError(
                f"{model_dir} holds a run with another configuration: {' '.join(differences)} Choose another MODEL_DIR "
                "(TrainConfig.initial_checkpoint_path starts it from this run's parameters), or set these as they were."
            )


def _is_begun(model_dir: Path) -> bool:
    return any((model_dir / "checkpoints").glob("[0-9]*"))


def _check_vocabulary(run: Run) -> None:
    """Checks that the vocabulary is the model's, and that of the checkpoint that a new run starts from.

    Raises:
      UserError: it is not.
    """
    from switch_t5.cli.trained_vocabulary import check_embedding, check_vocabulary

    train = run.spec.train
    if train.initial_checkpoint_path is not None and not _is_begun(Path(train.model_dir)):
        check_vocabulary(run, train.initial_checkpoint_path)
    else:
        check_embedding(run)


def _write_configuration(configuration: Configuration, model_dir: Path) -> None:
    """Writes ``config.gin``."""
    from switch_t5.cli.build import ROOTS
    from switch_t5.cli.processes import OF_ONE_START
    from switch_t5.storage import storage_errors, writable_directory

    path = writable_directory(model_dir) / "config.gin"
    with storage_errors(f"Writing {path}"):
        temporary = path.with_suffix(".gin.tmp")
        temporary.write_text(configuration.resolved(ROOTS, OF_ONE_START))
        os.replace(temporary, path)


def _first_state(run: Run, checkpointer: Checkpointer, batches: BatchIterator) -> TrainState:
    """The run's last checkpoint, with the data positioned after it, or a new state."""
    if checkpointer.latest_step() is not None:
        restored = checkpointer.restore(run.abstract_state, positions=batches.positions)
        batches.set_state(restored.data_state)
        return restored.state
    from switch_t5.cli.trained import load_params, load_state, student_state, upcycled_state

    path, distillation = run.spec.train.initial_checkpoint_path, run.spec.train.distillation
    if distillation is not None and distillation.initialize_student:
        return student_state(run, distillation.checkpoint_path)
    if path is None:
        return run.init_state()
    if run.spec.train.upcycling is not None:
        return upcycled_state(run, path, run.spec.train.upcycling)
    if run.spec.train.initial_checkpoint_optimizer:
        return load_state(run, path)
    params, _ = load_params(run, path)
    return run.with_params(params)


def _banner(run: Run, first_step: int) -> None:
    """Says what is about to happen, and how large it is."""
    import jax

    from switch_t5.planning.counts import active_parameter_count, forward_flops, parameter_count

    spec, model = run.spec, run.model
    lengths = spec.data.task_feature_lengths
    tokens = spec.data.batch_size * sum(lengths.values())
    flops = 3 * forward_flops(spec.transformer, spec.data.batch_size, lengths["inputs"], lengths["targets"])
    total = parameter_count(model.abstract_params)
    active = active_parameter_count(spec.transformer, model.abstract_params, model.axes)
    device = jax.devices()[0]
    mesh = " x ".join(f"{size} {name}" for name, size in run.mesh.shape.items())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    lines = (
        f"devices     {run.mesh.size} of {jax.device_count()} {device.device_kind}{processes}, jax {jax.__version__}",
        f"mesh        {mesh}",
        f"parameters  {total:,} in all, {active:,} for one token",
        f"batch       {spec.data.batch_size} x ({lengths['inputs']} + {lengths['targets']}) = {tokens:,} tokens a step",
        f"work        {flops:.3e} floating-point operations a step",
        f"data        {spec.data.mixture_or_task_name}{_sharing(spec.data.num_shards)}",
        f"run         {spec.train.model_dir}, from step {first_step} to {spec.train.train_steps}",
    )
    print("\n".join(lines), file=sys.stderr, flush=True)


def _tell_truncation(data: DataConfig) -> None:
    """Says how many examples of each labelled task are cut."""
    from switch_t5.data.truncation import find_truncation

    for task in find_truncation(data):
        counts = ((feature, count) for feature, count in task.cut.items() if count)
        told = (f"{count} {feature} to {data.task_feature_lengths[feature]} tokens" for feature, count in counts)
        if cut := ", ".join(told):
            first = f"of the first {task.examples} examples of {task.task}"
            print(f"cut         {cut}, {first}", file=sys.stderr, flush=True)


def _sharing(num_shards: int) -> str:
    """What to know where several processes read the same data."""
    import jax

    if num_shards >= jax.process_count():
        return ""
    return f", {num_shards} shard(s) for {jax.process_count()} processes, which read the same (DataConfig.num_shards)"


@contextlib.contextmanager
def recorder(run: Run, first_step: int, *, resumes: bool) -> Iterator[Recorder]:
    """Opens everything that measurements go to."""
    from switch_t5.cli.processes import is_first
    from switch_t5.training.loop import Recorder
    from switch_t5.training.metrics_file import MetricsFile
    from switch_t5.training.progress import Progress, Speedometer
    from switch_t5.training.tensorboard import TensorBoard

    train, data = run.spec.train, run.spec.data
    model_dir, resumed = Path(train.model_dir), first_step if resumes else None
    tokens = data.batch_size * sum(data.task_feature_lengths.values())
    with (
        MetricsFile(model_dir / "metrics.jsonl", resumed, active=is_first()) as metrics,
        TensorBoard(model_dir / "tensorboard", resumed, active=is_first()) as tensorboard,
        Progress(train.train_steps, first_step) as progress,
    ):
        speed = Speedometer(tokens, train.train_steps)
        task = data.mixture_or_task_name
        yield Recorder(metrics, tensorboard, progress, speed, train.optimizer.learning_rate, task)


def _farewell(step: int, train_steps: int, model_dir: Path, *, saved: bool) -> None:
    """Says how the run ended and where its files are."""
    files = f"Its metrics are in {model_dir / 'metrics.jsonl'}, its curves in {model_dir / 'tensorboard'}"
    if not saved:
        how = "Stopped before the first step: there is nothing to save yet."
    elif step < train_steps:
        how = f"Stopped and saved at step {step} of {train_steps}; the same command goes on from there."
    else:
        how = f"Trained to step {step}."
    print(f"{how} {files}, its checkpoints in {model_dir / 'checkpoints'}.", file=sys.stderr)
