"""Batches, and stopping and resuming their iterator."""

# seqio's protocol for sources asks more than its own sources give, and TensorFlow's stubs are partial.
# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switch_t5.data import iterator_state
from switch_t5.data.pipeline import (
    Batch,
    BatchIterator,
    DataConfig,
    evaluation_batches,
    unigram_counts,
    unigram_loss,
)
from switch_t5.data.tasks import text_task
from switch_t5.errors import ConfigError, UserError
from switch_t5.partitioning.placement import BatchRows

LENGTHS = {"inputs": 64, "targets": 14}


@pytest.fixture(scope="session")
def config(corpus: Path) -> DataConfig:
    """Packed batches of four rows from the small corpus, in bytes; an epoch has some 70 batches."""
    return DataConfig(text_task("pipeline_corpus", str(corpus), merge_documents=False), LENGTHS, batch_size=4)


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    """The next batches."""
    return list(itertools.islice(batches, count))


def digest(batches: Iterable[Batch]) -> str:
    """A hash of every bit of the batches."""
    return hashlib.sha256(
        b"".join(key.encode() + batch[key].tobytes() for batch in batches for key in sorted(batch))
    ).hexdigest()


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """The sentence that a call is refused with."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


def examples(batches: Iterable[Batch], packed: bool) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The (inputs, targets) in batches, without padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["encoder_input_tokens"])):
            inputs, targets = batch["encoder_input_tokens"][row], batch["decoder_target_tokens"][row]
            of_inputs = batch["encoder_segment_ids"][row] if packed else (inputs > 0)
            of_targets = batch["decoder_segment_ids"][row] if packed else (targets > 0)
            for segment in range(1, of_inputs.max() + 1):
                found.append((tuple(inputs[of_inputs == segment]), tuple(targets[of_targets == segment])))
    return found


def test_batches_have_seqios_keys_shapes_and_types(config: DataConfig) -> None:
    batch = next(BatchIterator(config, repeat=True))
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "encoder_input_tokens": ((4, 64), "int32"),
        "encoder_segment_ids": ((4, 64), "int32"),
        "encoder_positions": ((4, 64), "int32"),
        "decoder_input_tokens": ((4, 14), "int32"),
        "decoder_target_tokens": ((4, 14), "int32"),
        "decoder_segment_ids": ((4, 14), "int32"),
        "decoder_positions": ((4, 14), "int32"),
        "decoder_loss_weights": ((4, 14), "float32"),
    }
    np.testing.assert_array_equal(batch["decoder_loss_weights"], batch["decoder_target_tokens"] > 0)
    shifted = np.pad(batch["decoder_target_tokens"], ((0, 0), (1, 0)))[:, :-1]
    first = batch["decoder_positions"] == 0
    np.testing.assert_array_equal(batch["decoder_input_tokens"], np.where(first, 0, shifted))


def test_packing_changes_rows_but_no_example(config: DataConfig) -> None:
    short = dataclasses.replace(config, task_feature_lengths={"inputs": 256, "targets": 58})
    packed = list(evaluation_batches(short))
    unpacked = list(evaluation_batches(dataclasses.replace(short, pack=False)))
    assert "encoder_segment_ids" not in unpacked[0]
    assert examples(packed, packed=True) == examples(unpacked, packed=False)
    assert len(packed) < len(unpacked)
    assert max(batch["encoder_segment_ids"].max() for batch in packed) >= 2


def test_every_example_ends_in_end_of_sequence(config: DataConfig) -> None:
    for inputs, targets in examples(evaluation_batches(config, 5), packed=True):
        assert (inputs[-1], inputs.count(1)) == (1, 1)
        assert (targets[-1], targets.count(1)) == (1, 1)


def test_the_order_follows_the_seed(config: DataConfig) -> None:
    first, again = (digest(take(BatchIterator(config, repeat=True), 5)) for _ in range(2))
    other = digest(take(BatchIterator(dataclasses.replace(config, seed=1), repeat=True), 5))
    assert first == again
    assert first != other


@pytest.mark.parametrize("merge", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_restored_iterator_gives_exactly_the_following_batches(corpus: Path, merge: bool) -> None:
    name = text_task(f"resumed_{merge}", str(corpus), merge_documents=merge)
    config = DataConfig(name, LENGTHS, batch_size=4)
    iterator = BatchIterator(config, repeat=True)
    states, batches = [], []
    # An epoch has about 70 batches: the last state is taken in the second, and the third begins behind it.
    for batches_before in (0, 30, 90):
        batches += take(iterator, batches_before - len(batches))
        states.append((batches_before, iterator.get_state()))
    batches += take(iterator, 90)
    restored = BatchIterator(config, repeat=True)
    for batches_before, state in states:
        restored.set_state(state)
        assert digest(take(restored, 90)) == digest(batches[batches_before : batches_before + 90])


def test_saving_the_position_does_not_disturb_the_batches(config: DataConfig) -> None:
    saving, plain = BatchIterator(config, repeat=True), BatchIterator(config, repeat=True)
    with_saves = []
    for _ in range(6):
        with_saves.append(next(saving))
        saving.get_state()
    assert digest(with_saves) == digest(take(plain, 6))


@pytest.mark.slow
def test_a_position_is_restored_in_another_process(config: DataConfig, corpus: Path, tmp_path: Path) -> None:
    iterator = BatchIterator(config, repeat=True)
    take(iterator, 25)
    saved = tmp_path / "saved"
    saved.write_bytes(pickle.dumps((config, str(corpus), iterator.get_state())))
    script = f"""
