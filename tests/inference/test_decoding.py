"""Decoding beside a cache against full forward passes, exhaustive search and plain loops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import ConfigError
from switch_t5.inference import decoding
from switch_t5.inference.config import DecodingConfig
from switch_t5.inference.decoding import Decoded, decode, restricted
from switch_t5.inference.independence import independent
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model import incremental
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.partitioning.mesh import MeshConfig, make_mesh
from switch_t5.partitioning.placement import tree_shardings
from switch_t5.partitioning.rules import partitioned
from switch_t5.routing.router import RouterConfig
from switch_t5.types import Array, Params
from tests.model.small import random_params

pytestmark = pytest.mark.usefixtures("compiled_as_users_do")

LENGTH, EOS = 6, 1
DENSE = TransformerConfig(
    vocab_size=12,
    emb_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
MOE = MoEConfig(3, train_capacity_factor=0.5, eval_capacity_factor=0.5, min_expert_capacity=1)
SPARSE = dataclasses.replace(DENSE, moe=MOE, encoder_sparse_layers=1, decoder_sparse_layers=1)
DEEP = dataclasses.replace(DENSE, moe=MOE, num_encoder_layers=2, num_decoder_layers=4, scan_layers=True)
ATTENTION = dataclasses.replace(
    DENSE, attention_moe=MOE, encoder_sparse_attention=1, decoder_sparse_attention=1, tied_logits=False
)
RANDOM = dataclasses.replace(MOE, router=RouterConfig(router="random"))
NO_TOKEN = dataclasses.replace(MOE, router=RouterConfig(router="no_token_left_behind"))
CONFIGS = {
    "dense": DENSE,
    "sparse": SPARSE,
    "scanned": DEEP,
    "attention": ATTENTION,
    "no_token_left_behind": dataclasses.replace(SPARSE, moe=NO_TOKEN),
    "random": dataclasses.replace(SPARSE, moe=RANDOM),
    "positions": dataclasses.replace(DEEP, relpos_per_layer=True),
}
INPUTS = jnp.asarray([[5, 9, 2, 1, 0], [3, 1, 0, 0, 0], [7, 7, 8, 9, 1], [4, 11, 10, 6, 1], [2, 1, 0, 0, 0]], jnp.int32)


@functools.cache
def model_and_params(kind: str) -> tuple[Model, Params]:
    model = Model(independent(CONFIGS[kind]))
    params = random_params(model, scale=1.0, seed=0)
    if kind == "attention":
        return model, params
    # A few ends, and not all at once.
    table = params["embedding"]["table"]
    return model, params | {"embedding": {"table": table.at[EOS].multiply(1.6)}}


@functools.cache
def decoder(kind: str, config: DecodingConfig, max_length: int = LENGTH) -> Callable[[Array, Array], Decoded]:
    model, params = model_and_params(kind)
    return jax.jit(
        lambda tokens, numbers: decode(model, params, tokens, numbers, config=config, max_length=max_length, eos_id=EOS)
    )


def run(
    kind: str, inputs: Array = INPUTS, numbers: list[int] | None = None, length: int = LENGTH, **how: float
) -> Decoded:
    """Decodes; the result is NumPy's."""
    numbers = list(range(len(inputs))) if numbers is None else numbers
    result = decoder(kind, DecodingConfig(**how), length)(inputs, jnp.asarray(numbers, jnp.int32))  # pyright: ignore
    return Decoded(*map(np.asarray, result))


@functools.cache
def full_pass_logits(kind: str, length: int = LENGTH) -> Callable[[Array, Array, int], Array]:
    """Logits of one row by a full forward pass, of which only the first inputs are there."""
    model, params = model_and_params(kind)

    @jax.jit
    def forward(encoder_tokens: Array, inputs: Array, count: int) -> Array:
        module = model.bind(params)
        encoded, _ = module.encode(encoder_tokens)
        hidden, _ = module.decode(encoded, encoder_tokens, inputs, jnp.arange(length)[None] < count)
        return logits(hidden, module.output_kernel())

    return forward


