"""The loss of a batch, as sums that add over microbatches and one division by totals known beforehand."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from switch_t5.errors import ConfigError, check_types
from switch_t5.model.config import TransformerConfig
from switch_t5.model.transformer import ModelStats, logits
from switch_t5.types import Array, Batch

ROUTER_LOSSES = ("load_balance_loss", "router_z_loss", "importance_loss", "load_loss")
"""Fields of :class:`RouterStats` that a weight of :class:`LossConfig` adds to the loss."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is minimized.

    Attributes:
      hard_loss_weight: of the cross-entropy with the targets.
      soft_loss_weight: of the cross-entropy with a teacher's probabilities, see :func:`soft_cross_entropy`; above 0
        it needs ``TrainConfig.distillation``.
      temperature: divides the logits of student and teacher in the soft loss.
      label_smoothing: probability spread over the other entries of the vocabulary.
      z_loss: weight of ``logsumexp(logits)^2``.
      load_balance_loss_weight: alpha of eq. 4.
      decoder_load_balance_loss_weight: the decoder's, where it is another: its router may need none, or alone need it.
      router_z_loss_weight: weight of the router z-loss.
      importance_loss_weight: weight of the importance loss (Shazeer et al. 2017).
      load_loss_weight: weight of the load loss (Shazeer et al. 2017); its router needs gaussian exploration.
      sparse_layer_reduction: the router's losses are summed over sparse layers (``sum``, the paper and Mesh
        TensorFlow), averaged (``mean``, T5X), or averaged over those of each stack and then added
        (``stack_mean``, Hugging Face). Each router of a sparse attention is a layer.
      loss_normalizing_factor: what the summed cross-entropy is divided by: ``num_real_target_tokens``,
        ``num_total_target_tokens`` (padding counted) or a number.
    """

    hard_loss_weight: float = 1.0
    soft_loss_weight: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 1e-4
    load_balance_loss_weight: float = 1e-2
    decoder_load_balance_loss_weight: float | None = None
    router_z_loss_weight: float = 0.0
    importance_loss_weight: float = 0.0
    load_loss_weight: float = 0.0
    sparse_layer_reduction: Literal["mean", "sum", "stack_mean"] = "sum"
    loss_normalizing_factor: float | Literal["num_real_target_tokens", "num_total_target_tokens"] = (
        "num_real_target_tokens"
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("LossConfig.label_smoothing", f"must be in [0, 1), got {self.label_smoothing}.")
        router_weights = [f"{name}_weight" for name in ROUTER_LOSSES] + ["decoder_load_balance_loss_weight"]
        for field in ("hard_loss_weight", "soft_loss_weight", "z_loss", *router_weights):
            if (getattr(self, field) or 0) < 0:
                raise ConfigError(f"LossConfig.{field}", f"must not be negative, got {getattr(self, field)}.")
        if self.temperature <= 0:
            raise ConfigError("LossConfig.temperature", f"must be above 0, got {self.temperature}.")
        if not self.hard_loss_weight + self.soft_loss_weight:
            raise ConfigError(
                "LossConfig.hard_loss_weight", "and soft_loss_weight are both 0: nothing would be learnt."
            )
        factor = self.loss_normalizing_factor
        if not isinstance(factor, str) and factor <= 0:
            raise ConfigError("LossConfig.loss_normalizing_factor", f"must be above 0, got {factor}.")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["normalizer", "encoder", "decoder", "encoder_counted", "decoder_counted"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Totals:
    """Denominators of a whole batch, which no parameter changes.

    Attributes:
      normalizer: of the cross-entropy.
      encoder: tokens that the encoder's routers route, see :class:`switch_t5.layers.moe_config.MoEConfig` for padding.
      decoder: the same of the decoder.
      encoder_counted: tokens that the load-balance loss of the encoder counts.
      decoder_counted: the same of the decoder.
    """

    normalizer: Array
    encoder: Array
    decoder: Array
    encoder_counted: Array
    decoder_counted: Array


def batch_totals(batch: Batch, config: LossConfig, model: TransformerConfig) -> Totals:
    """Counts a batch's tokens, for a model that routes padding or does not."""
    weights = batch["decoder_loss_weights"]
    match config.loss_normalizing_factor:
        case "num_real_target_tokens":
            normalizer = jnp.maximum(jnp.sum(weights), 1)
        case "num_total_target_tokens":
            normalizer = jnp.asarray(weights.size, jnp.float32)
        case number:
            normalizer = jnp.asarray(number, jnp.float32)

    def tokens(name: str, *, padding: bool) -> Array:
        is_counted = jnp.logical_or(batch[name] > 0, padding)
        return jnp.maximum(jnp.sum(is_counted), 1).astype(jnp.float32)

    totals = {}
    for which, name in (("encoder", "encoder_input_tokens"), ("decoder", "decoder_target_tokens")):
        # All sparse layers of a stack treat padding alike.
        moe = next(iter(model.sparse_configs(decoder=which == "decoder")), None)
        padding = "ignored" if moe is None else moe.padding
        totals[which] = tokens(name, padding=padding in ("zeroed", "routed"))
        totals[f"{which}_counted"] = tokens(name, padding=padding != "ignored")
    return Totals(normalizer=normalizer.astype(jnp.float32), **totals)


