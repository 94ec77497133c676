"""Greedy decoding against a loop over prefixes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.inference.decoding import greedy_decode
from switch_t5.layers.moe_config import MoEConfig
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model
from switch_t5.model.transformer import logits
from switch_t5.types import Array, Params
from tests.model.small import random_params

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
CONFIGS = {
    "dense": DENSE,
    "sparse": dataclasses.replace(
        DENSE, moe=MoEConfig(3, eval_capacity_factor=3.0), encoder_sparse_layers=1, decoder_sparse_layers=1
    ),
}
INPUTS = jnp.asarray([[5, 9, 2, 1, 0], [3, 1, 0, 0, 0], [7, 7, 8, 9, 1], [4, 11, 10, 6, 1], [2, 1, 0, 0, 0]], jnp.int32)


@functools.cache
def model_and_params(kind: str) -> tuple[Model, Params]:
    model = Model(CONFIGS[kind])
    params = random_params(model, scale=1.0, seed=0)
    # A few ends, and not all at once.
    table = params["embedding"]["table"]
    return model, params | {"embedding": {"table": table.at[EOS].multiply(1.6)}}


@functools.cache
def decode(kind: str) -> Any:
    model, params = model_and_params(kind)
    return jax.jit(lambda tokens: greedy_decode(model, params, tokens, max_length=LENGTH, eos_id=EOS))


@functools.cache
def next_logits(kind: str) -> Any:
    """Logits of one row, of which only the first ``length`` inputs are there."""
    model, params = model_and_params(kind)

    @jax.jit
    def run(encoder_tokens: Array, inputs: Array, length: Array) -> Array:
        module = model.bind(params)
        encoded, _ = module.encode(encoder_tokens)
        mask = jnp.arange(LENGTH)[None] < length
        hidden, _ = module.decode(encoded, encoder_tokens, inputs, mask)
        return logits(hidden, module.output_kernel())

    return run


def decode_in_a_loop(kind: str, row: np.ndarray) -> list[int]:
    said: list[int] = []
    while len(said) < LENGTH and EOS not in said:
        inputs = np.zeros((1, LENGTH), np.int32)
        inputs[0, 1 : len(said) + 1] = said[: LENGTH - 1]
        values = next_logits(kind)(row[None], inputs, len(said) + 1)
        said.append(int(np.argmax(values[0, len(said)])))
    return said + [0] * (LENGTH - len(said))


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_decoding_says_the_most_probable_token_after_each_prefix(kind: str) -> None:
    result = np.asarray(decode(kind)(INPUTS))
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, [decode_in_a_loop(kind, np.asarray(row)) for row in INPUTS])
    # The example has rows that end early, late and not at all.
    assert {row.index(EOS) if EOS in row else None for row in result.tolist()} == {1, 2, None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_after_its_end_a_row_is_zero(kind: str) -> None:
    for row in np.asarray(decode(kind)(INPUTS)).tolist():
        if EOS in row:
            assert set(row[row.index(EOS) + 1 :]) <= {0}


def test_a_row_without_input_says_nothing() -> None:
    result = decode("sparse")(INPUTS.at[1].set(0))
    np.testing.assert_array_equal(result[1], np.zeros(LENGTH))
    np.testing.assert_array_equal(np.delete(result, 1, 0), np.delete(decode("sparse")(INPUTS), 1, 0))
