"""The command that certifies routing on the user's devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from switch_t5.cli.main import main
from switch_t5.conformance import cells
from switch_t5.conformance.cells import Cell, Result


@pytest.fixture
def two_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "ROUTERS", {name: cells.ROUTERS[name] for name in ("switch", "hash")})


@pytest.mark.usefixtures("two_routers")
def test_it_prints_a_line_a_cell_and_writes_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert main(["conformance", "--quick", f"--json={path}"]) == 0
    printed = capsys.readouterr()
    assert [line.split(" | ")[0] for line in printed.out.splitlines()[2:]] == ["| switch", "| hash"]
    assert "| switch | plain | gather | float32 | 1 device |" in printed.out
    assert printed.err.endswith("all within their bounds.\n")
    rows = json.loads(path.read_text())["cells"]
    assert [row["router"] for row in rows] == ["switch", "hash"]
    assert all(row["is_green"] and row["errors"].keys() == row["bounds"].keys() for row in rows)
    assert all(0 < max(row["errors"].values()) < min(row["bounds"].values()) for row in rows)


@pytest.mark.usefixtures("two_routers")
def test_json_on_standard_output_has_it_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "check", lambda cell: Result(cell, {"output": 0.0}))
    assert main(["conformance", "--quick", "--json=-"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["cells"]) == 2
    assert "| hash | plain |" in printed.err


@pytest.mark.usefixtures("two_routers")
def test_a_cell_beyond_its_bound_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(cell: Cell) -> Result:
        return Result(cell, {"output": 1.0 if cell.router == "hash" else 0.0})

    monkeypatch.setattr(cells, "check", check)
    assert main(["conformance", "--quick"]) == 1
    printed = capsys.readouterr()
    assert "| hash | plain | gather | float32 | 1 device | 1.0e+00 | output | 2e-05: NO |" in printed.out
    assert printed.err.endswith("some cells are beyond their bound.\n")


def test_meshes_that_lack_devices_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cells, "check", lambda cell: Result(cell, {"output": 0.0}))
    of_few = [cell for cell in cells.cells(2) if cell.router == "hash"]
    monkeypatch.setattr(cells, "cells", lambda device_count: of_few)
    assert main(["conformance"]) == 0
    printed = capsys.readouterr().err
    assert "not checked, for want of devices: the meshes expert 4, 2 x 2 x 2.\n" in printed


@pytest.mark.slow
def test_a_process_of_its_own_divides_the_cpu_as_asked(tmp_path: Path) -> None:
    path, environment = tmp_path / "result.json", dict(os.environ)
    del environment["JAX_NUM_CPU_DEVICES"]
    command = [sys.executable, "-m", "switch_t5", "conformance", "--quick", "--num_cpu_devices=3", f"--json={path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(cells.ROUTERS)} cells on 3 cpu" in done.stderr
    assert {row["router"] for row in json.loads(path.read_text())["cells"]} == set(cells.ROUTERS)


def test_no_devices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conformance", "--num_cpu_devices=0"]) == 2
    assert capsys.readouterr().err == "switch-t5: --num_cpu_devices must be at least 1, got 0.\n"
