"""The script that fills the paper's table 6: its rows are configurations, its shares are arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import distillation as script
from scripts.experiments.distillation import STUDENTS
from scripts.experiments.program import COMMON, DENSE, TINY
from switch_t5.cli.build import ROOTS, RunSpec
from switch_t5.cli.configuration import Configuration

LOSSES = {"teacher": 2.0, "plain": 3.0, **dict(zip(STUDENTS, (2.9, 2.8, 2.75, 3.1), strict=True))}


def test_every_row_is_a_configuration_of_a_dense_student_and_a_sparse_teacher() -> None:
    found = {}
    for row, settings in STUDENTS.items():
        common = ("MODEL_DIR=unused", "TEACHER_CHECKPOINT_PATH=/teacher", *COMMON, *TINY, *DENSE, *settings)
        configuration = Configuration.load(["runs/distill.gin", "runs/quickstart.gin"], common)
        configuration.check_flags_have_effect(ROOTS)
        spec = RunSpec.read(configuration)
        distillation = spec.train.distillation
        assert distillation is not None
        assert spec.transformer.moe is None
        assert distillation.teacher.moe is not None
        assert distillation.teacher.moe.num_experts == 8
        assert distillation.teacher.emb_dim == spec.transformer.emb_dim == 32
        assert spec.data.mixture_or_task_name == "sotu_span_corruption"
        found[row] = (distillation.initialize_student, spec.loss.hard_loss_weight, spec.loss.soft_loss_weight)
    rows = ((False, 0.0, 1.0), (True, 0.0, 1.0), (True, 0.75, 0.25), (True, 1.0, 0.0))
    assert tuple(found.values()) == rows


def test_shares_and_means_are_those_of_each_seed(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    others = {**LOSSES, "plain": 4.0}
    given = {"seed_0": LOSSES, "seed_1": others}
    monkeypatch.setattr(script, "losses_of_seed", lambda folder, args, settings: given[folder.name])
    assert script.main(["--seeds=0,1", "--steps=20", f"--json={tmp_path / 'result.json'}"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    rows: dict[str, Any] = {row["model"]: row for row in result["rows"]}
    assert list(rows) == ["teacher", "plain", *STUDENTS]
    assert (rows["teacher"]["share_kept"], rows["plain"]["share_kept"]) == (1, 0)
    assert rows["plain"]["mean"] == 3.5
    assert rows["plain"]["std"] == pytest.approx(math.sqrt(0.5))
    mixture = rows["+ mixture 0.75 / 0.25"]
    assert mixture["share_kept_by_seed"] == pytest.approx([0.25, 0.625])
    assert mixture["share_kept"] == pytest.approx(0.4375)
    assert rows["weights alone"]["share_kept_by_seed"][0] == pytest.approx(-0.1)
    assert "| + mixture 0.75 / 0.25 | 2.7500 ± 0.0000 | 44% |" in capsys.readouterr().out


def test_a_teacher_without_gain_and_a_loss_that_is_not_finite_are_told(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(script, "losses_of_seed", lambda *rest: {**LOSSES, "teacher": 3.5})
    assert script.main(["--steps=20", "--json=-"]) == 0
    captured = capsys.readouterr()
    assert "Seed 0: the teacher is no better than the plain model" in captured.err
    assert {row["share_kept"] for row in json.loads(captured.out)["rows"]} == {None}
    monkeypatch.setattr(script, "losses_of_seed", lambda *rest: {**LOSSES, "weights alone": math.nan})
    assert script.main(["--steps=20"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "Seed 0: the loss of weights alone is not finite.\n"
    assert "| weights alone | not finite | – |" in captured.out


def test_the_teacher_alone_may_be_trained_for_longer(monkeypatch, capsys) -> None:
    trained = {}

    def held_out(model_dir: Path, steps: int, *_rest: object) -> float:
        trained[model_dir.name] = steps
        return 1.0

    monkeypatch.setattr(script, "held_out", held_out)
    assert script.main(["--steps=20", "--teacher_steps=60", "--rows=mixture", "--json=-"]) == 0
    assert trained == {"teacher": 60, "plain": 20, "mixture": 20}
    assert json.loads(capsys.readouterr().out)["teacher_steps"] == 60


@pytest.mark.slow
def test_the_quick_form_trains_teacher_plain_model_and_students(capsys) -> None:
    assert script.main(["--quick", "--steps=3", "--rows=mixture,initialization", "--json=-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["model"] for row in rows] == ["teacher", "plain", "+ mixture 0.75 / 0.25", "weights alone"]
    assert len({row["mean"] for row in rows}) == 4
