"""Vocabularies: loading, decoding, training."""

# SentencePiece has no stubs for its protocol buffers.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from switch_t5.data import vocabularies
from switch_t5.errors import UserError

TEXTS = [f"w{i} the quick brown fox jumps over the lazy dog number {i}\nand a second line {i}" for i in range(300)]


def refusal(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    """The sentence that a call is refused with."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


def test_bytes_are_the_default_vocabulary() -> None:
    for path in (None, "bytes"):
        vocabulary = vocabularies.load_vocabulary(path)
        assert vocabulary.vocab_size == 3 + 256 + 100
        assert list(vocabulary.encode("ab")) == [100, 101]


def test_sentinels_are_added_behind_the_pieces(vocabulary_file: str) -> None:
    vocabulary = vocabularies.load_vocabulary(vocabulary_file)
    assert vocabulary.vocab_size == 400
    assert vocabularies.count_sentinels(vocabulary) == 100
    assert vocabulary.encode("<extra_id_0>") == [399]
    assert vocabularies.load_vocabulary(vocabulary_file, extra_ids=7).vocab_size == 307


def test_a_model_with_sentinels_of_its_own_gets_no_others(vocabulary_file: str, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(Path(vocabulary_file).read_bytes())
    for i in reversed(range(20)):
        model.pieces.add(piece=f"▁<extra_id_{i}>", score=0.0, type=4)
    path = tmp_path / "own.model"
    path.write_bytes(model.SerializeToString())
    vocabulary = vocabularies.load_vocabulary(str(path))
    assert vocabulary.vocab_size == 320
    assert vocabularies.count_sentinels(vocabulary) == 20
    assert vocabulary.encode("<extra_id_0>") == [319]


def test_decoding_shows_sentinels_and_ends_at_end_of_sequence(vocabulary_file: str) -> None:
    byte_ids = [100, 358, 101, 357, 1, 102, 0]
    assert vocabularies.decode(vocabularies.load_vocabulary(None), byte_ids) == "a<extra_id_0>b<extra_id_1>"
    vocabulary = vocabularies.load_vocabulary(vocabulary_file)
    ids = [*vocabulary.encode("the people"), 399, 1, 5, 0]
    assert vocabularies.decode(vocabulary, ids) == "the people <extra_id_0>"


def test_a_missing_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    path = f"{tmp_path}/none.model"
    assert refusal(vocabularies.load_vocabulary, path) == (
        f"Vocabulary {path} cannot be read: No such file or directory."
    )


@pytest.mark.parametrize("data", [b"", b"not a model\n", b"\x0a\xff"])
def test_a_file_that_is_no_model_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "text.model"
    path.write_bytes(data)
    assert refusal(vocabularies.load_vocabulary, str(path)) == f"Vocabulary {path} is not a SentencePiece model."


def test_a_web_address_is_one_sentence() -> None:
    assert refusal(vocabularies.load_vocabulary, "https://a.b/c.model") == (
        "Vocabulary https://a.b/c.model is on the web: download it and give the file's path (or gs://...)."
    )


def test_a_vocabulary_smaller_than_its_sentinels_is_refused(vocabulary_file: str, tmp_path: Path) -> None:
    assert refusal(vocabularies.load_vocabulary, vocabulary_file, extra_ids=301) == (
        f"Vocabulary {vocabulary_file} of 300 pieces is smaller than its 301 sentinels: it needs more pieces, or "
        "fewer extra_ids."
    )
    assert refusal(vocabularies.train_sentencepiece, TEXTS, 99, tmp_path / "a.model") == (
        "A new vocabulary of 99 pieces is smaller than its 100 sentinels: it needs more pieces, or fewer extra_ids."
    )


def test_a_model_with_other_special_pieces_is_refused(tmp_path: Path) -> None:
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(prefix), vocab_size=120, minloglevel=2
    )
    assert refusal(vocabularies.load_vocabulary, f"{prefix}.model") == (
        f"Vocabulary {prefix}.model has padding -1 and end of sequence 2; T5's are 0 and 1: train one with "
        "`switch-t5 data vocabulary`."
    )


def test_a_trained_vocabulary_has_t5s_special_pieces(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.model"
    vocabularies.train_sentencepiece(TEXTS, 120, path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    assert processor.vocab_size() == vocabularies.count_pieces(str(path)) == 120
    assert processor.encode("ж")[-1] == 2
    assert [file.name for file in path.parent.iterdir()] == ["a.model"]


def test_byte_fallback_spells_unknown_letters(tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    vocabularies.train_sentencepiece(TEXTS, 400, path, byte_fallback=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert processor.decode(processor.encode("жz")) == "жz"


def test_training_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        vocabularies.train_sentencepiece(TEXTS, 150, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_size_beyond_the_text_is_refused_with_the_largest(tmp_path: Path) -> None:
    assert refusal(vocabularies.train_sentencepiece, ["hello world"], 1000, tmp_path / "a.model") == (
        "The text gives at most 11 pieces, fewer than the vocabulary's size of 1000."
    )


def test_a_size_below_the_letters_is_refused_with_the_smallest(tmp_path: Path) -> None:
    alphabet = ["abcdefghijklmnopqrstuvwxyz"]
    assert refusal(vocabularies.train_sentencepiece, alphabet, 10, tmp_path / "a.model", extra_ids=0) == (
        "The text's letters alone take 30 pieces, more than the vocabulary's size of 10."
    )


def test_no_text_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    assert refusal(vocabularies.train_sentencepiece, [], 500, tmp_path / "a.model") == (
        "There is no text to train a vocabulary on."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal(vocabularies.train_sentencepiece, TEXTS, 120, tmp_path / "file" / "a.model").startswith(
        f"The vocabulary's folder {tmp_path}/file cannot be written"
    )