import pickle, sys
from tests.data.test_pipeline import BatchIterator, digest, take, text_task
config, corpus, state = pickle.load(open({str(saved)!r}, "rb"))
text_task(config.mixture_or_task_name, corpus, merge_documents=False)
iterator = BatchIterator(config, repeat=True)
iterator.set_state(state)
print(digest(take(iterator, 80)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == digest(take(iterator, 80))
    assert result.stderr == ""


def test_a_position_of_another_configuration_is_refused(config: DataConfig) -> None:
    state = BatchIterator(config, repeat=True).get_state()
    other = BatchIterator(dataclasses.replace(config, batch_size=8), repeat=True)
    assert refusal(other.set_state, state) == (
        "The position in the data was saved with batch_size=4, but this run has batch_size=8: restore the old "
        "value, or start in a new folder."
    )
    assert digest(take(other, 2)) == digest(
        take(BatchIterator(dataclasses.replace(config, batch_size=8), repeat=True), 2)
    )


def test_a_vocabulary_is_told_apart_by_its_content(config: DataConfig, vocabulary_file: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(vocabulary_file).read_bytes())
    first = BatchIterator(dataclasses.replace(config, vocabulary_path=vocabulary_file), repeat=True)
    moved = BatchIterator(dataclasses.replace(config, vocabulary_path=str(copy)), repeat=True)
    moved.set_state(first.get_state())
    assert digest(take(moved, 3)) == digest(take(first, 3))
    with pytest.raises(UserError, match="was saved with vocabulary='ByteVocabulary, 359 entries'"):
        first.set_state(BatchIterator(config, repeat=True).get_state())


def test_a_position_in_other_text_is_refused(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"document {i} is short")
    name = text_task("text_that_grows", str(tmp_path), validation_pattern=str(tmp_path))
    config = DataConfig(name, LENGTHS, batch_size=1)
    state = BatchIterator(config, repeat=True).get_state()
    (tmp_path / "3.txt").write_text("document 3 is new")
    with pytest.raises(
        UserError, match=r"was saved with text=\['3 documents, hash \w{8}'\], but this run has text=\['4 "
    ):
        BatchIterator(config, repeat=True).set_state(state)


@pytest.mark.parametrize("damage", [b"", b"PK nonsense"])
def test_a_damaged_position_is_refused(damage: bytes) -> None:
    assert refusal(iterator_state.restore, None, damage, {}) == (
        "The saved position in the data is damaged: it cannot be read."
    )


def test_one_pass_ends_with_a_batch_filled_with_zeros(config: DataConfig) -> None:
    iterator = BatchIterator(dataclasses.replace(config, batch_size=7), repeat=False)
    batches = list(iterator)
    assert all(batch["encoder_input_tokens"].shape == (7, 64) for batch in batches)
    filled = [(batch["decoder_loss_weights"].sum(axis=1) > 0).tolist() for batch in batches]
    assert all(all(rows) for rows in filled[:-1])
    assert filled[-1] == sorted(filled[-1], reverse=True)
    assert not filled[-1][-1]
    assert all((value[-1] == 0).all() for value in batches[-1].values())
    with pytest.raises(StopIteration):
        next(iterator)


def test_evaluation_is_the_same_each_time_and_not_shuffled(config: DataConfig) -> None:
    validation = dataclasses.replace(config, split="validation")
    first, again = list(evaluation_batches(validation)), list(evaluation_batches(validation))
    assert digest(first) == digest(again)
    assert digest(evaluation_batches(validation, 2)) == digest(first[:2])
    unshuffled = BatchIterator(dataclasses.replace(validation, shuffle=False), repeat=False)
    assert digest(unshuffled) == digest(first)


def shard_rows(rows: Iterable[int], owned: Iterable[int] = ()) -> BatchRows:
    """What a process that holds some rows is told."""
    return BatchRows(np.array([*rows]), np.array([*owned], int))


@pytest.mark.slow
def test_a_batch_is_its_shards_rows_whoever_reads_them(config: DataConfig) -> None:
    config = dataclasses.replace(config, batch_size=8, num_shards=2)
    whole = take(BatchIterator(config, repeat=True), 3)
    for held in ([0, 1, 2, 3], [7], [1, 3, 4]):
        iterator = BatchIterator(config, repeat=True, rows=shard_rows(held))
        assert iterator.positions == [f"{shard}_of_2" for shard in sorted({row // 4 for row in held})]
        assert digest(take(iterator, 3)) == digest(
            {key: value[held] for key, value in batch.items()} for batch in whole
        )


def test_shards_have_other_documents_and_other_masks(config: DataConfig) -> None:
    config = dataclasses.replace(config, pack=False, shuffle=False, num_shards=2)
    # An epoch of a shard of the small corpus has some hundred examples.
    parts = [take(BatchIterator(config, repeat=True, rows=shard_rows(rows)), 30) for rows in ([0, 1], [2, 3])]
    words = [{word for pair in examples(part, packed=False) for word in words_in(pair[0])} for part in parts]
    assert words[0] and words[1]
    assert not words[0] & words[1]
    sentinels = [part[0]["encoder_input_tokens"][0] >= 259 for part in parts]
    assert sentinels[0].any() and not np.array_equal(*sentinels)


@pytest.mark.slow
def test_positions_that_some_processes_saved_are_gone_on_from_by_any_others(config: DataConfig) -> None:
    config = dataclasses.replace(config, num_shards=2)
    state: dict[str, bytes] = {}
    for rows in (shard_rows([0, 1], [0, 1]), shard_rows([2, 3], [2, 3]), shard_rows([2, 3])):
        iterator = BatchIterator(config, repeat=True, rows=rows)
        take(iterator, 5)
        saved = iterator.get_state()
        assert not saved.keys() & state.keys()
        state |= saved
    one = BatchIterator(config, repeat=True)
    one.set_state(state)
    assert digest(take(one, 5)) == digest(take(BatchIterator(config, repeat=True), 10)[5:])


def words_in(tokens: tuple[int, ...]) -> set[str]:
    """The numbers of the documents whose complete words stand in a text of bytes."""
    text = "".join(chr(token - 3) if 3 <= token < 259 else "?" for token in tokens)
    return {word.split("x")[0] for word in text.split(" ")[1:-1] if "?" not in word}


def test_a_split_without_examples_is_one_sentence() -> None:
    from switch_t5.data.tensorflow_runtime import seqio, tf

    features = {key: seqio.Feature(seqio.ByteVocabulary()) for key in ("inputs", "targets")}
    nothing = {key: tf.zeros([0, 3], tf.int32) for key in features}
    seqio.TaskRegistry.add(
        "no_examples",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(nothing),
            splits=["train"],
        ),
        output_features=features,
    )
    iterator = BatchIterator(DataConfig("no_examples", LENGTHS, batch_size=1), repeat=True)
    assert refusal(next, iterator) == "Split 'train' of 'no_examples' gives no examples."


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"task_feature_lengths": {"inputs": 64}},
            "task_feature_lengths must give 'inputs' and 'targets', got ['inputs'].",
        ),
        (
            {"task_feature_lengths": {"inputs": 64, "targets": 0}},
            "task_feature_lengths has targets=0, which is not a positive integer.",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0."),
        ({"batch_size": "8"}, "batch_size must be an integer, got '8'."),
        ({"seed": -1}, "seed must not be negative, got -1."),
        ({"extra_ids": -1}, "extra_ids must not be negative, got -1."),
        ({"num_shards": 3}, "num_shards must divide the batch of 4 rows, got 3."),
        ({"num_shards": 0}, "num_shards must divide the batch of 4 rows, got 0."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused(config: DataConfig, changes: dict[str, Any], expected: str) -> None:
    assert refusal(dataclasses.replace, config, **changes) == f"DataConfig.{expected}"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split": "test"}, "split is 'test', but the splits of 'pipeline_corpus' are train, validation."),
        (
            {"task_feature_lengths": {"inputs": 64, "targets": 13}},
            "task_feature_lengths has targets=13; span corruption with inputs=64 makes targets of 14 tokens.",
        ),
    ],
)
def test_a_value_that_does_not_suit_the_task_is_refused(
    config: DataConfig, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        BatchIterator(dataclasses.replace(config, **changes), repeat=True)
    assert str(error.value) == f"DataConfig.{expected}"


def test_unigram_counts_are_the_target_tokens(config: DataConfig) -> None:
    counts = unigram_counts(config, num_batches=3)
    expected = np.zeros(359, np.int64)
    for batch in evaluation_batches(config, 3):
        for token in batch["decoder_target_tokens"].ravel():
            expected[token] += token > 0
    np.testing.assert_array_equal(counts, expected)
    assert counts[0] == 0


def test_unigram_loss_is_the_cross_entropy_of_smoothed_frequencies() -> None:
    # (1 + 1, 5 + 1) of 8 gives 1/4 and 3/4; one token of the first kind and two of the second are scored.
    expected = -(np.log(1 / 4) + 2 * np.log(3 / 4)) / 3
    assert unigram_loss(np.array([1, 5]), np.array([1, 2])) == pytest.approx(expected, rel=1e-12)
