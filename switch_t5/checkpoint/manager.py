"""Checkpoints of a run: ``MODEL_DIR/checkpoints/<step>/``.

One checkpoint holds the state (parameters, optimizer, step), each process's position in the data, and the
metrics measured at that step. Orbax writes it: in the background, into a folder that gets its final name
only when everything is in it, so that a folder named by a step is always whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from switch_t5.checkpoint import naming
from switch_t5.errors import ConfigError, UserError, check_types, closest
from switch_t5.storage import storage_errors, writable_directory

# Orbax takes most of a second to import; a run meets it with its first checkpoint.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp

DIRECTORY = "checkpoints"

# How tensorstore begins an error about a file that is damaged or gone.
_DAMAGED = re.compile(r"(DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE)\b")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept; the others are deleted once a newer one is whole.

    Attributes:
      keep: how many of the latest are kept; None keeps all.
      keep_period: additionally kept are those whose step is a multiple of this.
      keep_best: additionally kept are the best by the metric of this name, or by each of these; ``"tasks"`` means the
        score of each task that is evaluated.
      keep_best_mode: ``"min"`` where a smaller value of that metric is better, else ``"max"``; of a task's score a
        larger one always is.
      keep_best_count: how many of the best, by each metric, are kept.

    Raises:
      ConfigError: a value of a wrong type or out of range.
    """

    keep: int | None = 3
    keep_period: int | None = None
    keep_best: str | tuple[str, ...] | None = None
    keep_best_mode: str = "min"
    keep_best_count: int = 1

    @property
    def best_metrics(self) -> tuple[str, ...]:
        """The names of the metrics by which the best are kept."""
        best = self.keep_best
        return () if best is None else (best,) if isinstance(best, str) else tuple(best)

    def mode(self, metric: str) -> str:
        """``"min"`` or ``"max"``; a task's metrics are named ``<task>/<metric>``."""
        return "max" if "/" in metric else self.keep_best_mode

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("keep", "keep_period", "keep_best_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"CheckpointConfig.{name}", f"must be at least 1, got {value}.")
        if self.keep_best_mode not in ("min", "max"):
            raise ConfigError(
                "CheckpointConfig.keep_best_mode", f"must be 'min' or 'max', got {self.keep_best_mode!r}."
            )


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
      state: a pytree of jax.Array, structured and sharded as asked.
      data_state: the bytes that this process saved.
      step: the checkpoint's step.
    """

    state: Any
    data_state: bytes
    step: int


class Checkpointer:
    """Saves and restores the checkpoints of one ``MODEL_DIR``.

    All processes of a run call its methods together; the folder is shared between them. Use it as a context
    manager, or call `close`, so that a save under way is finished.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
    ) -> None:
        """Opens the checkpoints of a run.

        Args:
          model_dir: the run's folder, made where it does not exist.
          config: which checkpoints are kept.
          read_only: only restore: nothing is made, and what another process is saving there is left alone.

        Raises:
          UserError: the folder cannot be made or written.
        """
        self._directory = Path(model_dir).absolute() / DIRECTORY
        self._config = config or CheckpointConfig()
        self._read_only = read_only
        self._saving: int | None = None
        if not read_only:
            writable_directory(model_dir)
            writable_directory(self._directory)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdecimal())

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, data_state: bytes, metrics: Mapping[str, float] | None = None) -> bool:
        """Starts saving a checkpoint; waits only for the save before it.

        The state's buffers may be donated as soon as this returns.

        Args:
          step: the number of finished steps.
          state: a pytree of jax.Array.
          data_state: this process's position in the data.
          metrics: what an evaluation at this step measured; None where there was none.

        Returns:
          Whether a save was started; False where this step is saved already.

        Raises:
          UserError: the disk is full or cannot be written, now or in the save before this one.
          ConfigError: ``keep_best`` names none of the metrics.
        """
        import orbax.checkpoint as ocp

        from switch_t5.checkpoint.process_bytes import ProcessBytesSave

        self.wait()
        if step in self._manager.all_steps():
            return False
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(naming.nest(naming.named_leaves(state))),
            data=ProcessBytesSave(data_state),
        )
        self._saving = step
        with self._save_errors():
            values = {name: float(value) for name, value in (metrics or {}).items()}
            self._manager.save(step, args=items, metrics=values, force=True)
        for best in self._config.best_metrics:
            if metrics is not None and best not in metrics:
                raise ConfigError(
                    "CheckpointConfig.keep_best",
                    f"names {best!r}, which is not among the metrics ({', '.join(metrics)}).{closest(best, metrics)}",
                )
        return True

    def wait(self) -> None:
        """Waits until the save under way is whole.

        Raises:
          UserError: that save met a full disk or one that cannot be written.
        """
        if self._saving is not None:
            with self._save_errors():
                self._manager.wait_until_finished()
            self._saving = None

    def close(self) -> None:
        """Waits for the save under way and frees the threads.

        Raises:
          UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            # The manager is made at its first use, and not made only to be closed.
            manager = self.__dict__.pop("_manager", None)
            if manager is not None:
                manager.close()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint, bit for bit, onto any mesh.

        Args:
          abstract_state: a pytree of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint; None for the newest.

        Raises:
          UserError: there is no such checkpoint; it is damaged; a leaf has another shape or dtype, or there
            are other leaves (the sentence names the first); it was saved by another number of processes.
        """
        from switch_t5.checkpoint.process_bytes import ProcessBytesRestore

        step = self._existing(step)
        wanted = naming.named_leaves(abstract_state)
        with self._read_errors(step):
            self._check_fit(step, wanted, self._saved_leaves(step), dtypes=True)
            items = self._read(step, wanted, data=ProcessBytesRestore())
        state = naming.like(abstract_state, naming.named_leaves(items["state"]))
        return Restored(state, items["data"], step)

    def restore_part(self, name: str, abstract_part: Any, step: int | None = None) -> Any:
        """Reads one part of the state, such as the parameters without the optimizer's state.

        Args:
          name: the part's name in the state, such as ``"params"``.
          abstract_part: a pytree of jax.ShapeDtypeStruct with shardings; leaves are cast to its dtypes.
          step: which checkpoint; None for the newest.

        Raises:
          UserError: there is no such checkpoint; it is damaged; a leaf has another shape or is missing.
        """
        step = self._existing(step)
        wanted = naming.named_leaves({name: abstract_part})
        with self._read_errors(step):
            leaves = self._saved_leaves(step)
            saved = {key: leaf for key, leaf in leaves.items() if key.split(naming.SEPARATOR)[0] == name}
            self._check_fit(step, wanted, saved, dtypes=False)
            items = self._read(step, wanted)
        return naming.like({name: abstract_part}, naming.named_leaves(items["state"]))[name]

    def restore_numpy(self, step: int | None = None) -> dict[str, np.ndarray]:
        """Reads a whole state without knowing the model: its arrays by name, such as ``params/embedding``.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        import orbax.checkpoint as ocp

        step = self._existing(step)
        with self._read_errors(step):
            nested = naming.nest(self._saved_leaves(step))
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nested)
            request = ocp.args.PyTreeRestore(nested, restore_args=as_numpy)
            items = self._manager.restore(step, args=ocp.args.Composite(state=request))
        return naming.named_leaves(items["state"])

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a checkpoint.

        Raises:
          UserError: there is no such checkpoint.
        """
        return dict(self._manager.metrics(self._existing(step)) or {})

    def _read(self, step: int, wanted: Mapping[str, Any], **more: ocp.args.CheckpointArgs) -> Any:
        import orbax.checkpoint as ocp

        nested = naming.nest(wanted)
        arguments = ocp.checkpoint_utils.construct_restore_args(nested)
        state = ocp.args.PyTreeRestore(nested, restore_args=arguments, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=state, **more))

    def _saved_leaves(self, step: int) -> dict[str, Any]:
        """Shape and dtype of each leaf in a checkpoint, by name; no array is read."""
        items = self._manager.item_metadata(step)
        if "state" not in items:
            raise FileNotFoundError("it has no state")
        return naming.named_leaves(items["state"].tree)

    def _existing(self, step: int | None) -> int:
        """The step, or the newest; one that is still being saved is waited for."""
        self.wait()
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step is None or step not in steps:
            which = "" if step is None else f" of step {step}"
            have = f"; it has {_listed(steps)}" if steps else ""
            raise UserError(f"{self._directory} holds no checkpoint{which}{have}.")
        return step

    def _check_fit(self, step: int, wanted: Any, saved: Any, *, dtypes: bool) -> None:
        difference = naming.first_difference(wanted, saved, dtypes=dtypes)
        if difference is not None:
            raise UserError(
                f"The checkpoint {self._directory / str(step)} does not fit this configuration: {difference}."
            )

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        _silence_orbax()
        import orbax.checkpoint as ocp

        from switch_t5.checkpoint.process_bytes import (
            ProcessBytesHandler,
            ProcessBytesRestore,
            ProcessBytesSave,
        )

        # Zarr's third version leaves out the compression of the second, which is slow and, on trained
        # parameters, saves next to nothing.
        arrays = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
        data = ProcessBytesHandler()
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, arrays)
        handlers.add("state", ocp.args.PyTreeRestore, arrays)
        handlers.add("data", ProcessBytesSave, data)
        handlers.add("data", ProcessBytesRestore, data)
        return ocp.CheckpointManager(self._directory, handler_registry=handlers, options=self._options())

    def _options(self) -> ocp.CheckpointManagerOptions:
        import orbax.checkpoint as ocp

        config = self._config
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(config.keep)]
        if config.keep_period is not None:
            policies.append(ocp.checkpoint_managers.EveryNSteps(config.keep_period))
        quality = functools.partial(_quality, name=None, mode="max")
        for metric in config.best_metrics:
            quality = functools.partial(_quality, name=metric, mode=config.mode(metric))
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=quality,
                    n=config.keep_best_count,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            # Orbax stores metrics only where it is told of a way to rank them.
            best_fn=quality,
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            create=not self._read_only,
            # A folder that cannot be made then fails in `save`, at once, instead of in a thread for which
            # other threads wait many minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Explains a failed save, and removes what it had written."""
        latest = self.latest_step()
        consequence = (
            "no checkpoint was saved before"
            if latest is None
            else f"the checkpoint of step {latest} is whole, and the same command goes on from it"
        )
        try:
            with storage_errors(f"Saving the checkpoint of step {self._saving} in {self._directory}", consequence):
                yield
        except Exception:
            if jax.process_index() == 0:
                for path in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(path, ignore_errors=True)
            self._saving = None
            raise

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            known = isinstance(error, FileNotFoundError | json.JSONDecodeError)
            if not known and not _DAMAGED.match(str(error)):
                raise
            before = [other for other in self.steps() if other < step]
            instead = f" to use that of step {before[-1]}" if before else ""
            raise UserError(
                f"The checkpoint {self._directory / str(step)} is damaged "
                f"({str(error).splitlines()[0]}): delete that folder{instead}."
            ) from error


