"""What ``switch-t5 eval`` refuses before it opens a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from switch_t5.cli.eval import _recorder
from switch_t5.cli.main import main
from switch_t5.errors import UserError


@pytest.mark.parametrize(
    ("words", "first", "beside"),
    [
        (["--score_file=a", "--submission=b"], "submission", "score_file"),
        (["--score_file=a", "--predictions=b"], "predictions", "score_file"),
        (["--score_file=a", "--checkpoint=b"], "checkpoint", "score_file"),
        (["--score_file=a", "--metrics=b"], "metrics", "score_file"),
        (["--submission=a", "--json=-"], "json", "submission"),
        (["--submission=a", "--metrics=b"], "metrics", "submission"),
    ],
)
def test_flags_that_have_no_effect_are_refused(
    words: list[str], first: str, beside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *words]) == 2
    told = f"switch-t5: --{first} has no effect with --{beside}: give one of them.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("flag", ["checkpoint", "predictions", "submission", "score_file", "metrics"])
def test_an_empty_flag_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", f"--{flag}="]) == 2
    assert capsys.readouterr().err == f"switch-t5: --{flag} is empty: give it a value, or leave it out.\n"


@pytest.mark.parametrize("flag", ["predictions", "submission", "metrics"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_scored(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["eval", f"--{flag}={tmp_path}/file"]) == 2
    assert capsys.readouterr().err == f"switch-t5: --{flag}={tmp_path}/file is a file: name a folder.\n"


def test_scores_are_appended_behind_whole_entries_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    with _recorder(str(tmp_path)) as record:
        record(3, "one", {"loss": 2.0})
        record(3, "one", {"score": 50.0})
    lines = ['{"step": 9, "loss": 1.0}', '{"step": 3, "task": "one", "loss": 2.0}']
    assert path.read_text().splitlines() == [*lines, '{"step": 3, "task": "one", "score": 50.0}']
    path.write_text("<html>\n")
    with pytest.raises(UserError, match="line 1 is not an entry of a run's metrics"), _recorder(str(tmp_path)):
        pass
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl failed \(Is a directory\)"), _recorder(str(tmp_path)):
        pass
