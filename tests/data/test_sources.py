"""The seqio sources."""

# TensorFlow's stubs are partial, and seqio's hide what it returns.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportInvalidTypeForm=false

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from switch_t5.data import documents
from switch_t5.data.sources import EmbeddedCorpusSource, PreparedTfdsSource, TextFilesSource
from switch_t5.data.tensorflow_runtime import seqio, tf, tfds
from switch_t5.errors import UserError


def texts(source: seqio.DataSource, split: str, **options: object) -> list[str]:
    """The documents of a split."""
    options = {"shuffle": False, **options}
    return [example["text"].decode() for example in source.get_dataset(split, **options).as_numpy_iterator()]


def write_shards(folder: Path, compressed: bool = False) -> list[str]:
    """Writes 60 documents as JSON lines in three files and returns them in the files' order."""
    for shard in range(3):
        lines = [json.dumps({"text": f"document {i}"}) for i in range(shard * 20, shard * 20 + 20)]
        data = "\n\n".join(lines).encode()
        path = folder / f"{shard}.jsonl"
        if compressed:
            path = path.with_suffix(".jsonl.gz")
        path.write_bytes(gzip.compress(data) if compressed else data)
    return [f"document {i}" for i in range(60)]


def test_text_files_are_documents_in_the_order_of_their_names(corpus: Path) -> None:
    source = TextFilesSource(str(corpus))
    expected = list(documents.iterate_documents(documents.find_files(str(corpus))))
    held_out = [text for text in expected if documents.is_held_out(text)]
    assert texts(source, "validation") == held_out
    assert texts(source, "train") == [text for text in expected if text not in held_out]
    assert len(held_out) > 0


@pytest.mark.parametrize("compressed", [False, True])
def test_json_lines_are_documents(tmp_path: Path, compressed: bool) -> None:
    expected = write_shards(tmp_path, compressed)
    source = TextFilesSource(str(tmp_path))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert sorted(train + validation) == sorted(expected)
    assert sorted(validation) == sorted(filter(documents.is_held_out, expected))


def test_validation_files_of_their_own_leave_training_whole(tmp_path: Path, corpus: Path) -> None:
    expected = write_shards(tmp_path)
    source = TextFilesSource(f"{tmp_path}/*.jsonl", validation_pattern=str(corpus))
    assert sorted(texts(source, "train")) == sorted(expected)
    assert len(texts(source, "validation")) == 80


def test_a_document_keeps_its_nul_characters_and_its_letters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café\n\0".encode())
    source = TextFilesSource(str(tmp_path), validation_pattern=str(tmp_path))
    assert texts(source, "train") == ["café\n\0"]


def test_shuffling_follows_the_seed_and_changes_each_epoch(corpus: Path) -> None:
    source = TextFilesSource(str(corpus), validation_pattern=str(corpus))
    first, again = (texts(source, "train", shuffle=True, seed=1) for _ in range(2))
    other = texts(source, "train", shuffle=True, seed=2)
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    repeated = source.get_dataset("train", shuffle=True, seed=1).repeat(2).as_numpy_iterator()
    epochs = [example["text"].decode() for example in repeated]
    assert epochs[:80] == first
    assert epochs[80:] != first


def test_shards_share_no_file(corpus: Path) -> None:
    source = TextFilesSource(str(corpus), validation_pattern=str(corpus))
    parts = [texts(source, "train", shard_info=seqio.ShardInfo(index, 3)) for index in range(3)]
    assert [len(part) for part in parts] == [27, 27, 26]
    assert len(set().union(*parts)) == 80


def test_a_wrong_line_is_told_of_before_reading_begins(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"texts": "two"}\n')
    source = TextFilesSource(str(tmp_path), validation_pattern=str(tmp_path))
    with pytest.raises(UserError, match=r"a\.jsonl:2 lacks the field 'text'; it has 'texts'\. Did you mean 'texts'\?"):
        source.get_dataset("train")


def test_a_split_without_documents_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("document 0")
    with pytest.raises(UserError) as error:
        TextFilesSource(str(tmp_path)).get_dataset("validation")
    assert str(error.value) == (
        f"'{tmp_path}' has no document for the validation split: one document in 20 is held out for validation, by "
        "a hash of its text; with few documents, set text_task.validation_pattern."
    )


def test_text_beyond_the_memory_is_one_sentence(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4_000_000}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    monkeypatch.setattr(documents, "text_size", lambda path: 10**9)
    with pytest.raises(UserError) as error:
        TextFilesSource(str(corpus)).get_dataset("train")
    assert str(error.value) == (
        f"'{corpus}' is about 80 GB of text, too much for this machine's 16 GB of memory: make a TFDS dataset of it, "
        "or name fewer files."
    )


def test_the_embedded_corpus_splits_by_document() -> None:
    source = EmbeddedCorpusSource()
    assert len(texts(source, "validation")) == 12
    assert len(texts(source, "train")) == 225


def test_a_tfds_dataset_that_is_not_prepared_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    source = PreparedTfdsSource("c4/en:3.0.1", {"train": "train"})
    for call in (source.get_dataset, source.num_input_examples, source.list_shards):
        with pytest.raises(UserError) as error:
            call("train")
        assert str(error.value) == (
            f"The TFDS dataset c4/en:3.0.1 is not prepared in {tmp_path}/c4/en/3.0.1: set TFDS_DATA_DIR to the "
            "folder that holds it, or prepare it with `tfds build c4/en:3.0.1`."
        )


def test_a_prepared_tfds_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("importlib_resources", reason="TFDS prepares datasets with it")
    rows = tf.data.Dataset.from_tensor_slices({"text": ["one", "two"]})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="switch_t5_test",
        config="en",
        version="1.0.0",
        data_dir=str(tmp_path),
        split_datasets={"en": rows},
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
    )
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    source = PreparedTfdsSource("switch_t5_test/en:1.0.0", {"train": "en", "validation": "en-validation"})
    assert sorted(texts(source, "train")) == ["one", "two"]
    assert source.num_input_examples("train") == 2
    with pytest.raises(UserError) as error:
        source.get_dataset("validation")
    assert str(error.value) == (
        f"The TFDS dataset switch_t5_test/en:1.0.0 in {tmp_path}/switch_t5_test/en/1.0.0 has no split "
        "'en-validation'; it has en."
    )
