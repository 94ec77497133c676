"""Training steps compiled for TPU slices, which need libtpu and no TPU; see tests/layers/test_tpu_cost.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

WORDS = [
    "plan",
    "--gin_file=tests/integration/tiny.gin",
    "--gin.TEXTS=none",
    "--gin.TransformerConfig.dropout_rate=0.0",
    "--gin.TransformerConfig.dtype=bfloat16",
    "--topology=v5e:2x4",
    "--compile",
]
EMB, MLP = 512, 2048
DENSE = [
    "--gin.TransformerConfig.moe=None",
    f"--gin.TransformerConfig.emb_dim={EMB}",
    f"--gin.TransformerConfig.mlp_dim={MLP}",
    '--gin.TransformerConfig.remat_policy="full"',
    "--mesh=1x1x1x8",
]


def compiled(path: Path, *flags: str) -> dict[str, dict[str, Any]]:
    """Rows of the plan beside XLA's, by name; in a process of its own, which JAX's platform is chosen for."""
    words = [sys.executable, "-m", "switch_t5", *WORDS, *flags, f"--json={path}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {row["name"]: row for row in json.loads(path.read_text())["compiled"]["rows"]}


def test_tokens_go_to_experts_and_back_as_planned(tmp_path: Path):
    rows = compiled(tmp_path / "plan.json", "--gin.BATCH_SIZE=32", "--mesh=2x2x2")
    exchange = rows["all-to-all over expert"]
    assert exchange["compiled"] == exchange["planned"] > 0


@pytest.mark.parametrize("scan", [False, True], ids=["written out", "scanned"])
def test_kernels_are_gathered_along_fsdp_for_each_pass_of_their_block_and_freed(tmp_path: Path, scan: bool):
    def rows(blocks: int) -> dict[str, dict[str, Any]]:
        flags = [f"--gin.TransformerConfig.num_encoder_layers={blocks}", f"--gin.TransformerConfig.scan_layers={scan}"]
        return compiled(tmp_path / f"{blocks}.json", *DENSE, *flags)

    few, many = rows(4), rows(8)
    for found in (few, many):
        gathered = found["all-gather over fsdp"]
        assert gathered["planned"] == pytest.approx(gathered["compiled"], rel=0.01)
        # A TPU sums some small gradients and does not deal them out.
        assert found["on the wire"]["planned"] == pytest.approx(found["on the wire"]["compiled"], rel=0.05)
    growth = (many["everything else"]["compiled"] - few["everything else"]["compiled"]) / 4
    # Of a block's two large kernels the gradients' eighths stay, in float32, and what a pass keeps of 32 tokens; whole
    # kernels would be four bytes an entry more for both passes, or two for one.
    assert growth < 2 * EMB * MLP * (4 / 8 + 1)
