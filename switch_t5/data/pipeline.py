"""From a task's name to batches of token arrays, in an order that can be stopped and resumed exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from switch_t5.data import iterator_state, tasks
from switch_t5.data.vocabularies import EXTRA_IDS, vocabulary_fingerprint
from switch_t5.errors import ConfigError, UserError, check_types

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    from switch_t5.partitioning.placement import BatchRows

Batch = dict[str, np.ndarray]

_FEATURES = ("inputs", "targets")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into batches.

    Attributes:
      mixture_or_task_name: a name that `switch-t5 data list` prints, or a task of the user's own.
      task_feature_lengths: tokens of `inputs` and of `targets`, each with its end of sequence.
      batch_size: rows of a batch, over all processes.
      split: such as 'train' or 'validation'.
      pack: whether a row may hold several short examples, told apart by segment ids.
      shuffle: whether documents and examples come in random order.
      seed: decides that order, the masks and a mixture's draws.
      vocabulary_path: a SentencePiece model or 'bytes'; None is bytes, where the task allows that.
      extra_ids: sentinels to add behind the vocabulary's pieces, where its file holds none.
      num_shards: parts that the split is trained on in, each of which gives as many rows of every batch, in their
        order; a process reads only the parts of which it holds rows. Which batches come depends on this number, and
        not on the number of processes.
    """

    mixture_or_task_name: str
    task_feature_lengths: Mapping[str, int]
    batch_size: int
    split: str = "train"
    pack: bool = True
    shuffle: bool = True
    seed: int = 0
    vocabulary_path: str | None = None
    extra_ids: int = EXTRA_IDS
    num_shards: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        lengths = self.task_feature_lengths
        if sorted(lengths) != sorted(_FEATURES):
            raise ConfigError(
                "DataConfig.task_feature_lengths", f"must give 'inputs' and 'targets', got {sorted(lengths)}."
            )
        for key, length in lengths.items():
            if not isinstance(length, int) or isinstance(length, bool) or length < 1:
                raise ConfigError(
                    "DataConfig.task_feature_lengths",
                    f"has {key}={length!r}, which is not a positive integer.",
                )
        if self.batch_size < 1:
            raise ConfigError("DataConfig.batch_size", f"must be at least 1, got {self.batch_size}.")
        if self.seed < 0:
            raise ConfigError("DataConfig.seed", f"must not be negative, got {self.seed}.")
        if self.extra_ids < 0:
            raise ConfigError("DataConfig.extra_ids", f"must not be negative, got {self.extra_ids}.")
        if self.num_shards < 1 or self.batch_size % self.num_shards:
            raise ConfigError(
                "DataConfig.num_shards", f"must divide the batch of {self.batch_size} rows, got {self.num_shards}."
            )