def log_probs_after(kind: str, row: Array, said: tuple[int, ...], length: int = LENGTH) -> np.ndarray:
    """Log-probabilities of what follows a prefix: ``[vocab]``."""
    inputs = np.zeros((1, length), np.int32)
    inputs[0, 1 : len(said) + 1] = said[: length - 1]
    values = full_pass_logits(kind, length)(row[None], inputs, len(said) + 1)
    return np.asarray(jax.nn.log_softmax(values[0, len(said)]))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("dense", "scanned") else pytest.mark.slow) for kind in CONFIGS]
)
def test_greedy_decoding_beside_a_cache_is_that_of_full_forward_passes(kind: str) -> None:
    result = run(kind)
    for row, tokens, log_prob in zip(INPUTS, result.tokens[:, 0], result.log_probs[:, 0], strict=True):
        said: tuple[int, ...] = ()
        total = 0.0
        while len(said) < LENGTH and EOS not in said:
            after = log_probs_after(kind, row, said)
            said, total = (*said, int(after.argmax())), total + after.max()
        assert tokens.tolist() == [*said, *[0] * (LENGTH - len(said))]
        assert log_prob == pytest.approx(total, abs=1e-4)
    if kind == "sparse":  # The example has rows that end early, late and not at all.
        rows = result.tokens[:, 0].tolist()
        assert len({row.index(EOS) if EOS in row else None for row in rows}) > 1


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("sparse", {}),
        ("sparse", {"num_beams": 3}),
        ("sparse", {"temperature": 1.0, "num_return_sequences": 2}),
        ("random", {}),
    ],
    ids=str,
)
def test_what_is_said_to_an_input_depends_on_no_other(kind: str, how: dict[str, float]) -> None:
    together = run(kind, **how)
    order = [3, 0, 4, 2, 1]
    shuffled = run(kind, INPUTS[jnp.asarray(order)], order, **how)
    with_padding = run(kind, jnp.pad(INPUTS[:2], ((0, 3), (0, 0))), **how)
    longer = run(kind, jnp.pad(INPUTS, ((0, 0), (0, 4))), **how)
    for index, name in enumerate(Decoded._fields):
        np.testing.assert_array_equal(shuffled[index], together[index][order], err_msg=name)
        np.testing.assert_array_equal(with_padding[index][:2], together[index][:2], err_msg=name)
        np.testing.assert_allclose(longer[index], together[index], atol=1e-5, err_msg=name)
        for row in range(2):
            alone = run(kind, INPUTS[row : row + 1], [row], **how)
            np.testing.assert_allclose(alone[index][0], together[index][row], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["scanned", "positions"])
def test_what_beams_say_has_the_probability_of_full_forward_passes(kind: str) -> None:
    result = run(kind, num_beams=3, num_return_sequences=3)
    for row, beams, log_probs in zip(INPUTS, result.tokens, result.log_probs, strict=True):
        for tokens, log_prob in zip(beams.tolist(), log_probs, strict=True):
            said = tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)
            steps = (log_probs_after(kind, row, said[:place])[token] for place, token in enumerate(said))
            assert log_prob == pytest.approx(sum(steps), abs=1e-4)


@pytest.mark.multidevice
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"temperature": 1.0, "num_return_sequences": 2}], ids=str)
def test_devices_decode_together_what_one_does(how: dict[str, float]) -> None:
    one = run("dense", INPUTS[:4], **how)
    model, params = model_and_params("dense")
    config = DecodingConfig(**how)  # pyright: ignore
    decode_on = functools.partial(decode, model, config=config, max_length=LENGTH, eos_id=EOS)
    with partitioned(make_mesh(MeshConfig(num_devices=4, num_model_partitions=2))):
        several = jax.jit(decode_on)(params, INPUTS[:4], jnp.arange(4))
    np.testing.assert_array_equal(several.tokens, one.tokens)
    np.testing.assert_allclose(several.log_probs, one.log_probs, atol=1e-5)  # Sums over heads come in another order.


