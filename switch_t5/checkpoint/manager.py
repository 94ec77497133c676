"""Checkpoints of a run: ``MODEL_DIR/checkpoints/<step>/``.

One checkpoint holds the state (parameters, optimizer, step), the positions in the data, and the
metrics measured at that step. Orbax writes it: in the background, into a folder that gets its final name
only when everything is in it, so that a folder named by a step is always whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from switch_t5.checkpoint import fingerprint, naming, snapshot
from switch_t5.checkpoint.agreement import agreed, meet
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.checkpoint.run_folder import DIRECTORY, chosen_step, listed, run_and_step
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.checkpoint.writer_lock import WriterLock
from switch_t5.errors import ConfigError, UserError, closest
from switch_t5.storage import FAILING, storage_errors, writable_directory

# Orbax takes most of a second to import; a run meets it with its first checkpoint.
if TYPE_CHECKING:
    import orbax.checkpoint as ocp

    from switch_t5.checkpoint.manifest import Manifest

# How tensorstore begins an error about a file that is damaged or gone, or that the disk cannot read.
_DAMAGED = re.compile(r"(DATA_LOSS|NOT_FOUND|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE|UNKNOWN|INTERNAL)\b")
# How tensorstore begins any error of its own, such as "UNAVAILABLE: ...".
_STATUS = re.compile(r"[A-Z_]{5,}: ")


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
      state: a pytree of jax.Array, structured and sharded as asked.
      data_state: the positions in the data that were asked for, by name.
      step: the checkpoint's step.
    """

    state: Any
    data_state: dict[str, bytes]
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
          UserError: the folder cannot be made or written, or another run is writing it.
        """
        self._directory = Path(model_dir).absolute() / DIRECTORY
        self._config = config or CheckpointConfig()
        self._read_only = read_only
        self._saving: int | None = None
        self._in_flight_gb = 1
        self._failures: list[Exception] = []
        self._lock: WriterLock | None = None
        if not read_only:
            writable_directory(model_dir)
            writable_directory(self._directory)
            if jax.process_index() == 0:
                self._lock = WriterLock(self._directory.parent)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def directory(self) -> Path:
        """The folder of the checkpoints."""
        return self._directory

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdecimal())

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Any, data_state: Mapping[str, bytes], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts saving a checkpoint; waits only for the save before it.

        The state's buffers may be donated as soon as this returns.

        Args:
          step: the number of finished steps.
          state: a pytree of jax.Array.
          data_state: the positions in the data that are this process's to save, by name.
          metrics: what an evaluation at this step measured; None where there was none.

        Returns:
          Whether a save was started; False where this step is saved already.

        Raises:
          UserError: more saves in a row than ``tolerated_failures`` have failed by the disk, which is full, cannot be
            written or does not keep what it is given; fewer are told on standard error.
          ConfigError: ``keep_best`` names none of the metrics.
        """
        with self._tolerated():
            self._finish_save()
        with self._tolerated():
            return self._start_save(step, state, data_state, metrics)
        return False

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """Counts a save that storage made fail and goes on, unless there were too many; any other error passes."""
        try:
            yield
        except ConfigError:
            raise
        except (UserError, OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _STATUS.match(str(error)):
                raise
            self._failures.append(error)
            if len(self._failures) > self._config.tolerated_failures:
                raise
            print(f"{error} It is tried again at the next checkpoint.", file=sys.stderr, flush=True)

    def _start_save(
        self, step: int, state: Any, data_state: Mapping[str, bytes], metrics: Mapping[str, float] | None
    ) -> bool:
        import orbax.checkpoint as ocp

        from switch_t5.checkpoint.data_positions import DataPositionsSave
        from switch_t5.checkpoint.manifest import PROMISE, ManifestSave
        from switch_t5.checkpoint.orbax_manager import to_save

        leaves = naming.named_leaves(state)
        in_flight_gb = 1 + max(map(_largest_shard, leaves.values())) // 10**9
        if in_flight_gb > self._in_flight_gb:
            self._forget_manager()
            self._in_flight_gb = in_flight_gb
        if step in self._manager.all_steps():
            return False
        copies = snapshot.held(leaves)
        items = ocp.args.Composite(
            state=to_save(copies),
            data=DataPositionsSave(data_state),
            manifest=ManifestSave(snapshot.fingerprints(leaves, copies), leaves),
        )
        self._saving = step
        with self._save_errors():
            values = {name: float(value) for name, value in (metrics or {}).items()}
            try:
                self._manager.save(step, args=items, metrics=values, custom_metadata=PROMISE, force=True)
            finally:
                jax.block_until_ready(copies)  # The first of them are being written.
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
          UserError: that save met a full disk or one that cannot be written, or did so when it began.
        """
        try:
            self._finish_save()
            if self._failures:
                raise self._failures[-1]
        finally:
            self._failures.clear()

    def _finish_save(self) -> None:
        if self._saving is not None:
            with self._save_errors():
                self._manager.wait_until_finished()
            self._saving = None
            self._failures.clear()

    def close(self) -> None:
        """Waits for the save under way and frees the threads.

        Raises:
          UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            # The manager is made at its first use, and not made only to be closed.
            self._forget_manager()
            if self._lock is not None:
                self._lock.release()

    def _forget_manager(self) -> None:
        manager = self.__dict__.pop("_manager", None)
        if manager is not None:
            manager.close()

    def restore(
        self, abstract_state: Any, step: int | None = None, positions: Collection[str] | None = None
    ) -> Restored:
        """Reads a checkpoint, bit for bit, onto any mesh, and checks each array against its fingerprint.

        Args:
          abstract_state: a pytree of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint; None for the newest sound one: a damaged one is told on standard error and put aside.
          positions: names of the positions in the data that this process needs; None for all.

        Raises:
          CheckpointDamaged: the checkpoint is damaged; with no step given, all of them.
          UserError: there is no such checkpoint; a leaf has another shape or dtype, or there are other leaves (the
            sentence names the first); a position was not saved.
        """
        if step is not None:
            return self._restore(abstract_state, step, positions)
        while True:
            newest = self._existing(None)
            try:
                return self._restore(abstract_state, newest, positions)
            except CheckpointDamaged as error:
                self._put_aside(newest, error)

    def _put_aside(self, step: int, error: CheckpointDamaged) -> None:
        """Renames a damaged checkpoint, so that nothing takes it for one; the last of all is left for its owner."""
        if self._read_only or len(self.steps()) == 1:
            raise error
        aside = self._directory / f"{step}.damaged"
        reason = str(error).rsplit(": delete that folder", 1)[0]
        print(f"{reason}; it is now {aside.name}, and step {self.steps()[-2]} is used.", file=sys.stderr, flush=True)
        self._forget_manager()
        meet("damaged checkpoint seen")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        meet("damaged checkpoint renamed")

    def _restore(self, abstract_state: Any, step: int, positions: Collection[str] | None) -> Restored:
        import orbax.checkpoint as ocp

        from switch_t5.checkpoint.data_positions import DataPositionsRestore
        from switch_t5.checkpoint.native_restore import read_arrays

        step = self._existing(step)
        wanted = naming.named_leaves(abstract_state)
        with agreed(self._folder(step)), self._read_errors(step):
            manifest, saved = self._described(step)
            naming.check_fit(self._folder(step), wanted, saved, dtypes=True)
            data = self._manager.restore(step, args=ocp.args.Composite(data=DataPositionsRestore(positions)))["data"]
        with self._read_errors(step):
            leaves = read_arrays(self._folder(step), wanted, saved, manifest)
        return Restored(naming.like(abstract_state, leaves), data, step)

    def restore_part(self, name: str, abstract_part: Any, step: int | None = None) -> Any:
        """Reads one part of the state, such as the parameters without the optimizer's state.

        Args:
          name: the part's name in the state, such as ``"params"``; empty for all of it.
          abstract_part: a pytree of jax.ShapeDtypeStruct with shardings; leaves are cast to its dtypes.
          step: which checkpoint; None for the newest.

        Raises:
          CheckpointDamaged: the checkpoint is damaged.
          UserError: there is no such checkpoint; a leaf has another shape or is missing.
        """
        from switch_t5.checkpoint import native_restore

        step = self._existing(step)
        with agreed(self._folder(step)), self._read_errors(step):
            manifest, saved = self._described(step)
        with self._read_errors(step):
            return native_restore.restore_part(self._folder(step), name, abstract_part, saved, manifest)

    def fits(self, name: str, abstract_part: Any, step: int) -> bool:
        """Whether a part of a checkpoint, all of it where ``name`` is empty, has these leaves, of these shapes."""
        with self._read_errors(step):
            saved = naming.part(self._described(step)[1], name)
        return naming.first_difference(naming.leaves_of_part(name, abstract_part), saved, dtypes=False) is None

    def restore_numpy(self, step: int | None = None) -> dict[str, np.ndarray]:
        """Reads a whole state without knowing the model: its arrays by name, such as ``params/embedding``.

        Raises:
          CheckpointDamaged: the checkpoint is damaged.
          UserError: there is no such checkpoint.
        """
        from switch_t5.checkpoint.manifest import check_arrays
        from switch_t5.checkpoint.native_files import open_native

        step = self._existing(step)
        folder = self._folder(step)
        with self._read_errors(step):
            manifest, saved = self._described(step)
            stored = open_native(folder, step, saved).arrays
            leaves = {name: array.whole() for name, array in stored.items()}
            if manifest is not None:
                parts = {name: fingerprint.begin(leaf) for name, leaf in leaves.items()}
                check_arrays(folder, manifest, fingerprint.finish(parts))
        return leaves

    def leaves(self, step: int) -> dict[str, Any]:
        """Shape and dtype of each array of a checkpoint, by name; files are checked, no array is read.

        Raises:
          CheckpointDamaged: the checkpoint is damaged.
          UserError: there is no such checkpoint.
        """
        step = self._existing(step)
        with self._read_errors(step):
            return self._described(step)[1]

    def _described(self, step: int) -> tuple[Manifest | None, dict[str, Any]]:
        """What a checkpoint must be, None if it does not say, and its leaves by name: shapes and dtypes.

        Its files are checked; no array is read.
        """
        from switch_t5.checkpoint.manifest import check_files, read_manifest

        folder = self._folder(step)
        manifest = read_manifest(folder)
        if manifest is not None:
            check_files(folder, manifest)
            return manifest, dict(manifest.leaves)
        items = self._manager.item_metadata(step)
        if "state" not in items:
            raise FileNotFoundError("it has no state")
        return None, naming.named_leaves(items["state"].tree)

    def _folder(self, step: int) -> str:
        return str(self._directory / str(step))

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a checkpoint.

        Raises:
          UserError: there is no such checkpoint.
        """
        return dict(self._manager.metrics(self._existing(step)) or {})

    def _existing(self, step: int | None) -> int:
        """The step, or the newest; one that is still being saved is waited for."""
        self.wait()
        steps = self.steps()
        if step is None and steps:
            return steps[-1]
        if step is None or step not in steps:
            which = "" if step is None else f" of step {step}"
            have = f"; it has {listed(steps)}" if steps else ""
            raise UserError(f"{self._directory} holds no checkpoint{which}{have}.")
        return step

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        from switch_t5.checkpoint.orbax_manager import make_manager

        return make_manager(self._directory, self._config, read_only=self._read_only, in_flight_gb=self._in_flight_gb)

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Explains a failed save, and removes what it had written."""
        consequence = self._consequence()
        doing = f"Saving the checkpoint of step {self._saving} in {self._directory}"
        try:
            with storage_errors(doing, consequence):
                yield
        except Exception as error:
            if jax.process_index() == 0:
                for path in self._directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(path, ignore_errors=True)
            self._saving = None
            if jax.process_count() == 1:  # Processes would have to do it together, and others may not have failed.
                with contextlib.suppress(OSError):  # The same disk's, and this error is the first.
                    self._manager.reload()  # Orbax has forgotten those that it would have deleted.
            if isinstance(error, CheckpointDamaged):
                raise UserError(
                    f"{doing} failed ({str(error).rstrip('.')}): see to that disk; {consequence}."
                ) from error
            raise

    def _consequence(self) -> str:
        """What a failed save leaves its run with."""
        try:
            latest = self.latest_step()
        except OSError as error:
            return f"which checkpoints there are cannot be told ({error.strerror})"
        if latest is None:
            return "no checkpoint was saved before"
        return f"the checkpoint of step {latest} is whole, and the same command goes on from it"

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, OSError, CheckpointDamaged) as error:
            known = isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError | CheckpointDamaged)
            unreadable = getattr(error, "errno", None) in FAILING
            if not known and not unreadable and not _DAMAGED.match(str(error)):
                raise
            steps = self.steps()
            others = [other for other in steps if other < step] or [other for other in steps if other > step]
            what = f"The checkpoint {self._folder(step)} is damaged ({str(error).splitlines()[0].rstrip('.')})"
            if others:
                raise CheckpointDamaged(f"{what}: delete that folder to use that of step {others[-1]}.") from error
            aside = ", ".join(sorted(path.name for path in self._directory.glob("*.damaged")))
            other = f"no other but {aside}, put aside before" if aside else "no other"
            raise CheckpointDamaged(f"{what}, and there is {other}: copy it again, or begin anew.") from error


def locate_checkpoint(path: str | os.PathLike[str]) -> tuple[Path, int]:
    """Finds the checkpoint that a path names.

    Args:
      path: a ``MODEL_DIR``, for its newest checkpoint, its folder ``checkpoints``, or one checkpoint in it.

    Returns:
      The ``MODEL_DIR`` and the step.

    Raises:
      UserError: the path is none of these, or holds no whole checkpoint.
    """
    place = str(Path(path).absolute())
    model_dir = Path(run_and_step(place)[0])
    return model_dir, chosen_step(place, Checkpointer(model_dir, read_only=True).steps())


def _largest_shard(leaf: Any) -> int:
    """Bytes of the largest part of an array that this process writes at once."""
    if not isinstance(leaf, jax.Array):
        return leaf.nbytes
    return max((shard.data.nbytes for shard in leaf.addressable_shards), default=0)
