"""A run that dies at any moment, and is started again, does exactly what it would have done."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from switch_t5.checkpoint.manager import Checkpointer
from tests.integration.conftest import Program

STEPS = 30


@pytest.fixture(scope="module")
def uninterrupted(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    model_dir = tmp_path_factory.mktemp("runs") / "whole"
    program.run("train", model_dir)
    return model_dir


def _entries(model_dir: Path) -> list[dict]:
    path = model_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _logged(model_dir: Path, step: int, since: float) -> bool:
    """Whether a process that started at ``since`` has logged so many steps."""
    path = model_dir / "metrics.jsonl"
    if not path.exists() or path.stat().st_mtime < since:
        return False
    return path.read_bytes().count(b'"learning_rate"') >= step


def _assert_same_run(one: Path, other: Path, note: str = "") -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes(), note
    with Checkpointer(one, read_only=True) as first, Checkpointer(other, read_only=True) as second:
        assert first.latest_step() == second.latest_step() == STEPS
        left, right = first.restore_numpy(), second.restore_numpy()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.tobytes() == right[name].tobytes(), f"{name} {note}"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_the_uninterrupted_one_bitwise(
    program: Program, uninterrupted: Path, tmp_path: Path
) -> None:
    model_dir, seed = tmp_path / "killed", int.from_bytes(os.urandom(4))
    random = np.random.default_rng(seed)
    killed = 0
    for moment in sorted(random.choice(np.arange(1, STEPS - 10), 2, replace=False)):
        started = time.time()
        process = program.start("train", model_dir)
        while process.poll() is None and not _logged(model_dir, moment, started):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        # A run may end before the kill; that it failed by itself would be another matter.
        assert process.returncode in (-signal.SIGKILL, 0), f"seed {seed}: {errors}"
        killed += process.returncode == -signal.SIGKILL
    assert killed, f"seed {seed}: no run was killed"
    program.run("train", model_dir)
    _assert_same_run(uninterrupted, model_dir, f"seed {seed}")


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_changes_nothing(
    program: Program, uninterrupted: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "stopped"
    process = program.start("train", model_dir)
    while process.poll() is None and not _logged(model_dir, 4, since=0):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    assert "the same command goes on from there" in errors
    assert _entries(model_dir)[-1]["step"] < STEPS
    program.run("train", model_dir)
    _assert_same_run(uninterrupted, model_dir)
    _check_log(model_dir)
    _check_that_it_is_left_as_it_is(program, model_dir)


def _check_log(model_dir: Path) -> None:
    """Each step is there once, and evaluations carry their task."""
    entries = _entries(model_dir)
    assert [entry["step"] for entry in entries if "task" not in entry] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in entries if "task" in entry] == list(range(0, STEPS + 1, 10))
    assert {entry["task"] for entry in entries if "task" in entry} == {"tiny_texts"}


def _check_that_it_is_left_as_it_is(program: Program, model_dir: Path) -> None:
    """Started again a finished run does nothing, and a configuration that does not fit it is refused."""
    before = {name: (model_dir / name).read_bytes() for name in ("metrics.jsonl", "config.gin")}
    done = program.run("train", model_dir)
    assert f"is trained to step {STEPS} already" in done.stderr
    done = program.run("train", model_dir, "--gin.MoEConfig.num_experts=8", code=2)
    assert "MoEConfig.num_experts was 4 and is now 8" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {name: (model_dir / name).read_bytes() for name in before}


@pytest.mark.slow
def test_a_trained_run_is_evaluated_and_fills_blanks(program: Program, uninterrupted: Path, tmp_path: Path) -> None:
    report = tmp_path / "eval.json"
    program.run("eval", uninterrupted, f"--json={report}")
    result = json.loads(report.read_text())
    last = [entry for entry in _entries(uninterrupted) if "task" in entry][-1]
    assert (result["step"], result["loss"]) == (STEPS, last["loss"])
    assert result["unigram_loss"] > 0
    done = program.run("infer", uninterrupted, "--text=abcd ___ efgh", "--json=-")
    assert json.loads(done.stdout)[0]["input"] == "abcd <extra_id_0> efgh"
