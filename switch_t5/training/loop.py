"""The training loop: steps, and what happens between them, in a stated order.

After each step: **log**, then **evaluate**, then **checkpoint**, each at its period and at the last step. A
checkpoint comes last so that whatever was written for its step is written before it: a run that dies and
goes on from a checkpoint finds the entries up to that step, and writes the later ones again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import optax

from switch_t5.errors import ConfigError, check_types
from switch_t5.model.upcycling import UpcyclingConfig
from switch_t5.training.distillation import DistillationConfig
from switch_t5.training.graceful_stop import GracefulStop
from switch_t5.training.metrics_file import MetricsFile
from switch_t5.training.optimizers import OptimizerFactory
from switch_t5.training.progress import Progress, Speedometer
from switch_t5.training.state import TrainState
from switch_t5.training.step import Metrics
from switch_t5.training.tensorboard import TensorBoard
from switch_t5.types import Batch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
      model_dir: the run's folder.
      train_steps: updates in all; a restarted run goes on to this number.
      optimizer: what updates the parameters.
      seed: of the parameters' start, dropout and jitter.
      microbatches: equal parts of a batch that are computed one after the other, to save memory.
      log_period: steps between entries of ``metrics.jsonl``; the first step is logged too.
      eval_period: steps between evaluations; 0 for none but at the start and at the end.
      eval_batches: batches that the held-out loss is measured on at the most; 0 measures none.
      checkpoint_period: steps between checkpoints; 0 for none but at the end.
      initial_checkpoint_path: a checkpoint whose parameters a new run starts from: ours, T5X's or Hugging Face's.
      initial_checkpoint_optimizer: takes over the optimizer's state and the step too, so that the training of that
        checkpoint goes on; the data begin anew.
      distillation: the teacher of a run that learns from one; None for none.
      upcycling: how a sparse model is made of the initial checkpoint, a dense one; None takes it as it is.
    """

    model_dir: str
    train_steps: int
    optimizer: OptimizerFactory
    seed: int = 0
    microbatches: int = 1
    log_period: int = 100
    eval_period: int = 1000
    eval_batches: int = 20
    checkpoint_period: int = 1000
    initial_checkpoint_path: str | None = None
    initial_checkpoint_optimizer: bool = False
    distillation: DistillationConfig | None = None
    upcycling: UpcyclingConfig | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if "://" in self.model_dir:
            raise ConfigError("TrainConfig.model_dir", f"must be a local or mounted folder, got {self.model_dir!r}.")
        if self.initial_checkpoint_optimizer and self.initial_checkpoint_path is None:
            raise ConfigError(
                "TrainConfig.initial_checkpoint_optimizer", "has no effect without TrainConfig.initial_checkpoint_path."
            )
        if self.distillation is not None and self.distillation.initialize_student and self.initial_checkpoint_path:
            raise ConfigError(
                "TrainConfig.initial_checkpoint_path",
                "and DistillationConfig.initialize_student both say what the student starts from: set one of them, "
                "the other to None or False.",
            )
        if self.upcycling is not None and self.initial_checkpoint_path is None:
            raise ConfigError("TrainConfig.upcycling", "has no effect without TrainConfig.initial_checkpoint_path.")
        for field, least in {
            "train_steps": 1,
            "microbatches": 1,
            "log_period": 1,
            "eval_period": 0,
            "eval_batches": 0,
            "checkpoint_period": 0,
            "seed": 0,
        }.items():
            if getattr(self, field) < least:
                raise ConfigError(f"TrainConfig.{field}", f"must be at least {least}, got {getattr(self, field)}.")


class Batches(Protocol):
    """Where batches come from: see :class:`switch_t5.data.pipeline.BatchIterator`."""

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, bytes]:
        """The positions after the last batch that are this process's to save, by name."""
        ...