def router_losses(stats: ModelStats, totals: Totals, config: LossConfig) -> tuple[Array, dict[str, Array]]:
    """The router's losses of a (micro)batch, each over its stack's tokens and reduced over sparse layers.

    Returns:
      What they add to the loss, and ``load_balance_loss``, ``router_z_loss`` and what else has a weight, as unweighted
      scalars; 0 and none for a dense model.
    """
    weighted, losses = jnp.zeros(()), {}
    stacks = stats.stacks()
    reduction = config.sparse_layer_reduction
    num_layers = {which: stack.tokens.shape[0] for which, stack in stacks.items()}
    scale = 1 / sum(num_layers.values()) if stacks and reduction == "mean" else 1.0
    for name in ROUTER_LOSSES if stacks else ():
        weights = dict.fromkeys(stacks, getattr(config, f"{name}_weight"))
        if name == "load_balance_loss" and config.decoder_load_balance_loss_weight is not None:
            weights |= {"decoder": config.decoder_load_balance_loss_weight}
        if name not in ("load_balance_loss", "router_z_loss") and not any(weights.values()):
            continue
        losses[name] = jnp.zeros(())
        for which, stack in stacks.items():
            tokens = getattr(totals, f"{which}_counted" if name == "load_balance_loss" else which)
            share = scale * jnp.sum(getattr(stack, name)) / tokens
            share = share / num_layers[which] if reduction == "stack_mean" else share
            losses[name] += share
            weighted += weights[which] * share
    return weighted, losses


def cross_entropy(
    hidden: Array,
    output_kernel: Array,
    targets: Array,
    weights: Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array]:
    """Summed cross-entropy and summed z-loss of a batch.

    With label smoothing the constant entropy of the smoothed target is subtracted, so that a perfect
    prediction costs 0, as in T5.

    Args:
      hidden: ``[batch, length, embed]``, the decoder's output.
      output_kernel: ``[vocab, embed]`` float32.
      targets: ``[batch, length]`` int32.
      weights: ``[batch, length]`` float32; 0 for padding.
      label_smoothing: see :class:`LossConfig`.
      z_loss: see :class:`LossConfig`.

    Returns:
      Two float32 scalars in nats: the weighted sums of the cross-entropy and of ``z_loss * logsumexp^2``.
    """
    features = (hidden.shape[0] * hidden.shape[1], hidden.shape[2])
    return _cross_entropy(
        hidden.reshape(features), output_kernel, targets.reshape(-1), weights.reshape(-1), label_smoothing, z_loss
    )


