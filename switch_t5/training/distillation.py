"""Distillation: a student learns from a teacher's probabilities beside the text (Fedus et al. 2022, section 4.2).

The teacher runs in the student's step, on the same batch and mesh, as it is evaluated: without dropout or jitter, with
the capacity of evaluation. Its parameters are an argument of the step that nothing changes.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax

from switch_t5.errors import ConfigError, check_types
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Who teaches. How much the student listens is ``LossConfig``'s.

    Attributes:
      teacher: its model.
      checkpoint_path: its parameters, of any format.
      initialize_student: the student, which is dense, starts from all of the teacher's weights but those of experts and
        routers; its feed-forwards in their place are drawn. False draws all.
    """

    teacher: TransformerConfig
    checkpoint_path: str
    initialize_student: bool = False

    def __post_init__(self) -> None:
        check_types(self)

    def check_student(self, student: TransformerConfig, soft_loss_weight: float) -> None:
        """Checks that the student can learn from this teacher.

        Raises:
          ConfigError: they do not share a vocabulary; the student is to start from a teacher of other sizes, or is
            sparse; or nothing is asked of the teacher.
        """
        if self.teacher.vocab_size != student.vocab_size:
            raise ConfigError(
                "DistillationConfig.teacher",
                f"has a vocabulary of {self.teacher.vocab_size} entries and the student one of {student.vocab_size}: "
                "they must be one and the same.",
            )
        if not soft_loss_weight and not self.initialize_student:
            raise ConfigError(
                "TrainConfig.distillation",
                "has no effect: set LossConfig.soft_loss_weight above 0 or DistillationConfig.initialize_student = "
                "True, or distillation = None.",
            )
        if self.initialize_student and any(student.sparse_configs(decoder=decoder) for decoder in (False, True)):
            raise ConfigError(
                "DistillationConfig.initialize_student",
                "starts a dense student, and this one is sparse: set TransformerConfig.moe = None, or "
                "initialize_student = False.",
            )


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["model"])
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model with its parameters, which are only read."""

    model: Model
    params: Params

    def logits(self, batch: Batch) -> Array:
        """``[batch, length, vocab]`` float32, through which no gradient passes."""
        module = self.model.bind(self.params)
        hidden, _ = module(batch)
        return jax.lax.stop_gradient(logits(hidden, module.output_kernel()))


def sequences_dealt(encoder_length: int, model: Model, teacher: Teacher | None) -> int:
    """Sequences that microbatches are dealt in, so that no routing group of student or teacher is split."""
    own = model.config.sequences_per_group(encoder_length)
    return own if teacher is None else math.lcm(own, teacher.model.config.sequences_per_group(encoder_length))
