"""T5's span corruption as a seqio preprocessor: 15% of the tokens, in spans of mean length 3.

Raffel et al. 2020, section 3.1.4. With the same seeds the result equals T5's own preprocessor's, token for
token.
"""

# TensorFlow's stubs are partial, and seqio's decorators hide the types of what they decorate.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Mapping

from switch_t5.data.lengths import MEAN_NOISE_SPAN_LENGTH, NOISE_DENSITY, span_corruption_lengths
from switch_t5.data.tensorflow_runtime import seqio, tf
from switch_t5.data.vocabularies import count_sentinels
from switch_t5.errors import ConfigError, UserError

# T5's: of a longer document one chunk is taken an epoch, and this many short ones are joined.
_MAX_DOCUMENT_TOKENS = 65536
_JOINED_DOCUMENTS = 128


def span_corruption(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int],
    output_features: Mapping[str, seqio.Feature],
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
    merge_documents: bool = True,
) -> tf.data.Dataset:
    """Turns tokenized documents into examples of corrupted inputs and the spans to restore.

    Args:
      dataset: elements with int32 `targets` [n], a document's tokens.
      sequence_length: the lengths of `inputs` and `targets` in tokens, each with its end-of-sequence token
        (which a later preprocessor appends).
      output_features: gives the vocabulary.
      noise_density: the share of tokens to mask.
      mean_noise_span_length: tokens in a masked span, on average.
      merge_documents: whether documents are joined by 128 before they are cut (T5's way, which wastes no
        length on padding) or each is cut on its own (so that no example holds parts of two, and the first
        comes sooner).

    Returns:
      A dataset of int32 `inputs` and `targets`, the longest one token short of their lengths.

    Raises:
      ConfigError: the length of the inputs is too small, or the targets they make do not fit.
      UserError: the vocabulary has fewer sentinels than an example has spans.
    """
    lengths = span_corruption_lengths(sequence_length["inputs"], noise_density, mean_noise_span_length)
    if sequence_length["targets"] < lengths.targets:
        raise ConfigError(
            "DataConfig.task_feature_lengths",
            f"has targets={sequence_length['targets']}; span corruption with "
            f"inputs={sequence_length['inputs']} makes targets of {lengths.targets} tokens.",
        )
    vocabulary = output_features["targets"].vocabulary
    sentinels = count_sentinels(vocabulary)
    if sentinels < lengths.spans:
        raise UserError(
            f"Inputs of {sequence_length['inputs']} tokens have {lengths.spans} masked spans, but the "
            f"vocabulary has {sentinels} sentinels: shorten the inputs or give it more extra_ids."
        )
    dataset = dataset.map(lambda example: {"targets": example["targets"]})
    dataset = _take_chunk(dataset.filter(lambda example: tf.size(example["targets"]) > 0))
    if merge_documents:
        dataset = _join(dataset)
    # T5 draws a seed where it cuts, without using it; drawing here too keeps the mask's seeds equal to T5's.
    dataset = seqio.map_over_dataset(lambda example, seed: example, num_seeds=1)(dataset)
    dataset = dataset.flat_map(lambda example: _cut(example["targets"], lengths.raw))

    @seqio.map_over_dataset(num_seeds=1)
    def corrupt(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["targets"]
        # T5 splits the seed in six and uses two.
        seeds = tf.random.experimental.stateless_split(seed, 6)[:2]
        mask = random_spans_mask(tf.size(tokens), seeds, noise_density, mean_noise_span_length)
        inputs, targets = corrupt_spans(tokens, mask, vocabulary.vocab_size)
        return {"inputs": inputs, "targets": targets}

    return corrupt(dataset)


def random_spans_mask(
    length: tf.Tensor | int,
    seeds: tf.Tensor,
    noise_density: float = NOISE_DENSITY,
    mean_noise_span_length: float = MEAN_NOISE_SPAN_LENGTH,
) -> tf.Tensor:
    """Draws which tokens to mask; kept and masked spans alternate, a kept one first.

    The numbers of masked tokens and of spans follow from the length alone; given those, every arrangement is
    equally likely.

    Args:
      length: int32 scalar, tokens.
      seeds: int32 [2, 2], for the masked and for the kept spans.
      noise_density: the share of tokens to mask; at least one token is masked, and one kept.
      mean_noise_span_length: tokens in a masked span, on average.

    Returns:
      bool [length], True where masked.
    """
    at_least_two = tf.maximum(length, 2)
    # In float32 and rounding halves to even, as T5 computes it.
    masked = tf.cast(tf.round(tf.cast(at_least_two, tf.float32) * noise_density), tf.int32)
    masked = tf.clip_by_value(masked, 1, at_least_two - 1)
    spans = tf.cast(tf.round(tf.cast(masked, tf.float32) / mean_noise_span_length), tf.int32)
    spans = tf.maximum(spans, 1)
    masked_lengths = _random_parts(masked, spans, seeds[0])
    kept_lengths = _random_parts(at_least_two - masked, spans, seeds[1])
    span_lengths = tf.reshape(tf.stack([kept_lengths, masked_lengths], axis=1), [-1])
    return tf.repeat(tf.tile([False, True], [spans]), span_lengths)[:length]


def corrupt_spans(tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Makes inputs, where each masked span became a sentinel, and targets, where each kept span did.

    The sentinels are the vocabulary's last entries, the last one first.

    Args:
      tokens: int32 [length].
      mask: bool [length].
      vocab_size: entries of the vocabulary, sentinels included.

    Returns:
      int32 inputs and int32 targets, without end of sequence.
    """
    return _spans_to_sentinels(tokens, mask, vocab_size), _spans_to_sentinels(tokens, ~mask, vocab_size)


def _spans_to_sentinels(tokens: tf.Tensor, mask: tf.Tensor, vocab_size: int) -> tf.Tensor:
    starts = mask & ~tf.concat([[False], mask[:-1]], axis=0)
    sentinels = vocab_size - tf.cumsum(tf.cast(starts, tokens.dtype))
    return tf.boolean_mask(tf.where(starts, sentinels, tokens), starts | ~mask)


def _random_parts(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws `parts` positive numbers that add up to `total`: int32 [parts]."""
    is_border = seqio.stateless_shuffle(tf.cast(tf.range(total - 1) < parts - 1, tf.int32), seed)
    part_of_item = tf.cumsum(tf.concat([[0], is_border], axis=0))
    return tf.math.segment_sum(tf.ones_like(part_of_item), part_of_item)


@seqio.map_over_dataset(num_seeds=1)
def _take_chunk(example: Mapping[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
    """Keeps a document of up to 65536 tokens, and of a longer one a random chunk of that size."""
    tokens = example["targets"]
    chunks = tf.cast(tf.math.ceil(tf.size(tokens) / _MAX_DOCUMENT_TOKENS), tf.int32)
    # T5 splits the seed in two and draws the chunk with the second.
    seed = tf.random.experimental.stateless_split(seed)[1]
    start = _MAX_DOCUMENT_TOKENS * tf.random.stateless_uniform([], seed, maxval=chunks, dtype=tf.int32)
    return {"targets": tokens[start : start + _MAX_DOCUMENT_TOKENS]}


def _join(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Joins each 128 documents; padding, which is token 0, goes."""
    batches = dataset.padded_batch(_JOINED_DOCUMENTS, padded_shapes={"targets": [None]})
    return batches.map(
        lambda batch: {"targets": tf.boolean_mask(batch["targets"], batch["targets"] != 0)},
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def _cut(tokens: tf.Tensor, length: int) -> tf.data.Dataset:
    """Cuts tokens in pieces of `length`, the last one shorter."""
    starts = tf.data.Dataset.range(0, tf.size(tokens, out_type=tf.int64), length)
    return starts.map(lambda start: {"targets": tokens[start : start + length]})
