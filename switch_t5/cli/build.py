"""The one place where a configuration becomes a run: every part is made and joined here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.checkpoint import naming
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.cli.configuration import Configuration
from switch_t5.data.pipeline import DataConfig, evaluation_batches, get_vocabulary
from switch_t5.errors import ConfigError
from switch_t5.inference.config import DecodingConfig, EvaluationConfig
from switch_t5.inference.evaluator import EVALUATION_METRICS, evaluate
from switch_t5.inference.predictor import Predictor
from switch_t5.inference.task_scores import SUMMARY, TaskScorer, scored_tasks
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.upcycling import check_upcycled
from switch_t5.partitioning.mesh import MeshConfig, batch_shards, make_mesh
from switch_t5.partitioning.placement import BatchRows, batch_rows, batch_sharding, place_batch, tree_shardings
from switch_t5.partitioning.rules import partitioned
from switch_t5.routing.capacity import group_shape, sequences_per_group
from switch_t5.training.distillation import Teacher
from switch_t5.training.loop import TrainConfig
from switch_t5.training.losses import LossConfig
from switch_t5.training.optimizers import state_axes
from switch_t5.training.state import TrainState
from switch_t5.training.step import Metrics, eval_step, train_step
from switch_t5.types import Batch, Params

ROOTS = (
    "TransformerConfig",
    "LossConfig",
    "MeshConfig",
    "DataConfig",
    "TrainConfig",
    "CheckpointConfig",
    "DecodingConfig",
    "EvaluationConfig",
)
"""The configurables that a run is made of."""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Everything that a configuration says about a run."""

    transformer: TransformerConfig
    loss: LossConfig
    mesh: MeshConfig
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    decoding: DecodingConfig = dataclasses.field(default_factory=DecodingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    @classmethod
    def read(cls, configuration: Configuration) -> RunSpec:
        """Builds every part, and checks what concerns one part alone.

        Raises:
          UserError: a value is missing or refused.
        """
        spec = cls(
            transformer=configuration.get("TransformerConfig"),
            loss=configuration.get("LossConfig"),
            mesh=configuration.get("MeshConfig"),
            data=configuration.get("DataConfig"),
            train=configuration.get("TrainConfig"),
            checkpoint=configuration.get("CheckpointConfig"),
            decoding=configuration.get("DecodingConfig"),
            evaluation=configuration.get("EvaluationConfig"),
        )
        spec._check_router_losses()
        spec._check_teacher()
        if spec.train.upcycling is not None:
            check_upcycled(spec.transformer)
        return spec.with_best_of_tasks()

    def with_best_of_tasks(self) -> RunSpec:
        """With the metrics named by which the best checkpoints are kept, where the configuration says ``tasks``.

        Raises:
          UserError: the configuration names a metric that is not measured.
        """
        tasks = scored_tasks(self.data, self.evaluation) if self.checkpoint.keep_best else ()
        known = {f"{task}/{SUMMARY}" for task in tasks}
        best = tuple(sorted(known)) if self.checkpoint.keep_best == "tasks" else self.checkpoint.best_metrics
        for metric in best:
            # Which metrics a task has beside its score is known once it is scored.
            if metric not in EVALUATION_METRICS and metric.rpartition("/")[0] not in tasks:
                raise ConfigError(
                    "CheckpointConfig.keep_best",
                    f"must be one of {', '.join([*EVALUATION_METRICS, 'tasks', *sorted(known)])}, got {metric!r}.",
                )
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, keep_best=best or None))

    def _check_router_losses(self) -> None:
        layers = [moe for decoder in (False, True) for moe in self.transformer.sparse_configs(decoder=decoder)]
        if self.loss.load_loss_weight and all(moe.router.exploration != "gaussian" for moe in layers):
            raise ConfigError(
                "LossConfig.load_loss_weight",
                f"is {self.loss.load_loss_weight}, but the load loss is of gaussian noise, which no router here has; "
                "set RouterConfig.exploration = 'gaussian', or the weight to 0.",
            )
        if self.loss.decoder_load_balance_loss_weight is not None and not self.transformer.sparse_configs(decoder=True):
            raise ConfigError(
                "LossConfig.decoder_load_balance_loss_weight",
                "has no effect: no block of the decoder is sparse; leave it at None.",
            )
        # The weights of the other losses are set by default and by the conventions, whatever the router.
        if self.loss.importance_loss_weight and not any(moe.router.has_kernel for moe in layers):
            raise ConfigError(
                "LossConfig.importance_loss_weight",
                f"is {self.loss.importance_loss_weight}, but no router here has probabilities that it could even out; "
                "set it to 0.",
            )

    def _check_teacher(self) -> None:
        weight = self.loss.soft_loss_weight
        if self.train.distillation is not None:
            self.train.distillation.check_student(self.transformer, weight)
        elif weight:
            raise ConfigError(
                "LossConfig.soft_loss_weight",
                f"is {weight}, but there is no teacher: give TrainConfig.distillation = @DistillationConfig(), or set "
                "the weight to 0.",
            )


