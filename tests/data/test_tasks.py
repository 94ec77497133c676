"""Tasks: their names, the vocabulary they get, and tasks made from text files."""

# TensorFlow's stubs are partial, and seqio's hide what it returns.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from switch_t5.data import tasks
from switch_t5.data.tensorflow_runtime import seqio
from switch_t5.data.vocabularies import load_vocabulary
from switch_t5.errors import ConfigError, UserError


def test_t5s_names_are_registered() -> None:
    names = tasks.task_names()
    assert {"c4_v220_span_corruption", "c4_v301_span_corruption", "sotu_span_corruption", "mc4"} <= set(names)
    assert {"mc4.en", "mc4.iw", "mc4.zh_Latn"} <= set(names)
    assert names == sorted(names)


def test_mc4_has_101_languages_and_six_of_them_in_latin_script() -> None:
    assert len(tasks.MC4_LANGUAGES) == len(set(tasks.MC4_LANGUAGES)) == 107
    assert sum("-Latn" not in language for language in tasks.MC4_LANGUAGES) == 101


def test_listing_names_loads_no_tensorflow() -> None:
    script = "import sys; from switch_t5.data.tasks import task_names; task_names(); print('seqio' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_a_task_gets_the_configured_vocabulary(vocabulary_file: str) -> None:
    task = tasks.get_mixture_or_task("sotu_span_corruption", vocabulary_file)
    vocabularies = {feature.vocabulary.vocab_size for feature in task.output_features.values()}
    assert vocabularies == {400}


def test_without_a_vocabulary_the_embedded_corpus_is_read_in_bytes() -> None:
    task = tasks.get_mixture_or_task("sotu_span_corruption")
    assert task.output_features["targets"].vocabulary == seqio.ByteVocabulary(extra_ids=100)


def test_asking_for_one_vocabulary_does_not_change_what_others_get(vocabulary_file: str) -> None:
    tasks.get_mixture_or_task("sotu_span_corruption", vocabulary_file)
    task = tasks.get_mixture_or_task("sotu_span_corruption", extra_ids=5)
    assert task.output_features["inputs"].vocabulary.vocab_size == 264


def test_all_tasks_of_a_mixture_get_the_vocabulary() -> None:
    mixture = tasks.get_mixture_or_task("mc4", "bytes")
    assert len(mixture.tasks) == 107
    assert {task.output_features["targets"].vocabulary.vocab_size for task in mixture.tasks} == {359}


def test_c4_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        tasks.get_mixture_or_task("c4_v301_span_corruption")
    assert str(error.value) == (
        "DataConfig.vocabulary_path must be set for 'c4_v301_span_corruption': the path of a SentencePiece model, "
        "such as T5's cc_all.32000.100extra/sentencepiece.model, or 'bytes'."
    )


def test_a_task_that_is_not_registered_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        tasks.get_mixture_or_task("c4_v310_span_corruption")
    assert str(error.value) == (
        "There is no task or mixture called 'c4_v310_span_corruption'. Did you mean 'c4_v301_span_corruption'? "
        "`switch-t5 data list` prints all names."
    )


def test_a_task_of_the_users_keeps_its_own_vocabulary() -> None:
    own = seqio.ByteVocabulary(extra_ids=3)
    seqio.TaskRegistry.add(
        "users_own_task",
        source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"]),
        output_features={"targets": seqio.Feature(own)},
    )
    assert tasks.get_mixture_or_task("users_own_task").output_features["targets"].vocabulary is own
    assert "users_own_task" in tasks.task_names()
    with pytest.raises(ConfigError) as error:
        tasks.get_mixture_or_task("users_own_task", "bytes")
    assert str(error.value) == (
        "DataConfig.vocabulary_path is 'bytes', but 'users_own_task' brings its own vocabulary: leave it unset."
    )


def test_a_text_task_is_its_name_and_may_be_defined_twice(corpus: Path) -> None:
    for _ in range(2):
        assert tasks.text_task("defined_twice", str(corpus)) == "defined_twice"
    assert "defined_twice" in tasks.task_names()
    assert tasks.get_mixture_or_task("defined_twice").name == "defined_twice"


def test_one_name_cannot_stand_for_two_text_tasks(corpus: Path) -> None:
    tasks.text_task("defined_otherwise", str(corpus))
    with pytest.raises(UserError) as error:
        tasks.text_task("defined_otherwise", f"{corpus}/0*.txt")
    assert str(error.value) == (
        "There is already another task called 'defined_otherwise': give text_task.name a new one."
    )
    with pytest.raises(UserError, match="There is already another task called 'mc4'"):
        tasks.text_task("mc4", str(corpus))


def test_a_malformed_name_is_refused() -> None:
    with pytest.raises(UserError) as error:
        tasks.text_task("my essays", "*.txt")
    assert str(error.value) == (
        "'my essays' cannot be a task's name: use letters, digits and the signs _ . : # without spaces."
    )


def test_a_users_mixture_of_text_tasks_gets_the_vocabulary(corpus: Path, vocabulary_file: str) -> None:
    for name in ("mixed_one", "mixed_two"):
        tasks.get_mixture_or_task(tasks.text_task(name, str(corpus)))
    seqio.MixtureRegistry.add("users_mixture", [("mixed_one", 1), ("mixed_two", 3)])
    mixture = tasks.get_mixture_or_task("users_mixture", vocabulary_file)
    assert [mixture.get_rate(task) for task in mixture.tasks] == [1, 3]
    vocabularies = [task.output_features["targets"].vocabulary for task in mixture.tasks]
    assert vocabularies == [load_vocabulary(vocabulary_file)] * 2
