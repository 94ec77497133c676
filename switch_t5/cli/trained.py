"""A run's trained parameters, for the commands that use them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switch_t5.cli.trained_vocabulary import check_vocabulary
from switch_t5.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from switch_t5.cli.build import Run
    from switch_t5.model.config import TransformerConfig
    from switch_t5.model.upcycling import UpcyclingConfig
    from switch_t5.training.state import TrainState
    from switch_t5.types import Params


def load_params(run: Run, path: str) -> tuple[Params, int]:
    """The parameters of a run's model out of a checkpoint of its vocabulary, see :func:`load_model`."""
    check_vocabulary(run, path)
    return load_model(run.spec.transformer, run.abstract_state.params, path)


def load_teacher(run: Run) -> Params | None:
    """The parameters of a run's teacher, on the run's mesh; None for a run without.

    Raises:
      UserError: its checkpoint is missing, damaged or of another model.
    """
    distillation = run.spec.train.distillation
    if run.teacher is None or distillation is None:
        return None
    try:
        check_vocabulary(run, distillation.checkpoint_path)
        return load_model(run.teacher.config, run.abstract_teacher, distillation.checkpoint_path)[0]
    except UserError as error:
        raise UserError(f"DistillationConfig.checkpoint_path: {error}") from error


def load_model(config: TransformerConfig, abstract_params: Params, path: str) -> tuple[Params, int]:
    """The parameters of a checkpoint of any format, and their step (0 where the format does not say).

    Args:
      config: their model.
      abstract_params: their shapes and dtypes, with shardings.
      path: see :func:`switch_t5.checkpoint.formats.format_of`; of a run of ours, its newest checkpoint.
    """
    from switch_t5.checkpoint import load

    restored = _restored(path, "params", abstract_params)
    if restored is not None:
        return restored
    loaded = load.load_params(path, config, abstract_params)
    return loaded.params, loaded.step or 0


def _restored(path: str, name: str, abstract_part: Any) -> tuple[Any, int] | None:
    """A part of a state and its step, from a checkpoint of ours on a disk; None where tables are to read it."""
    from switch_t5.checkpoint import load
    from switch_t5.checkpoint.folder import is_url
    from switch_t5.checkpoint.format_names import NATIVE
    from switch_t5.checkpoint.formats import format_of
    from switch_t5.checkpoint.manager import Checkpointer, locate_checkpoint

    if is_url(path) or format_of(path)[0] != NATIVE:
        return None
    model_dir, step = locate_checkpoint(path)
    with Checkpointer(model_dir, read_only=True) as source:
        if source.fits(name, abstract_part, step) or not load.is_known(path):
            return source.restore_part(name, abstract_part, step), step
    return None


def load_state(run: Run, path: str) -> TrainState:
    """Parameters, optimizer and step of a checkpoint, to go on from in another run."""
    from switch_t5.checkpoint import load

    check_vocabulary(run, path)
    restored = _restored(path, "", run.abstract_state)
    return load.load_state(path, run.spec.transformer, run.abstract_state) if restored is None else restored[0]


def upcycled_state(run: Run, path: str, upcycling: UpcyclingConfig) -> TrainState:
    """The start of a sparse model from a dense checkpoint, see :mod:`switch_t5.checkpoint.upcycling`."""
    from switch_t5.checkpoint.upcycling import upcycle

    check_vocabulary(run, path)
    whole = run.spec.train.initial_checkpoint_optimizer
    abstract = run.abstract_state if whole else {"params": run.abstract_state.params}
    made = upcycle(path, run.spec.transformer, upcycling, abstract, run.new_params, optimizer=whole)
    return made if whole else run.with_params(made["params"])


def student_state(run: Run, path: str) -> TrainState:
    """The start of a dense student from its teacher's checkpoint, see :mod:`switch_t5.checkpoint.student`."""
    from switch_t5.checkpoint.student import start_student

    try:
        check_vocabulary(run, path)
        return run.with_params(start_student(path, run.spec.transformer, run.init_state().params))
    except UserError as error:
        raise UserError(f"DistillationConfig.checkpoint_path: {error}") from error


def open_run(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> Run:
    """The run that a configuration describes, such as a ``config.gin`` out of a MODEL_DIR.

    Raises:
      UserError: the configuration is refused, or its MODEL_DIR does not exist.
    """
    from switch_t5.cli.build import ROOTS, Run, RunSpec
    from switch_t5.cli.configuration import Configuration
    from switch_t5.cli.processes import settle

    configuration = Configuration.load(gin_files, bindings, search_paths)
    settle(configuration, ROOTS)
    spec = RunSpec.read(configuration)
    for file in map(Path, gin_files):
        # A run's own config.gin says where it was trained; the run is where the file is.
        if file.name == "config.gin" and (file.parent / "checkpoints").is_dir():
            spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, model_dir=str(file.parent)))
    if not Path(spec.train.model_dir).is_dir():
        raise UserError(f"MODEL_DIR {spec.train.model_dir} does not exist: train first, or name the folder of a run.")
    with configuration.locating_errors():
        return Run(spec)
