"""The training and evaluation steps: pure functions of state and batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from switch_t5.model.functional import Model
from switch_t5.model.router_bias import update_router_biases
from switch_t5.model.transformer import logits
from switch_t5.training.distillation import Teacher, sequences_dealt
from switch_t5.training.losses import (
    LossConfig,
    Totals,
    batch_totals,
    cross_entropy,
    router_losses,
    soft_cross_entropy,
)
from switch_t5.training.state import TrainState
from switch_t5.types import Array, Batch, Params

Metrics = dict[str, Any]


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Model,
    optimizer: optax.GradientTransformation,
    config: LossConfig,
    microbatches: int = 1,
    seed: int = 0,
    teacher: Teacher | None = None,
) -> tuple[TrainState, Metrics]:
    """One update. Its randomness is a function of the seed and the step alone.

    Returns:
      The next state, and the batch's metrics: ``loss`` and its parts, and ``router`` statistics by stack,
      with a leading axis over sparse layers.
    """
    totals = batch_totals(batch, config, model.config)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(params: Params, batch: Batch, rng: Array) -> tuple[Array, Metrics]:
        taught = None if teacher is None else teacher.logits(batch)
        return batch_loss(params, batch, rng, totals, model=model, config=config, teacher_logits=taught)

    gradient = jax.grad(loss, has_aux=True)
    if microbatches == 1:
        grads, metrics = gradient(state.params, batch, rng)
    else:
        sequences = sequences_dealt(batch["encoder_input_tokens"].shape[1], model, teacher)
        grads, metrics = accumulate(gradient, state.params, batch, rng, microbatches, sequences)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast("Params", optax.apply_updates(state.params, updates))
        params = update_router_biases(params, state.params, metrics["router"], model.config)
    return TrainState(state.step + 1, params, opt_state), metrics


def batch_loss(
    params: Params,
    batch: Batch,
    rng: Array | None,
    totals: Totals,
    *,
    model: Model,
    config: LossConfig,
    teacher_logits: Array | None = None,
) -> tuple[Array, Metrics]:
    """The share of a (micro)batch in the loss of the whole batch that ``totals`` describes.

    With ``teacher_logits`` ``[batch, length, vocab]`` it has a soft part too.
    """
    module = model.bind(params)
    hidden, stats = module(batch, train=rng is not None, rng=rng)
    nats, z_loss = cross_entropy(
        hidden,
        module.output_kernel(),
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
    )
    parts = {"cross_entropy": nats / totals.normalizer, "z_loss": z_loss / totals.normalizer}
    weighted, router = router_losses(stats, totals, config)
    loss = config.hard_loss_weight * parts["cross_entropy"] + parts["z_loss"] + weighted
    if teacher_logits is not None:
        weights = batch["decoder_loss_weights"]
        soft = soft_cross_entropy(
            hidden, module.output_kernel(), teacher_logits, weights, temperature=config.temperature
        )
        parts["soft_cross_entropy"] = soft / totals.normalizer
        loss += config.soft_loss_weight * parts["soft_cross_entropy"]
    return loss, {"loss": loss, **parts, **router, "router": stats.stacks()}


def accumulate(
    gradient: Any, params: Params, batch: Batch, rng: Array, microbatches: int, sequences: int
) -> tuple[Params, Metrics]:
    """Sums gradients and metrics over equal parts of a batch, one at a time.

    Routing groups, of so many ``sequences``, are dealt whole and in turn, so that no group changes and each part
    keeps an equal share of every device's sequences.
    """

    def deal(x: Array) -> Array:
        dealt = jnp.swapaxes(x.reshape(-1, microbatches, sequences, *x.shape[1:]), 0, 1)
        return dealt.reshape(microbatches, -1, *x.shape[1:])

    parts: Mapping[str, Array] = {name: deal(x) for name, x in batch.items()}

    def body(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
        share = gradient(params, *part)
        return jax.tree.map(jnp.add, total, share), None

    first = {name: x[0] for name, x in parts.items()}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, rng))
    total, _ = jax.lax.scan(body, zeros, (parts, jax.random.split(rng, microbatches)))
    return total


def eval_step(params: Params, batch: Batch, *, model: Model) -> Metrics:
    """Sums over one batch: ``nats``, ``correct`` and ``tokens`` (weighted), and ``router`` statistics.

    There is no dropout, jitter, label smoothing or z-loss, and the evaluation capacity holds.
    """
    module = model.bind(params)
    hidden, stats = module(batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    nats, _ = cross_entropy(hidden, module.output_kernel(), targets, weights)
    hits = jnp.argmax(logits(hidden, module.output_kernel()), axis=-1) == targets
    return {
        "nats": nats,
        "correct": jnp.sum(hits * weights),
        "tokens": jnp.sum(weights),
        "router": stats.stacks(),
    }
