"""The plan of a small step beside what XLA makes of it on eight devices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switch_t5.cli.main import main

pytestmark = [pytest.mark.multidevice, pytest.mark.slow]

WORDS = [
    "plan",
    "--gin_file=tests/integration/tiny.gin",
    "--gin.TEXTS=none",
    "--gin.text_task.name=planned_texts",  # Tests of one process share its tasks: `tiny_texts` may be another's.
    "--gin.BATCH_SIZE=32",
    "--gin.TransformerConfig.dropout_rate=0.0",
    "--devices=cpu:8",
    "--mesh=2x2x2",
    "--compile",
]
SCANNED = [
    "--gin.TransformerConfig.scan_layers=True",
    '--gin.TransformerConfig.remat_policy="full"',
    "--gin.TransformerConfig.num_encoder_layers=4",
]


OTHER_RULES = [
    "--gin.MeshConfig.logical_axis_rules={'vocab': None, 'mlp': None}",
    "--gin.MeshConfig.parameter_axis_rules={'mlp': 'model'}",
]


@pytest.mark.parametrize("changes", [[], SCANNED], ids=["written out", "scanned"])
def test_plan_and_compiler_agree(changes: list[str], tmp_path: Path):
    path = tmp_path / "plan.json"
    assert main([*WORDS, *changes, f"--json={path}"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["compiled"]["rows"]}
    state = rows["parameters and optimizer (XLA: and batch)"]
    # Eight sequences of a device, of which the step reads two features of 32 tokens and four of 16.
    # The step's number is XLA's alone.
    assert state["compiled"] - state["planned"] == 8 * (2 * 32 + 4 * 16) * 4 + 4
    errors = {
        "products": 0.02,  # position biases, routers' statistics
        "all-to-all over expert": 0,
        "all-reduce over data": 0,
        "all-reduce over data+expert": 0.01,  # and statistics
        "all-reduce over model": 0.01,  # and Adafactor's means
        "on the wire": 0.01,
        "everything else": 0.15,
    }
    for name, error in errors.items():
        assert rows[name]["planned"] == pytest.approx(rows[name]["compiled"], rel=error), name


def test_plan_and_compiler_agree_on_what_other_rules_do(tmp_path: Path):
    path = tmp_path / "plan.json"
    assert main([*WORDS, *OTHER_RULES, f"--json={path}"]) == 0
    rows = {row["name"]: row for row in json.loads(path.read_text())["compiled"]["rows"]}
    # Every device of a model partition makes all of the dense feed-forwards and the logits.
    errors = {"products": 0.02, "all-reduce over model": 0.01, "on the wire": 0.01, "everything else": 0.15}
    errors["all-reduce over data+expert"] = 0.01
    for name, error in errors.items():
        assert rows[name]["planned"] == pytest.approx(rows[name]["compiled"], rel=error), name
    assert rows["all-gather over model"]["planned"] > 0  # Kernels that lie in parts.
