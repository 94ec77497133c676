"""``switch-t5 train``: what it does before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli import train
from switch_t5.cli.main import main
from tests.integration.conftest import TINY


def test_a_second_run_is_refused_before_it_changes_the_first_ones_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "_prepare", lambda configuration, run: (None, None))
    (tmp_path / "config.gin").write_text("of the first")
    with Checkpointer(tmp_path):
        assert main(["train", f"--gin_file={TINY}", f"--gin.MODEL_DIR={tmp_path}", "--gin.TEXTS=unused"]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert (tmp_path / "config.gin").read_text() == "of the first"


def test_a_start_that_is_refused_leaves_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "_prepare", lambda configuration, run: (None, None))
    start = f"--gin.TrainConfig.initial_checkpoint_path={tmp_path / 'absent'}"
    command = ["train", f"--gin_file={TINY}", f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TEXTS=unused", start]
    assert main(command) == 2
    assert f"{tmp_path / 'absent'} does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.gin").exists()