@pytest.mark.multidevice
@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=str)
def test_devices_that_share_out_the_experts_decode_what_one_does(how: dict[str, float], dispatch: str) -> None:
    # Four experts of their own on each device, and a batch that the devices share out too.
    moe = dataclasses.replace(MOE, num_experts=4, dispatch=dispatch)  # pyright: ignore
    model = Model(independent(dataclasses.replace(SPARSE, moe=moe)))
    params = random_params(model, scale=1.0, seed=0)
    mesh, rules = make_mesh(MeshConfig(num_devices=4, num_expert_partitions=4)), MeshConfig().axis_rules
    placed = jax.device_put(params, tree_shardings(mesh, params, model.axes, rules.at_rest))
    wi = placed["encoder"]["stack"]["blocks"]["layers_0"]["mlp"]["experts"]["wi"]
    assert {shard.data.shape[-3] for shard in wi.addressable_shards} == {1}
    config = DecodingConfig(**how)  # pyright: ignore
    decode_on = functools.partial(decode, model, config=config, max_length=LENGTH, eos_id=EOS)
    one = jax.jit(decode_on)(params, INPUTS[:4], jnp.arange(4))
    with partitioned(mesh):
        several = jax.jit(decode_on)(placed, INPUTS[:4], jnp.arange(4))
    assert len(np.unique(one.tokens, axis=0)) > 1
    np.testing.assert_array_equal(several.tokens, one.tokens)
    np.testing.assert_allclose(several.log_probs, one.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "length", "parts"),
    [(8, 512, 2), (8, 1023, 4), (64, 96, 4), (7, 1024, 7), (3, 512, 1), (1, 512, 1), (4, 9999, 4), (1, 1, 1)],
)
def test_inputs_are_encoded_in_the_fewest_parts_that_are_small_enough(inputs: int, length: int, parts: int) -> None:
    assert decoding._parts(inputs, length) == parts


@pytest.mark.multidevice
@pytest.mark.parametrize("kind", ["dense", "sparse", "scanned"])
def test_inputs_encoded_some_at_a_time_are_encoded_as_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_and_params(kind)
    inputs = jnp.concatenate([INPUTS, INPUTS[:3] + 1])
    together = jax.jit(lambda tokens: model.bind(params).encode(tokens)[0])(inputs)
    assert len(np.unique(np.asarray(together), axis=0)) == len(inputs)
    for at_once in (1, 10, 20):
        monkeypatch.setattr(decoding, "_ENCODED_AT_ONCE", at_once)
        encoded = jax.jit(lambda tokens: decoding._encoded(model.bind(params), tokens))
        np.testing.assert_allclose(encoded(inputs), together, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(decoding, "_ENCODED_AT_ONCE", 5)  # One input of each device.
    with partitioned(make_mesh(MeshConfig(num_devices=4))):
        encoded = jax.jit(lambda tokens: decoding._encoded(model.bind(params), tokens))(inputs)
    np.testing.assert_allclose(encoded, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "num_return_sequences": 2}, {"num_beams": 3}], ids=str)
def test_a_step_copies_no_cache(how: dict[str, float]) -> None:
    config = model_and_params("dense")[0].config
    length = 96  # So that no other array has the cache's shape.
    decodes = decoder("dense", DecodingConfig(**how), length)  # pyright: ignore
    program = jax.jit(decodes).lower(INPUTS, jnp.arange(len(INPUTS))).compile().as_text()
    assert program is not None
    rows = len(INPUTS) * int(how.get("num_return_sequences", 1))
    cache = rf"f32\[{rows},{config.num_heads},{length * int(how.get('num_beams', 1))},{config.head_dim}\]"
    bodies = tuple(f"%{name} " for name in re.findall(r"while\(.*body=%?([\w.\-]+)", program))
    parts = (part for part in program.split("\n\n") if part.startswith(bodies))
    (step,) = (part for part in parts if re.search(cache, part))
    made = re.findall(rf"= {cache}\S* (\w[\w-]*)\(", step)
    assert "copy" not in made
    assert made.count("fusion") == 2 * config.num_decoder_layers  # Where a key and a value are written.


