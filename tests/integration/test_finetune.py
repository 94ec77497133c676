"""Labelled rows from a local copy to a fine-tuned model, its scores, its submission and its answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import TINY, Program

TASK = "super_glue_boolq_v102"
CONFIGURATION = """
include '{tiny}'

TEXTS = '{texts}'
DataConfig.mixture_or_task_name = 'super_glue_boolq_v102'
DataConfig.pack = False
TrainConfig.eval_batches = 0
TrainConfig.eval_period = 2
EvaluationConfig.num_examples = 6
CheckpointConfig.keep_best = 'tasks'
CheckpointConfig.keep = 1
RuntimeConfig.compilation_cache_dir = '{cache}'
"""


def write_copy(folder: Path) -> None:
    """A copy as the benchmark distributes it: whether a passage has an x."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 11), ("test", 5)):
        lines = []
        for idx in range(count):
            passage = "".join(random.choice(list("abx"), 3))
            row = {"passage": passage, "question": "x", "idx": idx, "label": "x" in passage}
            lines.append(json.dumps({key: value for key, value in row.items() if split != "test" or key != "label"}))
        (folder / "BoolQ").mkdir(parents=True, exist_ok=True)
        if split == "train":
            lines.append(json.dumps({"passage": "abx" * 20, "question": "x", "idx": count, "label": True}))
        (folder / "BoolQ" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_a_run_is_pre_trained_fine_tuned_scored_submitted_and_asked(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from switch_t5.data.prepare import prepare

    write_copy(tmp_path / "copy")
    monkeypatch.setenv("SWITCH_T5_DATA_DIR", str(tmp_path / "data"))
    gin = tmp_path / "finetune.gin"
    gin.write_text(CONFIGURATION.format(tiny=TINY, texts=program.texts, cache=program.cache))
    flags = (f"--gin_file={gin}", "--gin.CHECKPOINT_PERIOD=1")
    absent = program.call("train", *flags, f"--gin.MODEL_DIR={tmp_path / 'none'}", code=2).stderr
    assert "switch-t5 data prepare --dataset=super_glue" in absent
    assert not (tmp_path / "none").exists()
    assert [split.rows for split in prepare("super_glue", tmp_path / "copy", tmp_path / "data")] == [5, 41, 11]

    program.run("train", tmp_path / "pretrained", "--gin.TRAIN_STEPS=2")
    tuned = tmp_path / "tuned"
    start = f"--gin.TrainConfig.initial_checkpoint_path={tmp_path / 'pretrained'}"
    said = program.call("train", *flags, f"--gin.MODEL_DIR={tuned}", start, "--gin.TRAIN_STEPS=5").stderr
    assert f"cut         1 inputs to 32 tokens, of the first 41 examples of {TASK}\n" in said
    entries = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    scored = {entry["step"]: entry for entry in entries if entry.get("task") == TASK}
    assert sorted(scored) == [0, 2, 4, 5]
    assert all(entry["examples"] == 6 and entry["score"] == entry["accuracy"] for entry in scored.values())
    # The latest, and the best of those that were scored.
    assert len(list((tuned / "checkpoints").iterdir())) in (1, 2)

    config = [f"--gin_file={tuned / 'config.gin'}"]
    measured = tmp_path / "measured"
    wrote = ("--predictions", str(tmp_path / "said"), f"--json={tmp_path / 'result.json'}", f"--metrics={measured}")
    program.call("eval", *config, *wrote, "--gin.EvaluationConfig.num_examples=None")
    result = json.loads((tmp_path / "result.json").read_text())["tasks"][TASK]
    assert result["examples"] == 11
    # One more evaluation, of an earlier step, takes nothing back.
    steps = {int(path.name) for path in (tuned / "checkpoints").iterdir()}
    first = min(steps)
    program.call("eval", *config, f"--checkpoint={tuned / 'checkpoints' / str(first)}", f"--metrics={measured}")
    lines = [json.loads(line) for line in (measured / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 5, "task": TASK, **result}
    assert (lines[1]["step"], lines[1]["task"], lines[1]["examples"]) == (first, TASK, 6)
    assert len(list((measured / "tensorboard").iterdir())) == 2
    refused = program.call("eval", *config, "--gin.DataConfig.extra_ids=50", code=2).stderr
    assert f"{tuned} was trained with another vocabulary (ByteVocabulary, 359 entries, where this run's is" in refused
    assert "DataConfig.extra_ids as they were." in refused
    again = program.call(
        "eval",
        *config,
        "--score_file",
        str(tmp_path / "said" / f"{TASK}.jsonl"),
        "--json=-",
        "--gin.EvaluationConfig.num_examples=None",
    ).stdout
    assert json.loads(again)["tasks"][TASK]["accuracy"] == result["accuracy"]
    only = (f"--gin.EvaluationConfig.tasks=('{TASK}',)", "--gin.EvaluationConfig.num_examples=2")
    sent = program.call("eval", *config, "--submission", str(tmp_path / "sent"), "--predictions", str(tmp_path), *only)
    said = [json.loads(line)["prediction"].strip() for line in (tmp_path / f"{TASK}.jsonl").read_text().splitlines()]
    unparsed = sum(text not in ("True", "False") for text in said)
    assert (f"with the first label for {unparsed} predictions" in sent.stderr) == (unparsed > 0)
    lines = [json.loads(line) for line in (tmp_path / "sent" / "BoolQ.jsonl").read_text().splitlines()]
    assert [line["idx"] for line in lines] == list(range(5))  # All rows, however few are scored.
    assert {line["label"] for line in lines} <= {"true", "false"}

    # A dense student of the fine-tuned model, on its task (table 8).
    taught = tmp_path / "taught"
    files = (f"--gin_file={gin}", "--gin_file=runs/distill.gin", "--gin_file=runs/finetune.gin")
    student = {
        "MODEL_DIR": taught,
        "TEACHER_CHECKPOINT_PATH": tuned,
        "INITIAL_CHECKPOINT_PATH": None,
        "MIXTURE_OR_TASK_NAME": TASK,
        "VOCABULARY_PATH": "bytes",
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 2,
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
    }
    program.call("train", *files, *(f"--gin.{name}={value}" for name, value in student.items()))
    entries = [json.loads(line) for line in (taught / "metrics.jsonl").read_text().splitlines()]
    (trained,) = (entry for entry in entries if entry["step"] == 1 and "task" not in entry)
    assert trained["soft_cross_entropy"] > 0
    assert [entry["examples"] for entry in entries if entry.get("task") == TASK] == [6, 6]
    structure = program.call("inspect", str(taught)).stdout
    assert "experts" not in structure

    ask = [*config, "--task", TASK, "--input", str(tmp_path / "questions.jsonl")]
    ask += [
        "--gin.DecodingConfig.max_length=4",
        "--gin.DecodingConfig.batch_size=4",
        "--gin.DecodingConfig.temperature=1.0",
    ]
    rows = [json.dumps({"passage": "ab" * (index % 9), "question": "x"}) for index in range(70)]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows) + "\n")
    program.call("infer", *ask, "--output", str(tmp_path / "whole.jsonl"))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["index"] for line in whole.splitlines()] == list(range(70))
    # As a kill leaves it: a chunk of 32, part of the next, the last line torn.
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b"".join(whole.splitlines(keepends=True)[:40])[:-7])
    (tmp_path / "torn.jsonl.origin").write_text((tmp_path / "whole.jsonl.origin").read_text())
    assert "32 were done before" in program.call("infer", *ask, "--output", str(torn)).stderr
    assert torn.read_bytes() == whole
    many, killed = tmp_path / "many.jsonl", tmp_path / "killed.jsonl"
    many.write_text("".join(row + "\n" for row in rows * 40))
    ask_many = [*config, "--task", TASK, "--input", str(many), *ask[-3:]]
    process = program.begin("infer", *ask_many, "--output", str(killed))
    deadline = time.monotonic() + 120
    while process.poll() is None and (not killed.exists() or killed.stat().st_size < 20_000):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -9  # Some hundred batches before its end.
    assert 32 < len(killed.read_bytes().splitlines()) < 2800
    program.call("infer", *ask_many, "--output", str(tmp_path / "unbroken.jsonl"))
    assert " were done before" in program.call("infer", *ask_many, "--output", str(killed)).stderr
    assert killed.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    other = program.call("infer", *ask, "--output", str(torn), "--gin.DecodingConfig.seed=1", code=2).stderr
    assert "holds the answers to another input, checkpoint or decoding" in other
    elsewhere = ("--checkpoint", str(tmp_path / "pretrained"), "--output", str(torn))
    assert "another input, checkpoint or decoding" in program.call("infer", *ask, *elsewhere, code=2).stderr
    (tmp_path / "questions.jsonl").write_text("\n{\n" + rows[0] + "\n")
    assert "questions.jsonl:1 is empty; --skip_malformed" in program.call("infer", *ask, code=2).stderr
    left = program.call("infer", *ask, "--skip_malformed")
    assert "1 inputs, 2 malformed lines left out." in left.stderr
    assert json.loads(left.stdout)["index"] == 0
