"""A run's trained parameters, for the commands that use them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from switch_t5.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from switch_t5.cli.build import Run
    from switch_t5.types import Params


def load_params(run: Run, path: str) -> tuple[Params, int]:
    """The parameters of a run's latest checkpoint, or of the one that the path names, and their step."""
    from switch_t5.checkpoint.manager import Checkpointer, locate_checkpoint

    model_dir, step = locate_checkpoint(path)
    with Checkpointer(model_dir, read_only=True) as source:
        return source.restore_part("params", run.abstract_state.params, step), step


def open_run(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str]) -> Run:
    """The run that a configuration describes, such as a ``config.gin`` out of a MODEL_DIR.

    Raises:
      UserError: the configuration is refused, or its MODEL_DIR does not exist.
    """
    from switch_t5.cli.build import Run, RunSpec
    from switch_t5.cli.configuration import Configuration

    configuration = Configuration.load(gin_files, bindings, search_paths)
    configuration.get("RuntimeConfig").apply()
    spec = RunSpec.read(configuration)
    for file in map(Path, gin_files):
        # A run's own config.gin says where it was trained; the run is where the file is.
        if file.name == "config.gin" and (file.parent / "checkpoints").is_dir():
            spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, model_dir=str(file.parent)))
    if not Path(spec.train.model_dir).is_dir():
        raise UserError(f"MODEL_DIR {spec.train.model_dir} does not exist: train first, or name the folder of a run.")
    with configuration.locating_errors():
        return Run(spec)
