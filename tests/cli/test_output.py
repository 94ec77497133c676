"""A command's result as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from switch_t5.cli.output import add_json_flag, write_json
from switch_t5.errors import UserError

RESULT = {
    "loss": 0.1,
    "steps": np.arange(2),
    "rate": np.float32(0.5),
    "dir": Path("d"),
    "of": {8: (True, None, "a")},
}
WRITTEN = {"loss": 0.1, "steps": [0, 1], "rate": 0.5, "dir": "d", "of": {"8": [True, None, "a"]}}


def destination(*words: str) -> str | None:
    """Returns ``args.json`` of a command with these words."""
    parser = argparse.ArgumentParser()
    add_json_flag(parser)
    return parser.parse_args(words).json


def test_without_the_flag_nothing_is_written(capsys):
    write_json(RESULT, destination())
    assert capsys.readouterr().out == ""


def test_a_dash_is_standard_output(capsys):
    write_json(RESULT, destination("--json=-"))
    assert json.loads(capsys.readouterr().out) == WRITTEN


def test_a_file_is_written_whole_and_nothing_else_stays(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    write_json(RESULT, destination(f"--json={path}"))
    assert json.loads(path.read_text()) == WRITTEN
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json({"object": object()}, str(path))
    assert path.read_text() == "old"


def test_a_link_is_followed_and_a_device_is_never_replaced(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "target.json")
    write_json(1, str(link))
    assert link.is_symlink() and (tmp_path / "target.json").read_text() == "1\n"
    write_json(1, "/dev/null")
    assert not Path("/dev/null").is_file()


def test_what_is_not_a_number_is_null(capsys):
    write_json([float("nan"), np.inf, np.array([1.0, -np.inf])], "-")
    assert json.loads(capsys.readouterr().out) == [None, None, [1.0, None]]


@pytest.mark.parametrize("path", ["", "."])
def test_a_destination_that_is_no_file_is_refused_before_the_work(path):
    with pytest.raises(UserError, match=f"^--json={path} is not a file.$"):
        destination(f"--json={path}")


def test_a_destination_in_no_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError) as raised:
        destination(f"--json={tmp_path}/none/result.json")
    assert str(raised.value) == (
        f"--json={tmp_path}/none/result.json cannot be written: there is no folder '{tmp_path}/none'."
    )


def test_a_file_that_cannot_be_written_is_told_in_a_sentence(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as raised:
        write_json(1, str(tmp_path / "folder"))
    assert str(raised.value) == f"--json={tmp_path}/folder cannot be written: Is a directory."