def first_factor(hidden: Array, kernel: Array) -> str:
    """The shape of the first factor of the logits' product."""
    program = jax.jit(incremental.next_logits).lower(hidden, kernel).as_text()
    found = re.search(r"dot_general .*: \(tensor<([0-9x]+)xf32>, ", program)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("shape", "factor"), [((1, 1), "11x6"), ((4, 4), "11x6"), ((17, 1), "17x1x6"), ((9, 2), "9x2x6")]
)
def test_a_few_rows_have_the_logits_that_many_have(shape: tuple[int, int], factor: str) -> None:
    random = np.random.default_rng(0)
    hidden, kernel = random.normal(size=(*shape, 6)), random.normal(size=(11, 6))
    arrays = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)
    np.testing.assert_allclose(incremental.next_logits(*arrays), hidden @ kernel.T, rtol=1e-5, atol=1e-5)
    assert first_factor(*arrays) == factor


@pytest.mark.multidevice
def test_the_kernel_leads_on_one_cpu_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = jnp.ones((11, 6))  # Of shapes of their own: what was traced before would be found again.
    with partitioned(make_mesh(MeshConfig(num_devices=2))):
        assert first_factor(jnp.ones((2, 1, 6)), kernel) == "2x1x6"
    monkeypatch.setattr(incremental, "target_platform", lambda: "tpu")
    assert first_factor(jnp.ones((3, 1, 6)), kernel) == "3x1x6"


@pytest.mark.parametrize("rows", [5, 8, 15])
def test_a_rows_logits_depend_on_no_other_to_the_last_bit(rows: int) -> None:
    random = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(random.normal(size=size), jnp.float32) for size in ((rows, 1, 256), (1000, 256)))
    order = random.permutation(rows)
    logits_of = jax.jit(incremental.next_logits)
    np.testing.assert_array_equal(logits_of(hidden[order], kernel), logits_of(hidden, kernel)[order])


def test_the_model_as_trained_lets_tokens_compete() -> None:
    """What the test above would show without :func:`independent`."""
    model, params = Model(SPARSE), model_and_params("sparse")[1]
    encode = jax.jit(lambda tokens: model.bind(params).encode(tokens)[0])
    assert not np.allclose(encode(INPUTS)[2], encode(INPUTS[2:3])[0], atol=1e-3)


def test_a_row_without_input_says_nothing() -> None:
    for how in ({}, {"num_beams": 3}):
        result = run("sparse", INPUTS.at[1].set(0), **how)
        np.testing.assert_array_equal(result.tokens[1], np.zeros((1, LENGTH)))
        assert result.log_probs[1] == 0


def test_no_step_is_taken_once_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_and_params("dense")
    ends = {row: list(said).index(EOS) + 1 for row, said in enumerate(run("dense").tokens[:, 0]) if EOS in said}
    steps: list[None] = []
    original = decoding.decode_token

    def counting(*args: Any) -> Any:
        jax.debug.callback(lambda: steps.append(None))
        return original(*args)

    monkeypatch.setattr(decoding, "decode_token", counting)
    rows = INPUTS[jnp.asarray(list(ends))]
    how = {"config": DecodingConfig(), "max_length": 50, "eos_id": EOS}
    result = jax.jit(lambda tokens: decode(model, params, tokens, jnp.arange(len(tokens)), **how).tokens)(rows)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert len(steps) == max(ends.values()) < 50


TINY = 4  # Tokens of the vocabulary below: padding, the end, and two words.


