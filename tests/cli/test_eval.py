"""What ``switch-t5 eval`` refuses before it opens a run."""

from __future__ import annotations

import pytest

from switch_t5.cli.main import main


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