class Run:
    """A run's model on its mesh, with the functions that work on it.

    Attributes:
      spec: what was asked for.
      mesh: the devices.
      model: the structure.
      optimizer: what updates the parameters.
      teacher: the structure of what the model learns from beside its targets; None for none.
    """

    def __init__(self, spec: RunSpec, mesh: Mesh | None = None) -> None:
        self.spec = spec
        self.mesh = make_mesh(spec.mesh) if mesh is None else mesh
        self.rules = spec.mesh.axis_rules
        self.model = Model(spec.transformer)
        self.optimizer = spec.train.optimizer(self.model.axes)
        self.teacher = None
        check_batch(spec, self.mesh)
        if spec.train.distillation is not None and spec.loss.soft_loss_weight:
            self.teacher = Model(spec.train.distillation.teacher)
            check_batch(dataclasses.replace(spec, transformer=self.teacher.config), self.mesh)
        _ = self.state_shardings

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The training state's shapes and dtypes, with shardings."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self.state_shardings,
        )

    @functools.cached_property
    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._init, jax.random.key(0))

    @functools.cached_property
    def state_shardings(self) -> Any:
        """Where each array of the training state lives: a ``TrainState`` of shardings."""
        shapes = self._shapes
        params = tree_shardings(self.mesh, shapes.params, self.model.axes, self.rules.at_rest)
        axes = state_axes(shapes.opt_state, shapes.params, self.model.axes)
        opt_state = tree_shardings(self.mesh, shapes.opt_state, axes, self.rules.at_rest)
        step: Any = NamedSharding(self.mesh, PartitionSpec())
        return TrainState(step, params, opt_state)

    def _init(self, rng: jax.Array) -> TrainState:
        params = self.model.init(rng)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

    def init_state(self) -> TrainState:
        """A new state, made on the devices that hold its parts."""
        init = jax.jit(self._init, out_shardings=self.state_shardings)
        return init(jax.random.key(self.spec.train.seed))

    def new_params(self, names: tuple[str, ...]) -> dict[str, jax.Array]:
        """Some of the parameters that :meth:`init_state` draws, by names such as ``params/encoder/.../router``."""
        shardings = naming.named_leaves({"params": self.state_shardings.params})

        def draw(rng: jax.Array) -> dict[str, jax.Array]:
            drawn = naming.named_leaves({"params": self.model.init(rng)})
            return {name: drawn[name] for name in names}

        init = jax.jit(draw, out_shardings={name: shardings[name] for name in names})
        return init(jax.random.key(self.spec.train.seed))

    def with_params(self, params: Params) -> TrainState:
        """A new state with these parameters."""
        init = jax.jit(self.optimizer.init, out_shardings=self.state_shardings.opt_state)
        step = jax.device_put(jnp.zeros((), jnp.int32), self.state_shardings.step)
        return TrainState(step, params, init(params))

    @functools.cached_property
    def rows(self) -> BatchRows:
        """The rows of a batch that this process reads and places."""
        return batch_rows(self.mesh, self.spec.data.batch_size)

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch, of the rows that this process holds, to global arrays."""
        return dict(place_batch(batch, self.mesh))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a training batch."""
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in batch_shapes(self.spec.data).items()
        }

    @functools.cached_property
    def abstract_teacher(self) -> Params:
        """The shapes and dtypes of the teacher's parameters, with shardings of the same rules."""
        assert self.teacher is not None
        shapes = self.teacher.abstract_params
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            tree_shardings(self.mesh, shapes, self.teacher.axes, self.rules.at_rest),
        )

    def compile_train_step(self) -> jax.stages.Compiled:
        """The training step, compiled; it takes over its state's buffers, and reads a teacher's parameters third."""
        spec = self.spec

        def step(state: TrainState, batch: Batch, taught_by: Params | None = None) -> tuple[TrainState, Metrics]:
            return train_step(
                state,
                batch,
                model=self.model,
                optimizer=self.optimizer,
                config=spec.loss,
                microbatches=spec.train.microbatches,
                seed=spec.train.seed,
                teacher=None if self.teacher is None or taught_by is None else Teacher(self.teacher, taught_by),
            )

        # One process reads metrics wherever they lie; of several each needs them whole.
        metrics = None if jax.process_count() == 1 else NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, metrics))
        more = () if self.teacher is None else (self.abstract_teacher,)
        with partitioned(self.mesh, self.rules):
            return jitted.lower(self.abstract_state, self.abstract_batch(), *more).compile()

    @functools.cached_property
    def eval_step(self) -> Callable[[Params, Any], dict[str, Any]]:
        """Parameters and a placed batch to sums; compiled at its first call."""
        jitted = jax.jit(functools.partial(eval_step, model=self.model))

        def call(params: Params, batch: Any) -> dict[str, Any]:
            with partitioned(self.mesh, self.rules):
                return jitted(params, batch)

        return call

    @functools.cached_property
    def evaluation_batches(self) -> list[dict[str, np.ndarray]]:
        """The held-out batches, this process's rows, read once and kept: evaluations come often and see the same."""
        data = dataclasses.replace(self.spec.data, split="validation", shuffle=False)
        try:
            return list(evaluation_batches(data, self.spec.train.eval_batches, self.rows))
        except ConfigError as error:
            if error.parameter != "DataConfig.split":
                raise
            raise ConfigError(
                "TrainConfig.eval_batches",
                f"is {self.spec.train.eval_batches}, but {data.mixture_or_task_name} has no validation split; set it "
                "to 0 to train without evaluations.",
            ) from None

    def evaluate(self, params: Params) -> dict[str, float]:
        """Held-out loss and accuracy."""
        return evaluate(self.eval_step, params, self.evaluation_batches, self.place)

    @functools.cached_property
    def scorer(self) -> TaskScorer | None:
        """What scores the tasks, their rows read; None where there is none to score.

        Raises:
          UserError: a task's rows are absent or malformed.
        """
        if not scored_tasks(self.spec.data, self.spec.evaluation):
            return None
        return TaskScorer(self.spec.data, self.spec.evaluation, lambda: self.predictor)

    @functools.cached_property
    def predictor(self) -> Predictor:
        """What decodes inputs; compiled at its first use.

        Raises:
          ConfigError: the devices cannot share its batch.
        """
        data, decoding = self.spec.data, self.spec.decoding
        shards = batch_shards(self.mesh)
        batch_size = decoding.batch_size or data.batch_size
        if batch_size % shards:
            raise ConfigError(
                "DecodingConfig.batch_size",
                f"is {batch_size}, which {shards} batch shards do not divide; the nearest that they do is "
                f"{max(1, round(batch_size / shards)) * shards}.",
            )
        eos_id = get_vocabulary(data).eos_id
        assert eos_id is not None
        lengths = data.task_feature_lengths
        rows = batch_rows(self.mesh, batch_size)
        return Predictor(
            self.spec.transformer,
            decoding,
            lengths=(lengths["inputs"], lengths["targets"]),
            batch_size=batch_size,
            eos_id=eos_id,
            mesh=self.mesh,
            rules=self.rules,
            place=lambda batch: self.place({name: values[rows.held] for name, values in batch.items()}),
        )