def soft_cross_entropy(
    hidden: Array, output_kernel: Array, teacher_logits: Array, weights: Array, *, temperature: float = 1.0
) -> Array:
    """Summed cross-entropy of a student with a teacher's probabilities, the teacher's entropy included.

    Source: Hinton et al. 2015, section 2: both softmaxes are taken of logits divided by the temperature T, and the loss
    is multiplied by T^2, so that its gradient is as large as that of the hard loss whatever T is. The teacher takes no
    gradient.

    Args:
      hidden: ``[batch, length, embed]``, the student's output before its logits.
      output_kernel: ``[vocab, embed]`` float32, the student's.
      teacher_logits: ``[batch, length, vocab]`` float32.
      weights: ``[batch, length]`` float32; 0 for padding.
      temperature: T.

    Returns:
      A float32 scalar in nats.

    Raises:
      ConfigError: teacher and student differ in vocabulary, or in the length of their targets.
    """
    wanted = (*hidden.shape[:2], output_kernel.shape[0])
    if teacher_logits.shape != wanted:
        raise ConfigError(
            "DistillationConfig.teacher",
            f"gives logits of shape {teacher_logits.shape} (batch, length, vocabulary), and the student {wanted}: both "
            "must read the same batch with the same vocabulary.",
        )
    probs = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    log_probs = jax.nn.log_softmax(logits(hidden, output_kernel) / temperature)
    return temperature**2 * -jnp.sum(jnp.sum(probs * log_probs, axis=-1) * weights)


def _confidences(label_smoothing: float, vocab_size: int) -> tuple[float, float, float]:
    """Target probabilities of the right entry and of every other, and the entropy of that distribution."""
    right = 1.0 - label_smoothing
    other = label_smoothing / (vocab_size - 1)
    entropy = -(right * np.log(right) + (vocab_size - 1) * other * np.log(other + 1e-20))
    return right, other, float(entropy)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(
    hidden: Array, output_kernel: Array, targets: Array, weights: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    """:func:`cross_entropy` on flat tokens: ``[tokens, embed]``, ``[tokens]``.

    Its own derivative reads the logits ``[tokens, vocab]``, the largest array of all, once, where the
    derivative of the log-sum-exp would read it and write it several times.
    """
    return _cross_entropy_forward(hidden, output_kernel, targets, weights, label_smoothing, z_loss)[0]


def _cross_entropy_forward(
    hidden: Array, output_kernel: Array, targets: Array, weights: Array, label_smoothing: float, z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    right, other, entropy = _confidences(label_smoothing, output_kernel.shape[0])
    values = logits(hidden, output_kernel)
    log_z = jax.nn.logsumexp(values, axis=-1)
    # Multiplied out anew: to find the target among the logits would be one more pass over them.
    target_logit = jnp.sum(hidden.astype(jnp.float32) * jnp.take(output_kernel, targets, axis=0, mode="clip"), axis=-1)
    loss = log_z - (right - other) * target_logit - entropy
    if other:
        loss -= other * jnp.sum(values, axis=-1)
    sums = jnp.sum(loss * weights), z_loss * jnp.sum(jnp.square(log_z) * weights)
    return sums, (hidden, output_kernel, values, targets, weights, log_z)


def _cross_entropy_backward(
    label_smoothing: float, z_loss: float, residuals: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, np.ndarray, Array]:
    hidden, output_kernel, values, targets, weights, log_z = residuals
    right, other, _ = _confidences(label_smoothing, values.shape[-1])
    of_loss, of_z = (cotangent * weights for cotangent in cotangents)
    slope = (of_loss + of_z * 2 * z_loss * log_z)[:, None]
    is_target = targets[:, None] == jnp.arange(values.shape[-1])
    target_probs = jnp.where(is_target, right, other)
    d_values = slope * jnp.exp(values - log_z[:, None]) - of_loss[:, None] * target_probs
    d_hidden = (d_values @ output_kernel).astype(hidden.dtype)
    d_kernel = jnp.einsum("tv,td->vd", d_values, hidden.astype(jnp.float32))
    return d_hidden, d_kernel, np.zeros(targets.shape, jax.dtypes.float0), jnp.zeros_like(weights)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
