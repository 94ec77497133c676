"""The script of SuperGLUE's sample: its rows are SuperGLUE's, dealt by what they say, and its scores are arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from scripts.experiments import superglue as script
from switch_t5.cli.build import ROOTS, RunSpec
from switch_t5.cli.configuration import Configuration
from switch_t5.data.text_to_text import tasks

COPA = {"premise": "It rained.", "choice1": "a", "choice2": "b", "question": "effect", "label": 1, "idx": 0}
ROWS: dict[str, dict[str, Any]] = {
    "boolq": {"question": "is it", "answer": True, "passage": "It is."},
    "cb": {"premise": "He left.", "hypothesis": "he left", "idx": 0, "label": 0},
    "copa": COPA,
    "rte": {"sentence1": "He left.", "sentence2": "He is gone.", "label": 1, "idx": 3},
}


@pytest.mark.parametrize("task", ROWS)
def test_rows_are_renamed_to_what_the_task_reads(task: str, tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([ROWS[task]])
    with pyarrow.ipc.new_stream(tmp_path / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (row,) = script.rows_in(tmp_path, task)
    tasks()[f"super_glue_{task}_v102"].check(row, labelled=True)
    assert row["label"] == ROWS[task].get("label", 1)


def test_a_row_is_dealt_by_what_it_says_and_one_in_three_tests() -> None:
    rows = [{**COPA, "premise": f"{number}", "idx": number} for number in range(900)]
    splits = script.dealt(rows)
    assert 250 < len(splits["validation"]) < 350
    assert sorted(row["idx"] for split in splits.values() for row in split) == list(range(900))
    # Neither its place nor its label moves a row; equal texts are never on both sides.
    again = script.dealt({**row, "idx": 0, "label": 0} for row in reversed(rows))
    said = [{row["premise"] for row in dealt["validation"]} for dealt in (splits, again)]
    assert said[0] == said[1]


def test_the_majority_is_of_the_training_rows_and_scored_on_the_test_rows() -> None:
    labels = {"train": [0, 1, 1], "validation": [1, 0, 0, 0]}
    assert script.majority({split: [{"label": label} for label in of] for split, of in labels.items()}) == 25


def test_each_task_is_finetuned_for_each_rate_and_seed_and_means_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, folder in script.SOURCES.items():
        (tmp_path / folder).mkdir(parents=True)
        table = pyarrow.Table.from_pylist([{**ROWS[task], "idx": number} for number in range(2)])
        with pyarrow.ipc.new_stream(tmp_path / folder / "a.arrow", table.schema) as stream:
            stream.write_table(table)
    monkeypatch.setattr(script, "dealt", lambda rows: {"train": rows, "validation": rows})
    monkeypatch.setattr(script, "_prepare", lambda data, folder: None)
    trained = []

    def train(run: Path, steps: int, files: Any, settings: Any, eval_period: int = 0) -> None:
        trained.append((run.name, steps))
        if run.name == "pretrained":
            return
        configuration = Configuration.load(list(files), ("MODEL_DIR=unused", *settings))
        configuration.check_flags_have_effect(ROOTS)
        spec = RunSpec.read(configuration)
        moe = spec.transformer.moe
        assert moe is not None
        assert run.name == f"{spec.data.mixture_or_task_name.split('_')[2]}_{moe.expert_dropout_rate}_{spec.train.seed}"
        assert spec.transformer.dropout_rate == 0.1
        run.mkdir(parents=True)
        score = 50 + 10 * spec.train.seed + 100 * moe.expert_dropout_rate
        entry = {"step": steps, "task": "a task", "accuracy": score}
        (run / "metrics.jsonl").write_text(json.dumps(entry) + "\n")

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "_run", lambda *words: None)
    result = tmp_path / "result.json"
    flags = f"--rows={tmp_path}", f"--model_dir={tmp_path / 'runs'}", "--seeds=0,1", "--steps=7", f"--json={result}"
    assert script.main([*flags]) == 0
    assert trained[0] == ("pretrained", 2000)
    assert len(trained) == 1 + 4 * 2 * 2
    rows = {row["task"]: row for row in json.loads(result.read_text())["rows"]}
    assert list(rows) == list(script.SOURCES)
    assert rows["cb"]["expert_dropout_0.4_by_seed"] == pytest.approx([90, 100])
    assert rows["cb"]["expert_dropout_0.4"] == pytest.approx(95)
    assert "| rte | 2 | 2 | 100.0 | 65.0 ± 7.1 | 95.0 ± 7.1 |" in capsys.readouterr().out


def test_a_folder_without_the_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([f"--rows={tmp_path}"])
    assert re.search(r"has no folder boolq/none; scripts/superglue_sample.sh fetches it", capsys.readouterr().err)
