"""``switch-t5 convert`` and ``switch-t5 inspect``, by the command line."""

from __future__ import annotations

import json

import pytest

from switch_t5.cli.main import main
from tests.checkpoint.test_conversion import SWITCH, saved, state_of


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("source") / "run", state_of(SWITCH))


def test_a_checkpoint_goes_through_every_format_and_is_the_same(run_folder, tmp_path, capsys):
    steps = [("t5x", run_folder), ("huggingface", tmp_path / "t5x"), ("native", tmp_path / "huggingface")]
    result = {}
    for form, source in steps:
        words = ["convert", f"--from={source}", f"--to={tmp_path / form}", f"--format={form}", "--verify", "--json=-"]
        assert main(words) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["verified"]["worst_absolute"] == 0
        assert result["to"]["format"] == form
    for source in (run_folder, *(tmp_path / form for form, _ in steps)):
        assert main(["inspect", str(source), "--deep", "--json", str(tmp_path / "out.json")]) == 0
        capsys.readouterr()
        seen = json.loads((tmp_path / "out.json").read_text())
        assert seen["architecture"]["MoEConfig.num_experts"] == 3
        assert seen["parameters"] == result["parameters"]
        assert seen["experts"]["encoder"] == {"count": 3, "blocks": [1, 3]}
        assert seen["dtypes"] == {"float32": sum(seen["dtypes"].values())}
        # The optimizer's state got lost in Hugging Face's format, which has no place for it.
        assert seen["optimizer"] == ("adafactor" if source in (run_folder, tmp_path / "t5x") else None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "{0}/nothing"], "does not exist: name a MODEL_DIR of ours, a T5X folder"),
        (["inspect", "{0}"], "is empty: name a MODEL_DIR"),
        (["convert", "--from={0}", "--to={0}/x", "--format=pickle"], "'pickle' is no --format"),
        (["convert", "--from={0}", "--to={0}/x", "--format=t5x", "--tokenizer=a"], "--tokenizer=a must be a file"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, words, sentence):
    assert main([word.format(tmp_path) for word in words]) == 2
    assert sentence in capsys.readouterr().err
