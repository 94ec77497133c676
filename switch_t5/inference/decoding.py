"""Text out of a model, a token at a time beside a cache: greedy, sampled, or by beam search.

All of it is one loop on the device, which ends when every sequence has. No sequence sees another: the model is one of
:func:`switch_t5.inference.independence.independent`, and draws are keyed by input, sample and position.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from switch_t5.inference.config import DecodingConfig
from switch_t5.model.functional import Model
from switch_t5.model.incremental import DecoderCache, decode_token, new_cache, next_logits, reorder
from switch_t5.model.transformer import SwitchTransformer
from switch_t5.partitioning.rules import num_shards
from switch_t5.types import Array, Params

_ENCODED_AT_ONCE = 2048
"""Tokens of a device's inputs that are encoded together, or those of one input: activations of more would be the most
that decoding holds, and take as long a token."""
_IMPOSSIBLE = -1e9
"""The score of a hypothesis that does not exist; finite, so that arithmetic with it is."""


class Decoded(NamedTuple):
    """What was decoded.

    Attributes:
      tokens: ``[batch, sequences, max length]`` int32; 0 after the end.
      log_probs: ``[batch, sequences]`` float32, of the whole sequence under the model, in nats.
      scores: ``[batch, sequences]`` float32, which beams are ranked by; otherwise the log-probabilities.
    """

    tokens: Array
    log_probs: Array
    scores: Array


def decode(
    model: Model,
    params: Params,
    encoder_tokens: Array,
    numbers: Array,
    *,
    config: DecodingConfig,
    max_length: int,
    eos_id: int,
) -> Decoded:
    """Decodes a batch of inputs; to be jitted.

    Args:
      model: the structure, of a configuration whose tokens do not compete.
      params: the parameters.
      encoder_tokens: ``[batch, length]`` int32; 0 is padding. A row of padding alone says nothing.
      numbers: ``[batch]`` int32 that tell inputs apart, for sampling.
      config: how.
      max_length: tokens to decode at the most.
      eos_id: the token that ends a sequence.

    Returns:
      ``num_return_sequences`` outputs of each input; of a beam search the best first.
    """
    module = model.bind(params)
    encoded = _encoded(module, encoder_tokens)
    beams = config.num_beams > 1
    hypotheses = config.num_beams if beams else config.num_return_sequences
    cache = new_cache(module, encoded, encoder_tokens, hypotheses, max_length, beams=beams)
    silent = jnp.all(encoder_tokens == 0, axis=-1)
    if beams:
        decoded = _beam_search(module, cache, silent, config.num_beams, config.length_penalty, max_length, eos_id)
        return Decoded(*(value[:, : config.num_return_sequences] for value in decoded))
    ended = jnp.broadcast_to(silent[:, None], (silent.shape[0], hypotheses))
    return _one_by_one(module, cache, ended, numbers, config, max_length, eos_id)


def _encoded(module: SwitchTransformer, tokens: Array) -> Array:
    """The encoder's output, ``[batch, length, embed]``, some inputs at a time: no input sees another."""
    batch, length = tokens.shape
    parts = _parts(max(1, batch // num_shards("batch")), length)
    # Every part has inputs of every device that a mesh gives a share of the batch.
    by_part = jnp.swapaxes(tokens.reshape(batch // parts, parts, length), 0, 1)
    encoded = jax.lax.map(lambda part: module.encode(part)[0], by_part)
    return jnp.swapaxes(encoded, 0, 1).reshape(batch, length, -1)


def _parts(inputs: int, length: int) -> int:
    """The fewest equal parts of a device's inputs that have no more tokens than are encoded at once, if any have."""
    wanted = -(-inputs * length // _ENCODED_AT_ONCE)
    return next((parts for parts in range(wanted, inputs) if inputs % parts == 0), inputs)


class _Sequences(NamedTuple):
    """The state of greedy decoding and sampling: each sequence goes on by itself."""

    position: Array
    tokens: Array
    log_probs: Array
    ended: Array
    cache: DecoderCache


def _one_by_one(
    module: SwitchTransformer,
    cache: DecoderCache,
    ended: Array,
    numbers: Array,
    config: DecodingConfig,
    max_length: int,
    eos_id: int,
) -> Decoded:
    """Decodes sequences that do not know of one another, until all have ended."""
    kernel = module.output_kernel()
    keys = _keys(numbers, ended.shape[1], config.seed)

    def step(state: _Sequences) -> _Sequences:
        inputs = _last(state.tokens, state.position)
        hidden, cache = decode_token(module, inputs, ~state.ended, state.position, state.cache)
        values = next_logits(hidden, kernel)
        token = _drawn(values, keys, state.position, config) if config.temperature else jnp.argmax(values, axis=-1)
        token = jnp.where(state.ended, 0, token).astype(jnp.int32)
        chosen = jnp.take_along_axis(values, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(values, axis=-1)
        return _Sequences(
            state.position + 1,
            state.tokens.at[:, :, state.position].set(token),
            state.log_probs + jnp.where(state.ended, 0, chosen),
            state.ended | (token == eos_id),
            cache,
        )

    start = _Sequences(
        jnp.zeros((), jnp.int32),
        jnp.zeros((*ended.shape, max_length), jnp.int32),
        jnp.zeros(ended.shape, jnp.float32),
        ended,
        cache,
    )
    going_on = lambda state: (state.position < max_length) & ~jnp.all(state.ended)  # noqa: E731
    end = jax.lax.while_loop(going_on, step, start)
    return Decoded(end.tokens, end.log_probs, end.log_probs)


def _last(tokens: Array, position: Array) -> Array:
    """The token before a position, ``[batch, hypotheses]``; 0 before the first."""
    before = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(position - 1, 0), axis=2, keepdims=False)
    return jnp.where(position == 0, 0, before)


def _keys(numbers: Array, samples: int, seed: int) -> Array:
    """A key for each sample of each input: ``[batch, samples]``."""
    of_input = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(numbers)
    return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(samples)))(of_input)


def _drawn(values: Array, keys: Array, position: Array, config: DecodingConfig) -> Array:
    """One token for each of ``[batch, samples]``, drawn from logits ``[batch, samples, vocab]``."""
    values = restricted(values / config.temperature, config.top_k, config.top_p)
    draw = lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row)  # noqa: E731
    return jax.vmap(jax.vmap(draw))(keys, values)


def restricted(values: Array, top_k: int, top_p: float) -> Array:
    """Logits ``[..., vocab]`` with minus infinity for tokens that are not to be drawn.

    Args:
      values: the logits.
      top_k: only so many of the most probable are left, and what ties with the last of them; 0 leaves all.
      top_p: of those, only the fewest whose probabilities add up to this, ties again included; 1 leaves all.
    """
    if 0 < top_k < values.shape[-1]:
        least = jax.lax.top_k(values, top_k)[0][..., -1:]
        values = jnp.where(values < least, -jnp.inf, values)
    if top_p < 1:
        descending = jnp.flip(jnp.sort(values, axis=-1), axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        # A token stays while those before it have not reached top_p; so the first always does.
        stays = jnp.cumsum(probs, axis=-1) - probs < top_p
        least = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
        values = jnp.where(values < least, -jnp.inf, values)
    return values


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position", "tokens", "log_probs", "final", "final_log_probs", "final_scores", "done", "cache"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Beams:
    """The state of a beam search; all but the first and the last with ``[batch, beams]`` in front.

    Attributes:
      position: int32 scalar.
      tokens: ``[..., max length]``, of hypotheses that go on.
      log_probs: of these; ``_IMPOSSIBLE`` where there are fewer.
      final: ``[..., max length]``, of hypotheses that ended.
      final_log_probs: of these.
      final_scores: of these, descending.
      done: ``[batch]``, where no hypothesis that goes on can still be among the best.
      cache: of the hypotheses that go on.
    """

    position: Array
    tokens: Array
    log_probs: Array
    final: Array
    final_log_probs: Array
    final_scores: Array
    done: Array
    cache: Any


def _beam_search(
    module: SwitchTransformer,
    cache: DecoderCache,
    silent: Array,
    beams: int,
    length_penalty: float,
    max_length: int,
    eos_id: int,
) -> Decoded:
    """T5's beam search: of twice as many continuations as beams, those that end and those that go on are kept apart."""
    kernel, batch = module.output_kernel(), silent.shape[0]

    def penalty(length: Array | int) -> Array:
        return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** length_penalty

    def step(state: _Beams) -> _Beams:
        real = jnp.broadcast_to(~state.done[:, None], (batch, beams))
        hidden, cache = decode_token(module, _last(state.tokens, state.position), real, state.position, state.cache)
        log_probs = jax.nn.log_softmax(next_logits(hidden, kernel)) + state.log_probs[..., None]
        best, flat = jax.lax.top_k(log_probs.reshape(batch, -1), 2 * beams)
        parents, token = jnp.divmod(flat, log_probs.shape[-1])
        tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
        tokens = tokens.at[:, :, state.position].set(token.astype(jnp.int32))
        ends = (token == eos_id) & (best > _IMPOSSIBLE / 2)

        scores = jnp.where(ends, best / penalty(state.position + 1), _IMPOSSIBLE)
        final_scores, final_log_probs, final = _best(
            beams,
            (state.final_scores, scores),
            (state.final_log_probs, best),
            (state.final, tokens),
        )
        log_probs, parents, tokens = _best(
            beams, (jnp.where(token == eos_id, _IMPOSSIBLE, best),), (parents,), (tokens,)
        )
        best_possible = log_probs[:, 0] / penalty(max_length)
        new = (tokens, log_probs, final, final_log_probs, final_scores)
        old = (state.tokens, state.log_probs, state.final, state.final_log_probs, state.final_scores)
        # What is done stays as it is, for however long others go on.
        kept = jax.tree.map(
            lambda new, old: jnp.where(state.done.reshape(-1, *[1] * (new.ndim - 1)), old, new), new, old
        )
        done = state.done | (final_scores[:, -1] >= best_possible)
        tokens, log_probs, final, final_log_probs, final_scores = kept
        position, cache = state.position + 1, reorder(cache, parents)
        return _Beams(position, tokens, log_probs, final, final_log_probs, final_scores, done, cache)

    nothing = jnp.full((batch, beams), _IMPOSSIBLE)
    blank = jnp.zeros((batch, beams, max_length), jnp.int32)
    start = _Beams(jnp.zeros((), jnp.int32), blank, nothing.at[:, 0].set(0), blank, nothing, nothing, silent, cache)
    going_on = lambda state: (state.position < max_length) & ~jnp.all(state.done)  # noqa: E731
    end = jax.lax.while_loop(going_on, step, start)
    # Hypotheses without an end are behind all that have one.
    unfinished = jnp.where(silent[:, None], 0, end.log_probs / penalty(max_length))
    ranks = end.final_scores, jnp.maximum(unfinished + _IMPOSSIBLE / 4, _IMPOSSIBLE)
    scores = end.final_scores, unfinished
    log_probs = end.final_log_probs, jnp.where(silent[:, None], 0, end.log_probs)
    _, tokens, log_probs, scores = _best(beams, ranks, (end.final, end.tokens), log_probs, scores)
    return Decoded(tokens, log_probs, scores)


def _best(count: int, ranks: tuple[Array, ...], *values: tuple[Array, ...]) -> tuple[Array, ...]:
    """Joins arrays ``[batch, n, ...]`` along their second dim and keeps those of the highest ranks, descending."""
    best, index = jax.lax.top_k(jnp.concatenate(ranks, axis=1), count)

    def pick(parts: tuple[Array, ...]) -> Array:
        joined = jnp.concatenate(parts, axis=1)
        return jax.vmap(lambda rows, index: rows[index])(joined, index)

    return best, *map(pick, values)
