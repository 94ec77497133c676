"""Span corruption against hand-made examples and against T5's own preprocessor."""

# TensorFlow's stubs are partial, and seqio's hide what it returns.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportInvalidTypeForm=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import numpy as np
import pytest

from switch_t5.data.lengths import corrupted_lengths
from switch_t5.data.span_corruption import corrupt_spans, random_spans_mask, span_corruption
from switch_t5.data.tensorflow_runtime import seqio, tf
from switch_t5.errors import ConfigError, UserError

FEATURES = {key: seqio.Feature(seqio.ByteVocabulary(extra_ids=100)) for key in ("inputs", "targets")}

# Examples that T5's preprocessor makes of documents of 50, 7 and 90 rising tokens, from seed 42.
T5_MERGED_TARGETS = [
    [358, 37, 38, 39, 357, 3, 356, 10, 11, 12, 13, 14, 15],
    [358, 58, 357, 65, 66, 67, 68, 69, 70, 71, 356, 84, 85],
    [358, 92],
]
T5_UNMERGED_TARGETS = [
    [358, 30, 31, 357, 45, 356, 48, 49, 50, 51, 52],
    [358, 9],
    [358, 31, 357, 42, 356, 65, 66, 67, 68, 69, 70, 71, 72],
    [358, 90, 91, 92],
]


def rising_documents(*lengths: int) -> tf.data.Dataset:
    """Tokenized documents 3, 4, 5, ... of the given lengths."""
    ragged = tf.ragged.constant([list(range(3, 3 + n)) for n in lengths], dtype=tf.int32)
    return tf.data.Dataset.from_tensor_slices(ragged).map(lambda row: {"targets": row})


def corrupt(dataset: tf.data.Dataset, inputs: int, targets: int, **options: bool) -> list[dict[str, np.ndarray]]:
    """Runs the preprocessor with seed 42."""
    with seqio.map_seed_manager(42):
        lengths = {"inputs": inputs, "targets": targets}
        return list(span_corruption(dataset, lengths, FEATURES, **options).as_numpy_iterator())


def test_each_masked_span_becomes_one_sentinel_and_each_kept_span_too() -> None:
    tokens = tf.constant([11, 12, 13, 14, 15, 16, 17, 18, 19, 20])
    mask = tf.constant([0, 0, 1, 1, 0, 0, 0, 1, 0, 1]) == 1
    inputs, targets = corrupt_spans(tokens, mask, vocab_size=100)
    assert inputs.numpy().tolist() == [11, 12, 99, 15, 16, 17, 98, 19, 97]
    assert targets.numpy().tolist() == [99, 13, 14, 98, 18, 97, 20]


@pytest.mark.parametrize(
    ("seeds", "mask"),
    [
        ([[1, 2], [3, 4]], "........xxxx..........................xx"),
        ([[5, 6], [7, 8]], ".....xxxxxx........xx.........................................xx"),
    ],
)
def test_masks_equal_t5s_for_the_same_seeds(seeds: list[list[int]], mask: str) -> None:
    drawn = random_spans_mask(len(mask), tf.constant(seeds)).numpy()
    assert "".join("x" if masked else "." for masked in drawn) == mask


@pytest.mark.parametrize("length", [10, 17, 141, 568])
def test_masks_have_the_calculated_tokens_and_spans(length: int) -> None:
    expected = corrupted_lengths(length)
    for seed in range(5):
        mask = random_spans_mask(length, tf.constant([[seed, 1], [seed, 2]])).numpy()
        starts = mask & ~np.concatenate([[False], mask[:-1]])
        assert mask.sum() == expected.targets - 1 - expected.spans
        assert starts.sum() == expected.spans
        assert not mask[0]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_the_shortest_texts_keep_their_first_token_and_mask_their_last(length: int) -> None:
    mask = random_spans_mask(length, tf.constant([[1, 2], [3, 4]])).numpy()
    assert mask.tolist() == ([False] if length == 1 else [False] * (length - 1) + [True])


@pytest.mark.parametrize(("merge", "expected"), [(True, T5_MERGED_TARGETS), (False, T5_UNMERGED_TARGETS)])
def test_examples_equal_t5s_for_the_same_seed(merge: bool, expected: list[list[int]]) -> None:
    examples = corrupt(rising_documents(50, 7, 90), 64, 14, merge_documents=merge)
    assert [example["targets"].tolist() for example in examples] == expected


def test_inputs_and_targets_together_restore_the_text() -> None:
    examples = corrupt(rising_documents(0, 200, 1, 70), 64, 14, merge_documents=False)
    restored = [token for example in examples for token in join(example["inputs"], example["targets"])]
    assert restored == [*range(3, 203), 3, *range(3, 73)]


def join(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Puts the target's spans in the place of their sentinels."""
    first_sentinel = 359 - 100
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token >= first_sentinel:
            spans[token] = []
        else:
            spans[max(spans, key=lambda sentinel: -sentinel)].append(token)
    return [text for token in inputs.tolist() for text in spans.get(token, [token])]


def test_full_examples_leave_one_token_for_end_of_sequence() -> None:
    example = corrupt(rising_documents(568), 512, 114)[0]
    assert example["inputs"].shape == (511,)
    assert example["targets"].shape == (113,)


def test_of_a_document_beyond_65536_tokens_one_chunk_is_taken() -> None:
    document = np.arange(150_000, dtype=np.int32) % 251 + 3
    examples = corrupt(tf.data.Dataset.from_tensors({"targets": document}), 512, 114, merge_documents=False)
    restored = [token for example in examples for token in join(example["inputs"], example["targets"])]
    chunks = [document[start : start + 65536].tolist() for start in (0, 65536, 131072)]
    assert restored in chunks


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        corrupt(rising_documents(9), 512, 113)
    assert str(error.value) == (
        "DataConfig.task_feature_lengths has targets=113; span corruption with inputs=512 makes targets of 114 tokens."
    )


def test_a_vocabulary_with_fewer_sentinels_than_spans_is_refused() -> None:
    features = {key: seqio.Feature(seqio.ByteVocabulary(extra_ids=27)) for key in ("inputs", "targets")}
    with pytest.raises(UserError) as error:
        span_corruption(rising_documents(9), {"inputs": 512, "targets": 114}, features)
    assert str(error.value) == (
        "Inputs of 512 tokens have 28 masked spans, but the vocabulary has 27 sentinels: shorten the inputs or "
        "give it more extra_ids."
    )


@pytest.mark.parity
@pytest.mark.parametrize("merge", [True, False])
def test_whole_datasets_equal_t5s(merge: bool) -> None:
    preprocessors = pytest.importorskip("t5.data.preprocessors", reason="the package t5 is not installed")
    generator = np.random.default_rng(0)
    lengths = [0, 1, 5, 3000, 200_000, 70, 131_072, *generator.integers(1, 3000, 300).tolist()]
    documents = [generator.integers(3, 250, n, dtype=np.int32) for n in lengths]
    source = tf.data.Dataset.from_generator(
        lambda: ({"targets": document} for document in documents),
        output_signature={"targets": tf.TensorSpec([None], tf.int32)},
    )
    with seqio.map_seed_manager(42):
        theirs = preprocessors.span_corruption(
            source, {"inputs": 512, "targets": 114}, FEATURES, merge_examples_to_reduce_padding=merge
        )
        theirs = list(theirs.as_numpy_iterator())
    ours = corrupt(source, 512, 114, merge_documents=merge)
    assert len(ours) == len(theirs) > 900
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine["inputs"], other["inputs"])
        np.testing.assert_array_equal(mine["targets"], other["targets"])
