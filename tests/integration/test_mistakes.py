"""A user's mistake is one sentence, exit code 2, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import Program

MISTAKES = {
    "--gin.TRAIN_STEPZ=5": "TRAIN_STEPS",
    "--gin.TransformerConfig.emb_dimm=5": "emb_dim",
    "--gin_file=tiney.gin": "tiney.gin",
    "--gin.TransformerConfig.emb_dim='wide'": "TransformerConfig.emb_dim must be an integer, got 'wide'",
    "--gin.NUM_EXPERT_PARTITIONS=16": "more than the 8 device(s) here",
    "--gin.NUM_EXPERT_PARTITIONS=8": "does not divide the 4 experts",
    "--gin.BATCH_SIZE=9": "DataConfig.batch_size is 9",
    "--gin.MoEConfig.group_size=1024": "MoEConfig.group_size is 1024",
    "--gin.TransformerConfig.vocab_size=128": "TransformerConfig.vocab_size is 128, smaller than the vocabulary",
    "--gin.DataConfig.mixture_or_task_name=sotu_span_coruption": "sotu_span_corruption",
    "--gin.TransformerConfig.num_heads=3": "heads",
}


@pytest.mark.slow
@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_sentence(program: Program, tmp_path: Path, flag: str) -> None:
    model_dir = tmp_path / "run"
    done = program.run("train", model_dir, flag, code=2)
    assert MISTAKES[flag] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("switch-t5:") == 1
    assert not (model_dir / "checkpoints").exists() or not any((model_dir / "checkpoints").iterdir())
    assert not (model_dir / "metrics.jsonl").exists()
