"""The soft loss against float64 by hand, and a step that has a teacher."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import ConfigError
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.distillation import DistillationConfig, Teacher, sequences_dealt
from switch_t5.training.losses import LossConfig, soft_cross_entropy
from switch_t5.training.state import TrainState
from switch_t5.training.step import train_step
from tests.model.small import random_params
from tests.training.test_step import INPUTS, KEEP_GRADIENTS, MODEL, batch

STUDENT = Model(dataclasses.replace(MODEL.config, moe=None))
PARAMS = random_params(STUDENT, seed=1)
TEACHER = Teacher(MODEL, random_params(MODEL, seed=2))
MIXTURE = LossConfig(hard_loss_weight=0.75, soft_loss_weight=0.25, temperature=2.0, z_loss=1e-2)


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Hidden ``[2, 3, 4]``, output kernel ``[5, 4]``, the teacher's logits ``[2, 3, 5]`` and weights ``[2, 3]``."""
    random = np.random.default_rng(seed)
    hidden, kernel, taught = (random.normal(size=shape) for shape in ((2, 3, 4), (5, 4), (2, 3, 5)))
    return hidden, kernel, 3 * taught, np.array([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_soft_loss_and_its_gradient_are_those_of_float64(temperature: float) -> None:
    hidden, kernel, taught, weights = arrays()
    student = softmax(hidden @ kernel.T / temperature)
    teacher = softmax(taught / temperature)
    expected = -(temperature**2) * np.sum(teacher * np.log(student) * weights[..., None])
    # d loss / d logits: T^2 (p - q) / T.
    d_values = temperature * (student - teacher) * weights[..., None]

    def loss(hidden: Any, kernel: Any, taught: Any) -> Any:
        return soft_cross_entropy(hidden, kernel, taught, jnp.asarray(weights, jnp.float32), temperature=temperature)

    arguments = [jnp.asarray(value, jnp.float32) for value in (hidden, kernel, taught)]
    found, (d_hidden, d_kernel, d_taught) = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, d_values @ kernel, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(d_kernel, np.einsum("blv,bld->vd", d_values, hidden), rtol=2e-5, atol=1e-6)
    assert not np.any(d_taught)


def test_a_student_that_agrees_pays_the_teachers_entropy_and_learns_nothing() -> None:
    hidden, kernel, _, weights = (jnp.asarray(value, jnp.float32) for value in arrays())
    taught = logits(hidden, kernel)
    loss, gradient = jax.value_and_grad(soft_cross_entropy)(hidden, kernel, taught, weights)
    probs = np.asarray(softmax(np.asarray(taught, np.float64)))
    entropy = -np.sum(probs * np.log(probs), axis=-1)
    np.testing.assert_allclose(loss, np.sum(entropy * np.asarray(weights)), rtol=1e-6)
    assert np.abs(gradient).max() < 1e-6


def test_a_teacher_of_another_vocabulary_or_length_is_refused_in_one_sentence() -> None:
    hidden, kernel, taught, weights = (jnp.asarray(value, jnp.float32) for value in arrays())
    for other in (taught[..., :4], taught[:, :2]):
        with pytest.raises(ConfigError) as caught:
            soft_cross_entropy(hidden, kernel, other, weights)
        assert str(caught.value) == (
            f"DistillationConfig.teacher gives logits of shape {other.shape} (batch, length, vocabulary), and the "
            "student (2, 3, 5): both must read the same batch with the same vocabulary."
        )


@functools.cache
def outcome(config: LossConfig, *, microbatches: int = 1, taught: bool = True) -> tuple[Any, dict[str, Any]]:
    """Gradients and metrics of the student."""
    state = TrainState(jnp.asarray(0, jnp.int32), PARAMS, PARAMS)
    step = functools.partial(
        train_step, model=STUDENT, optimizer=KEEP_GRADIENTS, config=config, microbatches=microbatches
    )
    after, metrics = jax.jit(step)(state, batch(), teacher=TEACHER if taught else None)
    return after.opt_state, metrics


def test_the_loss_mixes_hard_and_soft_and_both_are_reported_apart() -> None:
    _, metrics = outcome(MIXTURE)

    @jax.jit
    def expected(given: dict[str, jax.Array]) -> jax.Array:
        module, weights = STUDENT.bind(PARAMS), given["decoder_loss_weights"]
        hidden, taught = module(given)[0], TEACHER.logits(given)
        return soft_cross_entropy(hidden, module.output_kernel(), taught, weights, temperature=2.0) / jnp.sum(weights)

    soft = expected(batch())
    np.testing.assert_allclose(metrics["soft_cross_entropy"], soft, rtol=1e-5)
    mixed = 0.75 * metrics["cross_entropy"] + 0.25 * metrics["soft_cross_entropy"] + metrics["z_loss"]
    np.testing.assert_allclose(metrics["loss"], mixed, rtol=1e-6)
    assert abs(metrics["cross_entropy"] - metrics["soft_cross_entropy"]) > 0.1


def test_gradients_of_the_mixture_are_the_mixture_of_gradients() -> None:
    mixed = outcome(dataclasses.replace(MIXTURE, z_loss=0.0))[0]
    hard = outcome(LossConfig(z_loss=0.0), taught=False)[0]
    soft = outcome(LossConfig(hard_loss_weight=0.0, soft_loss_weight=1.0, temperature=2.0, z_loss=0.0))[0]

    def compare(found: Any, one: Any, other: Any) -> None:
        np.testing.assert_allclose(found, 0.75 * one + 0.25 * other, rtol=1e-3, atol=1e-6)

    jax.tree.map(compare, mixed, hard, soft)


def test_microbatches_add_up_with_a_teacher_whose_groups_are_kept_whole() -> None:
    groups_of_two = Model(
        dataclasses.replace(MODEL.config, moe=MoEConfig(3, group_size=2 * INPUTS, eval_capacity_factor=1.0))
    )
    assert sequences_dealt(INPUTS, STUDENT, None) == 1
    assert sequences_dealt(INPUTS, STUDENT, dataclasses.replace(TEACHER, model=groups_of_two)) == 2
    whole, parts = (outcome(MIXTURE, microbatches=count) for count in (1, 4))
    np.testing.assert_allclose(parts[1]["soft_cross_entropy"], whole[1]["soft_cross_entropy"], rtol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6), parts[0], whole[0])


def test_students_that_cannot_learn_from_their_teacher_are_refused() -> None:
    config = DistillationConfig(MODEL.config, "/teacher", initialize_student=True)
    config.check_student(STUDENT.config, 0.25)
    with pytest.raises(ConfigError, match="has a vocabulary of 32 entries and the student one of 48"):
        config.check_student(dataclasses.replace(STUDENT.config, vocab_size=48), 0.25)
    with pytest.raises(ConfigError, match="starts a dense student, and this one is sparse"):
        config.check_student(MODEL.config, 0.25)
    dataclasses.replace(config, initialize_student=False).check_student(MODEL.config, 0.25)
    with pytest.raises(ConfigError, match=r"TrainConfig\.distillation has no effect: set LossConfig\.soft_loss_weight"):
        dataclasses.replace(config, initialize_student=False).check_student(STUDENT.config, 0.0)


def test_weights_and_temperatures_that_make_no_loss_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature must be above 0, got 0\."):
        LossConfig(temperature=0)
    with pytest.raises(ConfigError, match="soft_loss_weight must not be negative"):
        LossConfig(soft_loss_weight=-0.1)
    with pytest.raises(ConfigError, match="and soft_loss_weight are both 0: nothing would be learnt"):
        LossConfig(hard_loss_weight=0)