class Saver(Protocol):
    """Where checkpoints go: see :class:`switch_t5.checkpoint.manager.Checkpointer`."""

    def save(self, step: int, state: Any, data_state: Mapping[str, bytes], metrics: Mapping[str, float] | None) -> bool:
        """Starts saving."""
        ...

    def wait(self) -> None:
        """Waits for the save under way."""
        ...


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Where measurements go.

    Attributes:
      metrics: ``metrics.jsonl``.
      tensorboard: curves and histograms.
      progress: the line on the terminal.
      speedometer: tokens per second.
      learning_rate: the schedule, for the record.
      task: the name that evaluations carry.
    """

    metrics: MetricsFile
    tensorboard: TensorBoard
    progress: Progress
    speedometer: Speedometer
    learning_rate: optax.Schedule
    task: str

    def log(self, step: int, metrics: Metrics) -> None:
        """Records a training step."""
        values = {**scalars(metrics), "learning_rate": float(np.asarray(self.learning_rate(step - 1)))}
        self.metrics.write(step, values)
        speed = self.speedometer.tokens_per_second(step)
        self.tensorboard.scalars(step, {**values, **({"tokens_per_second": speed} if speed else {})}, "train")
        self.tensorboard.expert_loads(step, expert_loads(metrics))
        self.progress.log(step, values["loss"], speed, self.speedometer.seconds_left(step))

    def scores(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Records the scores of tasks."""
        for task, values in scores.items():
            record_evaluation(self.metrics, self.tensorboard, step, task, values)
            told = "  ".join(f"{name} {value:.2f}" for name, value in values.items() if isinstance(value, float))
            self.progress.message(f"step {step}  {task}  {told}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Records an evaluation."""
        record_evaluation(self.metrics, self.tensorboard, step, self.task, values)
        self.progress.message(f"step {step}  {self.task}  held-out loss {values['loss']:.4f}")


def record_evaluation(
    metrics: MetricsFile, tensorboard: TensorBoard, step: int, task: str, values: Mapping[str, float]
) -> None:
    """Writes what an evaluation of a task measured: an entry that carries ``task``, and points of curves."""
    metrics.write(step, {"task": task, **values})
    tensorboard.scalars(step, values, f"eval/{task}")


def scalars(metrics: Metrics) -> dict[str, float]:
    """A step's metrics as numbers by name; router statistics as ``<stack>/<sparse layer>/<name>``."""
    values = {"loss": float(metrics["loss"])}
    values |= {name: float(value) for name, value in metrics.items() if name not in ("loss", "router")}
    for stack, stats in metrics["router"].items():
        means = stats.means()
        for name in ("fraction_dropped", "router_entropy", "router_confidence"):
            values |= {f"{stack}/{layer}/{name}": float(mean) for layer, mean in enumerate(means[name])}
        for layer, tokens in enumerate(np.asarray(stats.nonfinite)):
            values |= {f"{stack}/{layer}/nonfinite": float(tokens)} if tokens else {}
    return values


def expert_loads(metrics: Metrics) -> dict[str, np.ndarray]:
    """The fraction of tokens that each expert got, by ``<stack>/<sparse layer>``."""
    return {
        f"{stack}/{layer}": np.asarray(load)
        for stack, stats in metrics["router"].items()
        for layer, load in enumerate(stats.means()["expert_load"])
    }


def train(
    state: TrainState,
    config: TrainConfig,
    *,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Batches,
    place: Callable[[dict[str, np.ndarray]], Batch],
    evaluate: Callable[[Any], dict[str, float]],
    checkpointer: Saver,
    recorder: Recorder,
    stop: GracefulStop,
    begins: bool,
    score: Callable[[Any], Mapping[str, Mapping[str, float]]] | None = None,
) -> TrainState:
    """Trains until ``train_steps`` or until a stop is asked for; the last state is saved either way.

    Args:
      state: where to go on from; its buffers are given away.
      config: the run.
      step_fn: the jitted step.
      batches: numpy batches, positioned after those that the state has seen.
      place: numpy batch to global arrays.
      evaluate: parameters to held-out metrics.
      checkpointer: where states go.
      recorder: where measurements go.
      stop: asks for an early end.
      begins: whether this is a run's start, which is measured and whose first step is recorded; False where it resumes.
      score: parameters to each task's scores; None where no task is scored.

    Returns:
      The last state.
    """

    def measure(step: int, params: Any) -> dict[str, float]:
        """Evaluates, records it, and returns all metrics by name."""
        values: dict[str, float] = {}
        if config.eval_batches:
            values |= evaluate(params)
            recorder.evaluation(step, values)
        scores = {} if score is None else score(params)
        recorder.scores(step, scores)
        return values | {f"{task}/{name}": value for task, of_task in scores.items() for name, value in of_task.items()}

    step, measuring = int(state.step), bool(config.eval_batches) or score is not None
    if begins and measuring:
        measure(step, state.params)
    first, stopping = step + 1, stop.reached(step)
    while step < config.train_steps and not stopping:
        state, metrics = step_fn(state, place(next(batches)))
        step += 1
        # Asked once a step: a signal that comes later must find the next step's save.
        last, stopping = step == config.train_steps, stop.reached(step)
        if step == first:
            jax.block_until_ready(metrics["loss"])
            recorder.speedometer.start(step)
        if (begins and step == first) or last or _due(step, config.log_period):
            recorder.log(step, jax.device_get(metrics))
        recorder.progress.advance(step)

        evaluated = None
        if measuring and (last or _due(step, config.eval_period)):
            with recorder.speedometer.paused():
                evaluated = measure(step, state.params)

        if last or stopping or _due(step, config.checkpoint_period):
            recorder.metrics.sync()
            checkpointer.save(step, state, batches.get_state(), evaluated)
    checkpointer.wait()
    return state


def _due(step: int, period: int) -> bool:
    return period > 0 and step % period == 0