class BatchIterator:
    """Batches of a split, one after another, with a position that can be saved and restored exactly.

    A batch maps seqio's names to arrays: int32 `encoder_input_tokens` [B, Le], `decoder_input_tokens` and
    `decoder_target_tokens` [B, Ld], float32 `decoder_loss_weights` [B, Ld] (0 on padding), and when packed
    int32 `encoder_segment_ids`, `encoder_positions` [B, Le], `decoder_segment_ids`, `decoder_positions` [B,
    Ld].

    Of several processes each has the rows that it holds, and reads only the shards that these come from.

    Attributes:
      config: as given.
      vocabulary: the seqio vocabulary of the tokens.
    """

    def __init__(self, config: DataConfig, *, repeat: bool, rows: BatchRows | None = None) -> None:
        """Builds the pipeline; reading begins with the first batch.

        Args:
          config: what to read.
          repeat: whether to go on for ever, each epoch in another order with other masks; otherwise the split is read
            as one shard, and the last batch is filled with rows of zeros.
          rows: which rows of a batch are wanted; None for all.

        Raises:
          ConfigError: a value of the configuration cannot be used with the task.
          UserError: there is no such task or vocabulary, or its text cannot be read.
        """
        self.config = config
        provider = _provider(config)
        self.vocabulary: seqio.Vocabulary = provider.output_features["targets"].vocabulary
        num_shards = config.num_shards if repeat else 1
        size = config.batch_size // num_shards
        every = np.arange(config.batch_size)
        held, owned = (every, every) if rows is None else (rows.held, rows.owned)
        # A shard's position is saved once, by the owner of its first row.
        self._owned = [int(row) // size for row in owned if row % size == 0]
        self._shards = {
            int(index): _Shard(config, provider, repeat, int(index), num_shards) for index in np.unique(held // size)
        }
        read = np.concatenate([index * size + np.arange(size) for index in self._shards])
        self._picked = None if len(held) == len(read) else np.searchsorted(read, held)

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch: the rows wanted of it.

        Raises:
          StopIteration: the split was read once and `repeat` is not set.
          UserError: the split gives no examples.
        """
        parts = [shard.read() for shard in self._shards.values()]
        batch = parts[0]
        if len(parts) > 1:
            batch = {key: np.concatenate([part[key] for part in parts]) for key in batch}
        return batch if self._picked is None else {key: values[self._picked] for key, values in batch.items()}

    @property
    def positions(self) -> list[str]:
        """The names of the positions that `set_state` needs."""
        return [shard.name for shard in self._shards.values()]

    def get_state(self) -> dict[str, bytes]:
        """Returns the position behind the last batch, of each shard whose position is this process's to save."""
        return {self._shards[index].name: self._shards[index].get_state() for index in self._owned}

    def set_state(self, state: Mapping[str, bytes]) -> None:
        """Goes to a saved position: the next batches are exactly those that followed it.

        The iterator must be of the same configuration as the one saved, in this process or others, of any number.

        Raises:
          UserError: the configuration or the vocabulary was another one, or the state is damaged.
        """
        for shard in self._shards.values():
            shard.set_state(state[shard.name])


class _Shard:
    """One of the parts of a split: its share of the rows of one batch after another, and its position.

    Attributes:
      name: tells it from others, such as ``0_of_4``.
    """

    def __init__(
        self, config: DataConfig, provider: seqio.Task | seqio.Mixture, repeat: bool, index: int, num_shards: int
    ) -> None:
        self.name = f"{index}_of_{num_shards}"
        self._config, self._provider, self._repeat = config, provider, repeat
        self._index, self._num_shards = index, num_shards
        self._rows = config.batch_size // num_shards
        self._iterator = self._new_iterator()
        self._started = False

    def read(self) -> Batch:
        """Returns the next rows; raises as `BatchIterator.__next__`."""
        try:
            tensors = next(self._iterator)
        except StopIteration:
            if self._started:
                raise
            which = f" in shard {self.name}" if self._num_shards > 1 else ""
            raise UserError(
                f"Split {self._config.split!r} of {self._config.mixture_or_task_name!r} gives no examples{which}."
            ) from None
        self._started = True
        return {key: self._array(key, tensor.numpy()) for key, tensor in sorted(tensors.items())}

    def get_state(self) -> bytes:
        """Returns the position behind the rows that were returned last."""
        return iterator_state.save(self._iterator, self._description())

    def set_state(self, state: bytes) -> None:
        """Goes to a saved position; raises as `BatchIterator.set_state`."""
        # TensorFlow cannot move an iterator back to before its first element.
        iterator = self._new_iterator() if self._started else self._iterator
        iterator_state.restore(iterator, state, self._description())
        self._iterator = iterator
        self._started = True

    def _new_iterator(self) -> Iterator[Any]:
        rows = _dataset(self._config, self._provider, self._repeat, self._index, self._num_shards)
        # Said now: a source knows the text that was read from it last, which may be another shard's soon.
        self._text = tasks.describe_text(self._provider, self._config.split)
        return iter(rows.batch(self._rows).prefetch(2))

    def _array(self, key: str, values: np.ndarray) -> np.ndarray:
        missing = self._rows - len(values)
        if missing:
            values = np.pad(values, ((0, missing), (0, 0)))
        return values.astype(np.float32 if key == "decoder_loss_weights" else np.int32)

    def _description(self) -> dict[str, Any]:
        """All that decides which rows come; text and vocabulary by their content, not their paths."""
        vocabulary = self._provider.output_features["targets"].vocabulary
        description = dataclasses.asdict(self._config) | {"vocabulary": vocabulary_fingerprint(vocabulary)}
        del description["vocabulary_path"], description["num_shards"]
        shard = [self._index, self._num_shards]
        return description | {"text": self._text, "repeat": self._repeat, "shard": shard}


def evaluation_batches(
    config: DataConfig, num_batches: int | None = None, rows: BatchRows | None = None
) -> Iterator[Batch]:
    """Yields the batches of one pass in the order of the files, the same ones each time.

    Args:
      config: what to read; its `shuffle` is not heeded. Of a mixture the pass ends with its first exhausted
        task.
      num_batches: where to stop; None reads the whole split.
      rows: which rows of each batch are wanted; None for all.

    Yields:
      Batches as `BatchIterator` gives them; the last one is filled with rows of zeros, whose loss weights are
      0.

    Raises:
      UserError: see `BatchIterator`.
    """
    batches = BatchIterator(dataclasses.replace(config, shuffle=False), repeat=False, rows=rows)
    for index, batch in enumerate(batches):
        if index == num_batches:
            return
        yield batch


def unigram_counts(config: DataConfig, num_batches: int | None = None) -> np.ndarray:
    """Counts the target tokens of `evaluation_batches`: int64 [vocabulary size].

    From a training split's counts `unigram_loss` scores another split, as the simplest model of all would.
    """
    counts = np.zeros(get_vocabulary(config).vocab_size, np.int64)
    for batch in evaluation_batches(config, num_batches):
        tokens = batch["decoder_target_tokens"][batch["decoder_loss_weights"] > 0]
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def unigram_loss(model_counts: np.ndarray, counts: np.ndarray) -> float:
    """Returns the mean cross-entropy in nats a token of a model that knows token frequencies alone.

    Args:
      model_counts: [vocabulary] token counts that the model learned from; each is raised by one.
      counts: [vocabulary] token counts that it is scored on.
    """
    log_probs = np.log(model_counts + 1.0) - np.log(np.sum(model_counts + 1.0))
    return float(-np.sum(counts * log_probs) / np.sum(counts))


def get_vocabulary(config: DataConfig) -> seqio.Vocabulary:
    """Returns the vocabulary of a configuration's targets.

    Raises:
      UserError: see `tasks.get_mixture_or_task`.
    """
    return _provider(config).output_features["targets"].vocabulary


def _provider(config: DataConfig) -> seqio.Task | seqio.Mixture:
    provider = tasks.get_mixture_or_task(config.mixture_or_task_name, config.vocabulary_path, config.extra_ids)
    if missing := [key for key in _FEATURES if key not in provider.output_features]:
        raise ConfigError(
            "DataConfig.mixture_or_task_name",
            f"is {provider.name!r}, which has no {missing[0]!r}; a model needs 'inputs' and 'targets'.",
        )
    if config.split not in provider.splits:
        raise ConfigError(
            "DataConfig.split",
            f"is {config.split!r}, but the splits of {provider.name!r} are {', '.join(provider.splits)}.",
        )
    return provider


def _dataset(
    config: DataConfig, provider: seqio.Task | seqio.Mixture, repeat: bool, shard_index: int, num_shards: int
) -> tf.data.Dataset:
    """Returns the dataset of single rows."""
    from switch_t5.data.tensorflow_runtime import seqio, tf

    lengths = dict(config.task_feature_lengths)
    dataset = provider.get_dataset(
        sequence_length=lengths,
        split=config.split,
        shuffle=config.shuffle,
        # Of one seed all shards would mask the same places.
        seed=config.seed * num_shards + shard_index,
        shard_info=seqio.ShardInfo(shard_index, num_shards) if num_shards > 1 else None,
        num_epochs=None if repeat else 1,
        # A cache would freeze the first epoch's order, and be written into every saved position.
        try_in_mem_cache=False,
    )
    dataset = seqio.EncDecFeatureConverter(pack=config.pack)(dataset, lengths)
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)
