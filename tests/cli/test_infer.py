"""What ``switch-t5 infer`` refuses before it opens a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from switch_t5.cli.main import main


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--count=0"], "--count must be at least 1, got 0."),
        (["--count=2", "--text=a ___"], "--count is of held-out examples, which --text replaces."),
        (["--count=2", "--input=a.txt"], "--count is of held-out examples, which --input replaces."),
        (["--field=x"], "--field needs --input: name the file of inputs."),
        (["--skip_malformed"], "--skip_malformed needs --input: name the file of inputs."),
        (["--input=a.txt", "--text=a ___"], "--text and --input exclude each other: give one of them."),
        (["--input=a.txt", "--field=x"], "--field is of JSON lines: the lines of a.txt are texts as they stand."),
        (["--input=a.txt", "--task=x"], "--task is of JSON lines: the lines of a.txt are texts as they stand."),
        (
            ["--input=a.jsonl", "--task=x", "--field=y"],
            "--field and --task exclude each other: a task takes its own fields of a row.",
        ),
        (["--input=none.jsonl"], "--input=none.jsonl is not a file."),
        (["--input=a.txt", "--output="], "--output is empty: give it a value, or leave it out."),
        (["--input=a.txt", "--output=."], "--output=. is a folder: name a file."),
        (["--input=a.txt", "--output=./a.txt"], "--output=a.txt is the input: name another file."),
        (["--input=a.txt", "--output=no/b"], "--output=no/b cannot be written: there is no folder no."),
    ],
)
def test_flags_that_have_no_effect_are_refused(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one\n")
    assert main(["infer", *words]) == 2
    assert capsys.readouterr().err == f"switch-t5: {sentence}\n"