def batch_shapes(data: DataConfig) -> dict[str, tuple[tuple[int, int], str]]:
    """Shape and dtype of each feature of a batch, as the data pipeline makes them."""
    shapes = {}
    for stack, feature in (("encoder", "inputs"), ("decoder", "targets")):
        shape = (data.batch_size, data.task_feature_lengths[feature])
        names = ["encoder_input_tokens"] if stack == "encoder" else ["decoder_input_tokens", "decoder_target_tokens"]
        names += [f"{stack}_segment_ids", f"{stack}_positions"] if data.pack else []
        shapes |= dict.fromkeys(names, (shape, "int32"))
    return shapes | {"decoder_loss_weights": (shapes["decoder_input_tokens"][0], "float32")}


def check_batch(spec: RunSpec, mesh: Mesh) -> None:
    """Checks that the batch divides over microbatches, devices and routing groups, and experts over devices.

    Raises:
      ConfigError: it does not.
    """
    batch, microbatches, shards = spec.data.batch_size, spec.train.microbatches, batch_shards(mesh)
    if batch % (microbatches * shards):
        nearest = max(1, round(batch / (microbatches * shards))) * microbatches * shards
        raise ConfigError(
            "DataConfig.batch_size",
            f"is {batch}, which {microbatches} microbatch(es) x {shards} batch shards do not divide; the nearest "
            f"that they do is {nearest}.",
        )
    group_size = spec.transformer.group_size
    if group_size is None:
        return
    _check_expert_partitions(spec)
    if group_size == "sequence":
        return
    length = spec.data.task_feature_lengths["inputs"]
    sequences, share = sequences_per_group(group_size, length), batch // (microbatches * shards)
    for feature, tokens in spec.data.task_feature_lengths.items():
        if tokens > group_size and 2 * group_shape(1, tokens, group_size, 1)[1] < group_size:
            raise ConfigError(
                "MoEConfig.group_size",
                f"is {group_size}, but {tokens} tokens of {feature} have no divisor near it; set it to {tokens}, "
                "or choose another length.",
            )
    # A group larger than a device's share would depend on the mesh, and so would the result.
    if share % sequences:
        fitting = max(divisor for divisor in range(1, min(sequences, share) + 1) if share % divisor == 0)
        raise ConfigError(
            "MoEConfig.group_size",
            f"is {group_size}, {sequences} sequences of {length} tokens, which do not divide a device's share of a "
            f"microbatch, {share} sequence(s); set it to {fitting * length}.",
        )


def _check_expert_partitions(spec: RunSpec) -> None:
    transformer, partitions = spec.transformer, spec.mesh.num_expert_partitions
    experts = {
        stack: moe.num_experts
        for stack in ("encoder", "decoder")
        # All sparse layers of a stack have as many experts.
        for moe in transformer.sparse_configs(decoder=stack == "decoder")
    }
    for stack, count in experts.items():
        if count % partitions:
            raise ConfigError(
                "MeshConfig.num_expert_partitions",
                f"is {partitions}, which does not divide the {count} experts of the {stack}; "
                f"{_nearest_divisor(math.gcd(*experts.values()), partitions)} does.",
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
