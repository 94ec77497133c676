"""The step: what it sums and divides by, and that parts of a batch add up to the whole."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.training.loop import Recorder
from switch_t5.training.losses import LossConfig
from switch_t5.training.metrics_file import MetricsFile
from switch_t5.training.progress import Progress, Speedometer
from switch_t5.training.state import TrainState
from switch_t5.training.step import accumulate, eval_step, train_step
from switch_t5.training.tensorboard import TensorBoard
from switch_t5.types import Array, Params
from tests.model.small import Example, examples, packed, random_params, unpacked

INPUTS, TARGETS = 10, 7
MODEL = Model(
    TransformerConfig(
        vocab_size=32,
        emb_dim=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        num_encoder_layers=2,
        num_decoder_layers=1,
        decoder_sparse_layers=1,
        moe=MoEConfig(
            3,
            group_size=INPUTS,
            train_capacity_factor=1.0,
            eval_capacity_factor=3.0,
            min_expert_capacity=1,
            jitter_noise=0.0,
        ),
    )
)
PARAMS = random_params(MODEL)
LOSS = LossConfig(label_smoothing=0.1, z_loss=1e-2, load_balance_loss_weight=0.5, router_z_loss_weight=0.1)
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: params, lambda gradients, state, params=None: (jax.tree.map(jnp.zeros_like, gradients), gradients)
)
"""An optimizer that changes nothing and has the gradients for its state."""


def batch() -> dict[str, Array]:
    """Eight packed sequences, from full to almost empty."""
    lengths = [(6, 4), (4, 3), (10, 7), (3, 2), (5, 5), (9, 6), (1, 1), (2, 2), (7, 7), (8, 1), (4, 3), (3, 3)]
    content: list[Example] = examples(lengths)
    rows = [content[:2], content[2:3], content[3:5], content[5:6], content[6:8], content[8:9], content[9:10]]
    return packed([*rows, content[10:]], INPUTS, TARGETS)


@functools.cache
def outcome(*, microbatches: int = 1, step: int = 0) -> tuple[Params, dict[str, Any]]:
    """Gradients and metrics."""
    state = TrainState(jnp.asarray(step, jnp.int32), PARAMS, PARAMS)
    after, metrics = step_function(microbatches)(state, batch())
    assert int(after.step) == step + 1
    return after.opt_state, metrics


@functools.cache
def step_function(microbatches: int) -> Any:
    step = functools.partial(train_step, model=MODEL, optimizer=KEEP_GRADIENTS, config=LOSS, microbatches=microbatches)
    return jax.jit(step)


def test_microbatches_add_up_to_the_whole_in_loss_statistics_and_gradients() -> None:
    reference = outcome()
    assert all((np.asarray(stats.dropped) > 0).all() for stats in reference[1]["router"].values())

    def compare(path: jax.tree_util.KeyPath, one: Array, other: Array) -> None:
        scale = float(jnp.max(jnp.abs(other)))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, outcome(microbatches=4), reference)


@pytest.mark.parametrize(("microbatches", "sequences"), [(2, 1), (3, 2), (2, 3), (12, 1)])
def test_microbatches_take_every_routing_group_whole_and_once(microbatches: int, sequences: int) -> None:
    numbers = jnp.arange(12, dtype=jnp.float32)

    def gradient(params: Array, part: dict[str, Array], rng: Array) -> tuple[Array, Array]:
        del params, rng
        group = part["numbers"].reshape(-1, sequences)
        # Each group adds a number of its own to the place of its first sequence.
        first = jax.nn.one_hot(group[:, 0].astype(int), 12)
        value = jnp.sum(group * 12.0 ** jnp.arange(sequences), axis=1)
        return jnp.sum(first * value[:, None], axis=0), jnp.sum(group)

    none = jnp.zeros(())
    expected, total = gradient(none, {"numbers": numbers}, none)
    gathered, gathered_total = accumulate(
        gradient, {}, {"numbers": numbers}, jax.random.key(0), microbatches, sequences
    )
    np.testing.assert_array_equal(gathered, expected)
    np.testing.assert_array_equal(gathered_total, total)


def test_microbatches_keep_an_equal_share_of_every_devices_sequences() -> None:
    """Four devices hold three sequences each; a microbatch of four takes one from each."""
    holder = jnp.repeat(jnp.arange(4), 3)

    def gradient(params: Array, part: dict[str, Array], rng: Array) -> tuple[Array, Array]:
        del params, rng
        held = jnp.sum(part["holder"][:, None] == jnp.arange(4), axis=0)
        return held**2, jnp.zeros(())

    squares, _ = accumulate(gradient, {}, {"holder": holder}, jax.random.key(0), 3, 1)
    np.testing.assert_array_equal(squares, [3, 3, 3, 3])


def test_microbatches_draw_apart() -> None:
    def gradient(params: Array, part: dict[str, Array], rng: Array) -> tuple[Array, Array]:
        del params
        place = jax.nn.one_hot(part["numbers"][0], 4)
        return place * jax.random.uniform(rng), jnp.zeros(())

    draws, _ = accumulate(gradient, {}, {"numbers": jnp.arange(4)}, jax.random.key(0), 4, 1)
    assert len(set(np.asarray(draws).tolist())) == 4


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    _, metrics = outcome()
    assert set(metrics) == {"loss", "cross_entropy", "z_loss", "load_balance_loss", "router_z_loss", "router"}
    parts = metrics["cross_entropy"] + metrics["z_loss"]
    parts += 0.5 * metrics["load_balance_loss"] + 0.1 * metrics["router_z_loss"]
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)


def test_the_router_losses_are_the_statistics_sums_over_sparse_layers() -> None:
    _, metrics = outcome()
    for name in ("load_balance_loss", "router_z_loss"):
        layers = jnp.concatenate([stats.means()[name] for stats in metrics["router"].values()])
        assert layers.shape == (2,)
        np.testing.assert_allclose(metrics[name], layers.sum(), rtol=1e-6)


def test_without_randomness_the_step_number_changes_nothing() -> None:
    jax.tree.map(np.testing.assert_array_equal, outcome(), outcome(step=7))


def test_evaluation_sums_nats_hits_and_tokens_of_the_plain_logits() -> None:
    given = unpacked(examples([(6, 4), (3, 5), (9, 3)], seed=1), INPUTS, TARGETS)
    given["decoder_loss_weights"] = given["decoder_loss_weights"].at[0, 0].set(0.5)

    @jax.jit
    def run(given: dict[str, Array]) -> tuple[dict[str, Any], Array]:
        module = MODEL.bind(PARAMS)
        return eval_step(PARAMS, given, model=MODEL), logits(module(given)[0], module.output_kernel())

    values = np.asarray(run(given)[1], np.float64)
    # Two targets that the model would have said.
    guesses = values.argmax(-1)
    given["decoder_target_tokens"] = given["decoder_target_tokens"].at[1, :2].set(guesses[1, :2])
    result, _ = run(given)
    log_probs = values - np.log(np.exp(values).sum(-1, keepdims=True))
    targets, weights = np.asarray(given["decoder_target_tokens"]), np.asarray(given["decoder_loss_weights"])
    nats = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(result["nats"], (nats * weights).sum(), rtol=1e-5)
    hits = ((guesses == targets) * weights).sum()
    assert hits >= 2
    np.testing.assert_allclose(result["correct"], hits, rtol=1e-6)
    assert float(result["tokens"]) == 11.5
    assert set(result["router"]) == {"encoder", "decoder"}


def test_training_capacity_drops_what_evaluation_capacity_keeps() -> None:
    _, metrics = outcome()
    evaluated = jax.jit(functools.partial(eval_step, model=MODEL))(PARAMS, batch())
    for name, stats in evaluated["router"].items():
        np.testing.assert_array_equal(stats.dropped, [0])
        assert (np.asarray(metrics["router"][name].dropped) > 0).all()


def test_a_few_steps_lower_the_loss() -> None:
    optimizer = optax.adam(1e-2)
    run = jax.jit(functools.partial(train_step, model=MODEL, optimizer=optimizer, config=LossConfig()))
    state = TrainState(jnp.zeros((), jnp.int32), PARAMS, optimizer.init(PARAMS))
    losses = []
    for _ in range(10):
        state, metrics = run(state, batch())
        losses.append(float(metrics["cross_entropy"]))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_a_router_that_is_not_finite_is_in_metrics_jsonl_and_a_sound_one_is_not(tmp_path: Path) -> None:
    def is_poisoned(path: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "encoder" in name and name.endswith("['router']")

    params = jax.tree.map_with_path(lambda path, leaf: leaf + jnp.inf if is_poisoned(path) else leaf, PARAMS)
    state, contents = TrainState(jnp.zeros((), jnp.int32), params, params), batch()
    _, metrics = step_function(1)(state, contents)
    with MetricsFile(tmp_path / "metrics.jsonl", None) as file:
        board, progress = TensorBoard(tmp_path, None, active=False), Progress(1, active=False)
        schedule = optax.constant_schedule(0.1)
        Recorder(file, board, progress, Speedometer(1, 1), schedule, "task").log(1, metrics)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["encoder/0/nonfinite"] == np.sum(np.asarray(contents["encoder_segment_ids"]) > 0)
    assert [name for name in entry if name.endswith("nonfinite")] == ["encoder/0/nonfinite"]
    assert np.isfinite(entry["loss"])
