"""The tasks and mixtures as seqio has them, registered once and copied with the vocabulary configured."""

# TensorFlow's stubs are partial, and seqio's decorators hide the types of what they decorate.
# pyright: reportArgumentType=false, reportInvalidTypeForm=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from switch_t5.data import tasks, text_to_text
from switch_t5.data.sources import EmbeddedCorpusSource, ExamplesSource, PreparedTfdsSource, TextFilesSource
from switch_t5.data.span_corruption import span_corruption
from switch_t5.data.tensorflow_runtime import seqio, tf
from switch_t5.data.vocabularies import EXTRA_IDS, load_vocabulary
from switch_t5.errors import ConfigError

# mT5 samples a language in proportion to its number of documents to the power of 0.3.
_MC4_EXPONENT = 0.3


class ConfiguredVocabulary(seqio.ByteVocabulary):
    """Stands in a registered task for the vocabulary that a configuration will choose.

    Used as it is, it encodes bytes.
    """

    def __init__(self, required: bool) -> None:
        """Makes a stand-in; `required` says that the configuration must name a vocabulary."""
        self.required = required
        super().__init__(extra_ids=EXTRA_IDS)


def registered(name: str) -> seqio.Task | seqio.Mixture:
    """Returns what seqio's registries hold under a name, having added this package's tasks."""
    _register_all()
    return seqio.get_mixture_or_task(name)


def with_vocabulary(
    provider: seqio.Task | seqio.Mixture, vocabulary_path: str | None, extra_ids: int
) -> seqio.Task | seqio.Mixture:
    """Returns a copy of a task or mixture with the configured vocabulary in the place of stand-ins.

    Raises:
      UserError: the vocabulary cannot be used, is needed and missing, or given to a task that has its own.
    """
    vocabularies = [
        feature.vocabulary for task in seqio.get_subtasks(provider) for feature in task.output_features.values()
    ]
    stand_ins = [v for v in vocabularies if isinstance(v, ConfiguredVocabulary)]
    if not stand_ins:
        if vocabulary_path is not None:
            raise ConfigError(
                "DataConfig.vocabulary_path",
                f"is {vocabulary_path!r}, but {provider.name!r} brings its own vocabulary: leave it unset.",
            )
        return provider
    if vocabulary_path is None and any(stand_in.required for stand_in in stand_ins):
        raise ConfigError(
            "DataConfig.vocabulary_path",
            f"must be set for {provider.name!r}: the path of a SentencePiece model, such as T5's "
            "cc_all.32000.100extra/sentencepiece.model, or 'bytes'.",
        )
    return _copy(provider, load_vocabulary(vocabulary_path, extra_ids))


def _copy(provider: seqio.Task | seqio.Mixture, vocabulary: seqio.Vocabulary) -> seqio.Task | seqio.Mixture:
    if isinstance(provider, seqio.Task):
        features = {
            key: dataclasses.replace(feature, vocabulary=vocabulary)
            if isinstance(feature.vocabulary, ConfiguredVocabulary)
            else feature
            for key, feature in provider.output_features.items()
        }
        return provider.replace(output_features=features)
    rates = [
        (_copy(seqio.get_mixture_or_task(name), vocabulary), rate) for name, rate in provider.rate_per_task_name.items()
    ]
    return seqio.Mixture(provider.name, rates, sample_fn=provider._sample_fn)


def _register_all() -> None:
    """Adds to seqio's registries what they do not have yet."""
    _add(tasks.EMBEDDED_TASK, EmbeddedCorpusSource(), vocabulary_required=False, merge_documents=False)
    for name, dataset in tasks.C4_TASKS.items():
        _add(name, PreparedTfdsSource(dataset, {"train": "train", "validation": "validation"}))
    for language in tasks.MC4_LANGUAGES:
        splits = {"train": language, "validation": f"{language}-validation"}
        _add(tasks.mc4_task(language), PreparedTfdsSource(tasks.MC4_DATASET, splits))
    if tasks.MC4_MIXTURE not in seqio.MixtureRegistry.names():
        rate = functools.partial(seqio.mixing_rate_num_examples, temperature=1 / _MC4_EXPONENT)
        seqio.MixtureRegistry.add(
            tasks.MC4_MIXTURE,
            [tasks.mc4_task(language) for language in tasks.MC4_LANGUAGES],
            default_rate=rate,
        )
    for task in tasks.configured_text_tasks():
        source = TextFilesSource(task.pattern, task.validation_pattern, task.field)
        _add(task.name, source, vocabulary_required=False, merge_documents=task.merge_documents)
    _add_text_to_text()


def _add_text_to_text() -> None:
    """Adds the tasks of labelled rows, and their mixtures."""
    for task in text_to_text.tasks().values():
        if task.name in seqio.TaskRegistry.names():
            continue
        vocabulary = ConfiguredVocabulary(required=False)
        seqio.TaskRegistry.add(
            task.name,
            source=ExamplesSource(task),
            preprocessors=[
                _untransformed(_tokenize),
                _untransformed(seqio.preprocessors.append_eos_after_trim),
            ],
            output_features={key: seqio.Feature(vocabulary) for key in ("inputs", "targets")},
            metric_fns=[],
        )
    for mixture in text_to_text.mixtures().values():
        if mixture.name not in seqio.MixtureRegistry.names():
            trained = [(name, weight) for name, weight in mixture.weights.items() if weight]
            seqio.MixtureRegistry.add(mixture.name, trained)


def _add(
    name: str, source: seqio.DataSource, *, vocabulary_required: bool = True, merge_documents: bool = True
) -> None:
    if name in seqio.TaskRegistry.names():
        return
    vocabulary = ConfiguredVocabulary(vocabulary_required)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            _untransformed(functools.partial(seqio.preprocessors.rekey, key_map={"inputs": None, "targets": "text"})),
            _untransformed(_tokenize),
            seqio.CacheDatasetPlaceholder(),
            _untransformed(functools.partial(span_corruption, merge_documents=merge_documents)),
            _untransformed(seqio.preprocessors.append_eos_after_trim),
        ],
        output_features={
            "inputs": seqio.Feature(vocabulary, required=False),
            "targets": seqio.Feature(vocabulary),
        },
        metric_fns=[],
    )


def _untransformed(preprocessor: Callable[..., tf.data.Dataset]) -> Callable[..., tf.data.Dataset]:
    """Traces a preprocessor's functions as they are.

    None has Python control flow over tensors, and looking for it would cost about a second of every start.
    """

    @functools.wraps(preprocessor)
    def traced(*args: object, **kwargs: object) -> tf.data.Dataset:
        return tf.autograph.experimental.do_not_convert(preprocessor)(*args, **kwargs)

    return traced


def _tokenize(dataset: tf.data.Dataset, output_features: dict[str, seqio.Feature]) -> tf.data.Dataset:
    """Encodes the text of each feature.

    seqio's own preprocessor works on 256 documents ahead and keeps their text: with documents as long as
    speeches the first batch would come late, and a saved iterator would hold them all.
    """
    encode = functools.partial(
        seqio.preprocessors.tokenize_impl, output_features=output_features, copy_pretokenized=False
    )
    return seqio.map_over_dataset(encode, num_parallel_calls=tf.data.AUTOTUNE)(dataset)