def locate_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, int]:
    """Finds the checkpoint that a path names.

    Args:
      path: a ``MODEL_DIR``, for its newest checkpoint, its folder ``checkpoints``, or one checkpoint in it.

    Returns:
      The ``MODEL_DIR`` and the step.

    Raises:
      UserError: the path is none of these, or holds no whole checkpoint.
    """
    path = Path(path).absolute()
    model_dir, step = path, None
    if path.name == DIRECTORY:
        model_dir = path.parent
    elif path.parent.name == DIRECTORY and path.name.isdecimal():
        model_dir, step = path.parent.parent, int(path.name)
    steps = Checkpointer(model_dir, read_only=True).steps()
    if not steps or (step is not None and step not in steps):
        have = f" ({model_dir} has {_listed(steps)})" if steps else ""
        raise UserError(
            f"{path} is no checkpoint{have}: name a MODEL_DIR that has some, or one of its folders "
            f"MODEL_DIR/{DIRECTORY}/<step>."
        )
    return model_dir, steps[-1] if step is None else step


def _listed(steps: list[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def _quality(metrics: Mapping[str, float] | None, *, name: str | None, mode: str) -> float:
    """How good a checkpoint is: greater is better; without the metric, or where it is NaN, the worst."""
    value = math.nan if name is None or metrics is None else metrics.get(name, math.nan)
    if math.isnan(value):
        return -math.inf
    return value if mode == "max" else -value


@functools.cache
def _silence_orbax() -> None:
    """Drops Orbax's log records.

    It logs each thread's traceback of one failure; what a user needs of it is in the exception that the
    failure becomes.
    """
    from absl import logging as absl_logging

    def not_from_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    absl_logging.get_absl_logger().addFilter(not_from_orbax)