@functools.cache
def tiny(seed: int) -> tuple[Model, Params]:
    model = Model(dataclasses.replace(independent(SPARSE), vocab_size=TINY))
    return model, random_params(model, scale=1.0, seed=seed)


@functools.cache
def tiny_forward() -> Callable[[Params, Array, Array, Array], Array]:
    model = tiny(0)[0]

    @jax.jit
    def forward(params: Params, encoder_tokens: Array, inputs: Array, mask: Array) -> Array:
        module = model.bind(params)
        encoded, _ = module.encode(encoder_tokens)
        hidden, _ = module.decode(encoded, encoder_tokens, inputs, mask)
        return jax.nn.log_softmax(logits(hidden, module.output_kernel()))

    return forward


@functools.cache
def tiny_log_probs(seed: int, row: tuple[int, ...], length: int) -> dict[tuple[int, ...], np.ndarray]:
    """After each prefix without an end, the log-probabilities of what follows."""
    params = tiny(seed)[1]
    words = [token for token in range(TINY) if token != EOS]
    prefixes = [said for count in range(length) for said in itertools.product(words, repeat=count)]
    inputs = np.zeros((len(prefixes), length), np.int32)
    for index, said in enumerate(prefixes):
        inputs[index, 1 : len(said) + 1] = said
    encoder_tokens = jnp.asarray([row] * len(prefixes), jnp.int32)
    mask = jnp.asarray([[place <= len(said) for place in range(length)] for said in prefixes])

    values = np.asarray(tiny_forward()(params, encoder_tokens, jnp.asarray(inputs), mask))
    return {said: values[index, len(said)] for index, said in enumerate(prefixes)}


