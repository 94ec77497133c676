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
    "--gin.MoEConfig.num_experts=3": "does not divide the 3 experts",
    "--gin.BATCH_SIZE=9": "DataConfig.batch_size is 9",
    "--gin.MoEConfig.group_size=1024": "MoEConfig.group_size is 1024",
    "--gin.TransformerConfig.vocab_size=128": "TransformerConfig.vocab_size is 128, smaller than the vocabulary",
    "--gin.TransformerConfig.num_heads=3": "heads",
    "--gin.TEXTS=/nowhere/*.txt": "/nowhere/*.txt",
    "--gin.DataConfig.task_feature_lengths={'inputs': 32, 'targets': 4}": "targets",
    "--gin.MODEL_DIR=/dev/null/run": "/dev/null/run cannot be written",
    "--gin.MODEL_DIR=gs://bucket/run": "must be a local or mounted folder",
    "--gin.MoEConfig.train_capacity_factor=1e999": "train_capacity_factor must be",
}


@pytest.mark.slow
@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_sentence(program: Program, tmp_path: Path, flag: str) -> None:
    model_dir = tmp_path / "run"
    done = program.run("train", model_dir, flag, code=2)
    assert MISTAKES[flag] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("switch-t5:") == 1
    assert not model_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("content", "sentence"), [(b"", "is empty"), (b"caf\xe9", "is not UTF-8")])
def test_a_text_file_that_cannot_be_used_is_one_sentence(
    program: Program, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    done = program.run("train", tmp_path / "run", f"--gin.TEXTS={tmp_path}/*.txt", code=2)
    assert f"bad.txt {sentence}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
