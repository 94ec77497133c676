"""``switch-t5 plan`` as a user calls it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from switch_t5.cli.main import main

NUMBERS = itertools.count()


def tiny() -> list[str]:
    """Flags of a small run, with a task that this process has not seen yet."""
    return [
        "--gin_file=tests/integration/tiny.gin",
        "--gin.TEXTS=none",
        f"--gin.text_task.name=planned_{next(NUMBERS)}",
        "--gin.BATCH_SIZE=32",
        "--gin.TransformerConfig.dropout_rate=0.0",
    ]


def planned(tmp_path: Path, *words: str, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    assert main(["plan", *words, f"--json={path}"]) == code
    return json.loads(path.read_text())


def test_a_model_alone_is_planned_with_the_papers_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = planned(tmp_path, "--gin_file=models/switch_xxl_e128.gin", "--topology=v5p:8x8x8")
    assert plan["batch"] * plan["lengths"][0] == 2**20
    assert plan["parameters"] == 394_675_073_024  # tests/goldens has the same
    assert plan["active_parameters"] == 11_147_915_264
    best = plan["meshes"][0]
    assert best["fits"] and plan["bytes_per_device"] == best["bytes_per_device"] == sum(best["memory"].values())
    assert math.prod(best["mesh"].values()) == plan["devices"] == 512
    # A device has its share of the experts, of which a token passes one, and a model partition of all else.
    shares = plan["parameters"] / best["mesh"]["expert"] + plan["active_parameters"]
    assert best["memory"]["parameters"] == pytest.approx(
        4 * shares / (best["mesh"]["model"] * best["mesh"]["fsdp"]), rel=0.3
    )
    printed = capsys.readouterr()
    assert not printed.out
    assert "394,675,073,024 in all" in printed.err
    reasons = [mesh["reason"] for mesh in plan["meshes"] if "seconds" not in mesh]
    assert reasons and all("MoEConfig.group_size is 4096" in reason for reason in reasons)


def test_it_wakes_no_accelerator_and_loads_no_tensorflow():
    # From a fresh start, imports and all.
    script = (
        "import sys; from switch_t5.cli.main import main\n"
        "code = main(['plan', '--gin_file=models/switch_c_e2048.gin', '--devices=gpu:H100x256'])\n"
        "import jax; from jax._src import xla_bridge\n"
        "print(sorted(xla_bridge._backends), 'tensorflow' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("[] False", "['cpu'] False")


def test_a_topology_that_does_not_exist_is_told_with_those_near(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--gin_file=models/switch_base_e8.gin", "--topology=v5e:16x17"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "near it are v5e:16x16" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either --topology=TPU:SHAPE"),
        (["--topology=v5e:4x4", "--devices=cpu:8"], "give either --topology=TPU:SHAPE"),
        (["--devices=cpu:8", "--mesh=2x2"], "--mesh=2x2: give devices along data, expert and model"),
        (["--devices=cpu:8", "--mesh=2x2x4"], "the mesh 2x2x4 is of 16 devices; cpu:8 has 8."),
        (["--devices=cpu:8", "--mesh=1x8x1"], "8 expert and 1 model partitions, and the model 4 experts and 2 heads"),
        (["--topology="], "--topology=: there is no TPU ''"),
        (["--devices=cpu:6"], "asks for 2 expert x 2 model x 1 fsdp partitions, which do not divide the 6 devices"),
        (["--devices=gpu:H100x4096", "--gin.NUM_EXPERT_PARTITIONS=1", "--gin.NUM_MODEL_PARTITIONS=1"], "no mesh of"),
        (["--devices=cpu:6", "--mesh=2x3x1"], "which 1 microbatch(es) x 6 batch shards do not divide"),
        (["--devices=gpu:H100x8", "--compile"], "XLA compiles for a GPU only where there is one"),
    ],
)
def test_a_mistake_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *tiny(), *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_what_cannot_fit_says_by_how_much_and_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plan = planned(tmp_path, "--gin_file=models/switch_xxl_e128.gin", "--topology=v5e:16x16", code=2)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert not plan["fits"]
    assert "more than its 16 GB; the smallest change that fits is" in sentence
    assert plan["smallest_change"] in sentence
    excess = plan["meshes"][0]["bytes_per_device"] - plan["memory_per_device"]
    assert plan["meshes"][0]["reason"] == f"needs {excess} bytes more than a device has"


def test_one_mesh_may_be_asked_for(tmp_path: Path):
    plan = planned(tmp_path, *tiny(), "--devices=cpu:8", "--mesh=2x2x2")
    assert [mesh["mesh"] for mesh in plan["meshes"]] == [{"data": 2, "expert": 2, "model": 2, "fsdp": 1}]
    # As the configuration does, where it sets partitions.
    plan = planned(tmp_path, *tiny(), "--devices=cpu:16")
    assert [mesh["mesh"] for mesh in plan["meshes"]] == [{"data": 4, "expert": 2, "model": 2, "fsdp": 1}]
    open_partitions = ("--gin.NUM_EXPERT_PARTITIONS=1", "--gin.NUM_MODEL_PARTITIONS=1")
    assert len(planned(tmp_path, *tiny(), "--devices=cpu:8", *open_partitions)["meshes"]) > 5


def test_what_a_configuration_leaves_open_need_not_be_given(tmp_path: Path):
    words = ["--gin_file=models/switch_base_e8.gin", "--gin_file=runs/pretrain.gin", "--gin.BATCH_SIZE=256"]
    plan = planned(tmp_path, *words, "--topology=v6e:4x4")
    assert plan["batch"] == 256
    assert planned(tmp_path, words[0], "--gin.BATCH_SIZE=256", "--topology=v6e:4x4") == plan
