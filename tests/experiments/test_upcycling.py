"""The script that compares an upcycled model with its dense start going on: its arms, its arithmetic, its memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scripts.experiments import upcycling as script
from scripts.experiments.program import COMMON, TINY, dense
from switch_t5.cli.build import ROOTS, RunSpec
from switch_t5.cli.configuration import Configuration

ONE = script.Seed({"dense": {0: 3.0, 5: 2.5, 10: 2.0}, "upcycled": {0: 3.00001, 5: 2.25, 10: 1.5}})
OTHER = script.Seed({"dense": {0: 2.0, 5: 2.0, 10: 2.0}, "upcycled": {0: 2.0, 5: 2.25, 10: 1.75}})


def test_both_arms_go_on_from_the_same_checkpoint_with_the_same_data(monkeypatch, tmp_path: Path) -> None:
    asked: dict[str, RunSpec] = {}

    def train(model_dir: Path, steps: int, files, settings, eval_period: int = 0) -> None:
        configuration = Configuration.load(files, [f"MODEL_DIR={model_dir}", f"TRAIN_STEPS={steps}", *settings])
        configuration.check_flags_have_effect(ROOTS)
        asked[model_dir.name] = RunSpec.read(configuration)
        model_dir.mkdir(parents=True)
        evaluated = range(12, steps + 1, eval_period) if eval_period else [steps]
        entries = [{"step": step, "task": "text", "loss": 20.0 - step} for step in evaluated]
        (model_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    monkeypatch.setattr(script, "train", train)
    args, given = script._parse(["--quick", "--gin.NUM_EXPERTS=4", "--points=2"])
    losses = script.losses_of_seed(tmp_path / "seed_3", args, [*COMMON, *TINY, *given, "SEED=3"])
    assert losses.held_out == {arm: {0: 8.0, 3: 5.0, 6: 2.0} for arm in script.ARMS}
    start, goes_on, upcycled = (asked[name] for name in ("start", "dense", "upcycled"))
    assert (start.train.train_steps, goes_on.train.train_steps, upcycled.train.train_steps) == (12, 18, 18)
    assert start.transformer == goes_on.transformer
    assert start.transformer.moe is goes_on.train.upcycling is None
    assert upcycled.transformer.moe is not None and upcycled.train.upcycling is not None
    assert (upcycled.transformer.moe.num_experts, upcycled.transformer.moe.dispatch) == (4, "dropless")
    assert start.data == goes_on.data == upcycled.data
    for spec in (goes_on, upcycled):
        assert spec.train.initial_checkpoint_path == str(tmp_path / "seed_3" / "start")
        assert spec.train.initial_checkpoint_optimizer


def test_gains_are_those_of_each_seed_and_known_seeds_are_not_trained_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained: list[str] = []

    def losses_of_seed(folder: Path, *rest) -> script.Seed:
        trained.append(folder.name)
        return {"seed_0": ONE, "seed_1": OTHER}[folder.name]

    monkeypatch.setattr(script, "losses_of_seed", losses_of_seed)
    flags = ["--dense_steps=20", "--more_steps=10", f"--json={tmp_path / 'result.json'}"]
    assert script.main([*flags, "--seeds=0"]) == 0
    assert script.main([*flags, "--seeds=0,1"]) == 0
    assert trained == ["seed_0", "seed_1"]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert rows[-1]["gain_by_seed"] == [0.5, 0.25]
    assert rows[-1]["gain"] == 0.375 and rows[-1]["gain_std"] == pytest.approx(math.sqrt(0.03125))
    printed = capsys.readouterr().out
    assert "| 0 | 2.5000 ± 0.7071 | 2.5000 ± 0.7071 | -0.0000 ± 0.0000 |" in printed
    assert "| 10 | 2.0000 ± 0.0000 | 1.6250 ± 0.1768 | 0.3750 ± 0.1768 |" in printed
    assert "differ by 3.3e-06 at the most" in printed
    with pytest.raises(SystemExit, match="other steps or settings"):
        script.main(["--dense_steps=30", "--more_steps=10", f"--json={tmp_path / 'result.json'}"])


def test_another_start_and_a_loss_that_is_not_finite_are_told(monkeypatch, capsys) -> None:
    elsewhere = script.Seed({"dense": {0: 3.0, 5: 1.0}, "upcycled": {0: 3.001, 5: 1.0}})
    monkeypatch.setattr(script, "losses_of_seed", lambda *rest: elsewhere)
    assert script.main(["--json=-"]) == 1
    assert capsys.readouterr().err == "Seed 0: the upcycled model starts at 3.001, and the dense one at 3.0.\n"
    infinite = script.Seed({"dense": {0: 3.0, 5: 3.0}, "upcycled": {0: 3.0, 5: math.nan}})
    monkeypatch.setattr(script, "losses_of_seed", lambda *rest: infinite)
    assert script.main([]) == 1
    captured = capsys.readouterr()
    assert captured.err == "Seed 0: a loss is not finite.\n"
    assert "| 5 | 3.0000 | not finite | not finite |" in captured.out


def test_settings_of_experts_are_left_out_of_a_dense_model() -> None:
    settings = ["MoEConfig.group_size=8", "BATCH_SIZE=4", "NUM_EXPERTS=2", "RouterConfig.router=hash"]
    assert dense(settings) == ["BATCH_SIZE=4", "TransformerConfig.moe=None"]


@pytest.mark.slow
def test_the_quick_form_starts_at_the_dense_loss_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--quick", "--dense_steps=4", "--more_steps=2", "--points=2", "--json=-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in result["rows"]] == [0, 1, 2]
    assert result["rows"][2]["dense"] < result["rows"][0]["dense"]