def all_sequences(seed: int, row: tuple[int, ...], length: int, alpha: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every sequence that ends, with its score, the best first."""
    after = tiny_log_probs(seed, row, length)
    found = []
    for said in after:
        steps = [after[said[:place]][token] for place, token in enumerate((*said, EOS))]
        found.append((float(sum(steps)) / ((5 + len(steps)) / 6) ** alpha, (*said, EOS)))
    return sorted(found, reverse=True)


@functools.cache
def tiny_search(config: DecodingConfig, length: int) -> Callable[[Params, Array], Decoded]:
    model = tiny(0)[0]
    return jax.jit(
        lambda params, tokens: decode(
            model, params, tokens, jnp.arange(len(tokens)), config=config, max_length=length, eos_id=EOS
        )
    )


@pytest.mark.parametrize("alpha", [0.6, 2.0])
def test_a_beam_search_with_room_for_all_is_exhaustive_search(alpha: float) -> None:
    # Three words that go on: 27 prefixes at the last step, and twice 54 continuations, which are all there are.
    length, beams = 4, 54
    rows = ((2, 3, 1, 0), (3, 1, 0, 0))
    search = tiny_search(DecodingConfig(num_beams=beams, length_penalty=alpha, num_return_sequences=10), length)
    for seed in range(3):
        result = search(tiny(seed)[1], jnp.asarray(rows))
        for index, row in enumerate(rows):
            expected = all_sequences(seed, row, length, alpha)[:10]
            np.testing.assert_allclose(result.scores[index], [score for score, _ in expected], rtol=1e-4)
            padded = [list(said) + [0] * (length - len(said)) for _, said in expected]
            np.testing.assert_array_equal(result.tokens[index], padded)


def beam_search_in_a_loop(
    seed: int, row: tuple[int, ...], length: int, beams: int, alpha: float
) -> list[tuple[int, ...]]:
    """The search as T5 describes it, over lists."""
    after = tiny_log_probs(seed, row, length)
    going: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    final: list[tuple[float, tuple[int, ...]]] = []
    for place in range(length):
        longer = [(total + after[said][token], (*said, token)) for total, said in going for token in range(TINY)]
        best = sorted(longer, reverse=True)[: 2 * beams]
        ends = [(total / ((6 + place) / 6) ** alpha, said) for total, said in best if said[-1] == EOS]
        final = sorted(final + ends, reverse=True)[:beams]
        going = [pair for pair in best if pair[1][-1] != EOS][:beams]
        if len(final) == beams and final[-1][0] >= going[0][0] / ((5 + length) / 6) ** alpha:
            break
    final += [(total, said) for total, said in going][: beams - len(final)]
    return [said for _, said in final]


@pytest.mark.parametrize("beams", [2])
def test_a_narrow_beam_search_is_that_of_a_plain_loop(beams: int) -> None:
    length, row = 4, (2, 3, 3, 1)
    search = tiny_search(DecodingConfig(num_beams=beams, num_return_sequences=beams), length)
    for seed in range(4):
        result = search(tiny(seed)[1], jnp.asarray([row]))
        expected = beam_search_in_a_loop(seed, row, length, beams, 0.6)
        padded = [list(said) + [0] * (length - len(said)) for said in expected]
        np.testing.assert_array_equal(result.tokens[0], padded)


def test_sampling_follows_the_model_and_its_temperature() -> None:
    count = 4000
    probs = np.exp(log_probs_after("dense", INPUTS[0], ()))
    for temperature in (1.0, 0.5):
        how = {"temperature": temperature, "num_return_sequences": count}
        first = run("dense", INPUTS[:1], length=1, **how).tokens[0, :, 0]
        expected = probs ** (1 / temperature) / np.sum(probs ** (1 / temperature))
        found = np.bincount(first, minlength=len(probs)) / count
        # Five standard deviations.
        np.testing.assert_array_less(np.abs(found - expected), 5 * np.sqrt(expected / count) + 1e-6)


def test_samples_differ_and_a_seed_gives_the_same_ones() -> None:
    how = {"temperature": 1.5, "num_return_sequences": 6}
    first, again, other = run("dense", **how), run("dense", **how), run("dense", seed=1, **how)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert len(np.unique(first.tokens[0], axis=0)) > 3
    assert (first.tokens != other.tokens).any()
    # The log-probability is the model's, whatever the temperature.
    row, said = INPUTS[0], first.tokens[0, 0].tolist()
    said = tuple(said[: said.index(EOS) + 1] if EOS in said else said)
    expected = sum(log_probs_after("dense", row, said[:place])[token] for place, token in enumerate(said))
    assert first.log_probs[0, 0] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"),
    [
        (0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (2, 1.0, [0, 0.4, 0, 0.3]),
        (9, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (0, 0.65, [0, 0.4, 0, 0.3]),
        (0, 0.75, [0, 0.4, 0.2, 0.3]),
        (0, 0.01, [0, 0.4, 0, 0]),
        # Of the two most probable, which have 4/7 and 3/7.
        (2, 0.5, [0, 0.4, 0, 0]),
    ],
)
def test_top_k_and_top_p_leave_the_most_probable(top_k: int, top_p: float, left: list[float]) -> None:
    values = restricted(jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3])), top_k, top_p)
    np.testing.assert_allclose(np.exp(values), left, rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 0}, "DecodingConfig.num_beams must be at least 1, got 0."),
        ({"top_p": 0.0}, "DecodingConfig.top_p must be above 0 and at most 1, got 0.0."),
        (
            {"num_beams": 2, "temperature": 0.5},
            "DecodingConfig.temperature is 0.5, but a search of 2 beams draws nothing: set it to 0, or num_beams to 1.",
        ),
        ({"top_k": 5}, "DecodingConfig.top_k is 5, which has no effect without a temperature"),
        ({"num_return_sequences": 3}, "DecodingConfig.num_return_sequences is 3, but greedy decoding has one answer"),
        (
            {"num_beams": 2, "num_return_sequences": 3},
            "is 3, more than the 2 beams that are kept: set num_beams to 3 or more.",
        ),
    ],
)
def test_what_cannot_be_is_refused(how: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        DecodingConfig(**how)  # pyright: ignore
