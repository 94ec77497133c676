"""``switch-t5 convert`` and ``switch-t5 inspect``, by the command line."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from switch_t5.checkpoint import conversion, huggingface_files
from switch_t5.checkpoint.certificate import CERTIFICATE
from switch_t5.cli.main import main
from switch_t5.model.functional import Model
from switch_t5.training.optimizers import adamw, sgd
from switch_t5.training.state import TrainState
from tests.checkpoint.damage import flip, halve
from tests.checkpoint.golden import params_of
from tests.checkpoint.test_conversion import SWITCH, assert_same, saved, state_of
from tests.model.small import random_params


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("source") / "run", state_of(SWITCH))


def test_a_checkpoint_goes_through_every_format_and_is_the_same(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Paths below the working folder are as good as whole ones.
    steps = [("t5x", run_folder), ("huggingface", "t5x"), ("native", "huggingface")]
    result = {}
    for form, source in steps:
        words = ["convert", f"--from={source}", f"--to={form}", f"--format={form}", "--verify", "--json=-"]
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
        assert "arrays as they were" in seen["integrity"]


def test_a_converted_array_that_changed_is_named_and_without_a_certificate_nothing_tells(run_folder, tmp_path, capsys):
    there = tmp_path / "hf"
    assert main(["convert", f"--from={run_folder}", f"--to={there}", "--format=huggingface"]) == 0
    flip(there / "model.safetensors", at=-1)
    capsys.readouterr()
    assert main(["inspect", str(there), "--deep"]) == 2
    said = capsys.readouterr().err
    assert f"is damaged, or was changed since: its values are not those of {there}/conversion.json" in said
    (there / "conversion.json").write_text("{")
    assert main(["inspect", str(there), "--deep"]) == 2
    assert "conversion.json is damaged" in capsys.readouterr().err
    (there / "conversion.json").unlink()
    assert main(["inspect", str(there), "--deep"]) == 0
    assert "the format has no checksums" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip, halve])
@pytest.mark.parametrize("form", ["t5x", "huggingface"])
def test_damage_to_a_file_of_a_converted_array_is_noticed(run_folder, tmp_path, capsys, form, damage):
    there = tmp_path / "there"
    assert main(["convert", f"--from={run_folder}", f"--to={there}", f"--format={form}"]) == 0
    capsys.readouterr()
    # Nothing can check what these say of things that are no arrays.
    files = [path for path in there.rglob("*") if path.is_file() and path.name not in ("config.json", CERTIFICATE)]
    if form == "t5x":
        # Of hundreds of chunks and headers these.
        arrays = ("target.token_embedder.embedding", "target.encoder.layers_1.mlp.expert.wi.kernel")
        arrays += ("state.param_states.token_embedder.embedding.v_row",)
        files = [file for file in files if file.name == "checkpoint" or file.parent.name in arrays]
        assert len(files) == 7
    for file in files:
        content = file.read_bytes()
        damage(file)
        assert main(["inspect", str(there), "--deep"]) == 2, file
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search("is damaged|is not whole", said), said
        file.write_bytes(content)
    assert main(["inspect", str(there), "--deep"]) == 0


def test_an_uncompressed_t5x_checkpoint_is_the_same(run_folder, tmp_path, capsys):
    sizes = {}
    for compression in ("gzip", "none"):
        there = tmp_path / compression
        words = ["convert", f"--from={run_folder}", f"--to={there}", "--format=t5x", f"--compression={compression}"]
        assert main([*words, "--verify"]) == 0
        assert "worst difference 0 absolute" in capsys.readouterr().err
        [header] = there.rglob("target.token_embedder.embedding/.zarray")
        sizes[compression] = (header.parent / "0.0").stat().st_size
        assert json.loads(header.read_text())["compressor"] == ({"id": "gzip", "level": 1}, None)[compression == "none"]
    assert sizes["none"] == 40 * 8 * 4 > sizes["gzip"]


def test_shards_and_a_tokenizer_lie_beside_a_hugging_face_model(
    run_folder, vocabulary_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(huggingface_files, "_SHARD_BYTES", 4000)
    there = tmp_path / "hf"
    words = [
        "convert",
        f"--from={run_folder}",
        f"--to={there}",
        "--format=huggingface",
        f"--tokenizer={vocabulary_file}",
    ]
    assert main([*words, "--verify"]) == 0
    assert "worst difference 0 absolute" in capsys.readouterr().err
    assert (there / "spiece.model").read_bytes() == Path(vocabulary_file).read_bytes()
    index = json.loads((there / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards == sorted(path.name for path in there.glob("*.safetensors"))
    held = {shard: load_file(there / shard) for shard in shards}
    assert {name: shard for shard, arrays in held.items() for name in arrays} == index["weight_map"]
    sizes = {shard: sum(array.nbytes for array in arrays.values()) for shard, arrays in held.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 4000 or len(held[shard]) == 1 for shard, size in sizes.items())


def verified(run_folder: Path, to: Path, capsys, *more: str) -> tuple[int, dict, str]:
    words = ["convert", f"--from={run_folder}", f"--to={to}", "--format=huggingface", "--verify", *more]
    code, captured = main(words), capsys.readouterr()
    return code, json.loads((to / CERTIFICATE).read_text())["verified"], captured.err


def test_without_transformers_the_arrays_are_compared_and_the_certificate_says_so(
    run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found, said = verified(run_folder, tmp_path / "same", capsys)
    assert code == 0
    assert found["passed"] and found["worst_absolute"] == found["worst_relative"] == found["bound"] == 0
    assert found["logits"]["left_out"].startswith("torch and transformers cannot be imported (")
    assert "transformers was not run: torch and transformers cannot be imported" in said
    code, found, _ = verified(run_folder, tmp_path / "cast", capsys, "--dtype=bfloat16")
    assert (code, found["bound"]) == (0, 2**-8)
    assert 0 < found["worst_relative"] < 2**-8


def test_a_result_that_differs_is_told_and_ends_with_1(run_folder, tmp_path, capsys, monkeypatch):
    def write(*args, **more):
        certificate = conversion_write(*args, **more)
        flip(tmp_path / "to" / "model.safetensors", at=-1, bits=0x40)  # Of the last number's exponent.
        return certificate

    conversion_write = conversion.write
    monkeypatch.setattr(conversion, "write", write)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, found, said = verified(run_folder, tmp_path / "to", capsys)
    assert code == 1
    assert not found["passed"] and found["worst_absolute"] > 0
    assert "BEYOND 0" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["inspect", "{0}/nothing"], "does not exist: name a MODEL_DIR of ours, a T5X folder"),
        (["inspect", "{0}"], "is empty: name a MODEL_DIR"),
        (["inspect", "{1}/config.gin"], "config.gin is a file: name a MODEL_DIR"),
        (["convert", "--fron={0}", "--to={0}/x", "--format=t5x"], "has no flag --fron. Did you mean '--from'?"),
        (["convert", "--from={1}", "--to={1}/config.gin", "--format=native"], "config.gin is a file: name a folder."),
        (["convert", "--from={1}", "--to={1}/checkpoints/18", "--format=native"], "lie among a run's checkpoints"),
        (["convert", "--from={1}", "--to={1}/checkpoints/17/x", "--format=t5x"], "is inside of the checkpoint"),
        (["convert", "--from={1}", "--to={0}/x", "--format=huggingface", "--scanned"], "transformers stacks no blocks"),
        (
            ["convert", "--from={1}", "--to={0}/x", "--format=huggingface", "--tokenizer={1}/config.gin"],
            "config.gin is not a SentencePiece model.",
        ),
        (["convert", "--from={0}", "--to={0}/x", "--format=pickle"], "'pickle' is no --format"),
        (["convert", "--from={0}", "--to={0}/x", "--format=t5x", "--tokenizer=a"], "belongs to --format=huggingface"),
        (["convert", "--from={1}", "--to={0}/x", "--format=huggingface", "--tokenizer={0}"], " is no file: name a "),
        (["convert", "--from={1}", "--to={1}", "--format=t5x"], "is a run or a checkpoint itself: name another"),
        (["convert", "--from=", "--to={0}/x", "--format=t5x"], "A checkpoint's path is empty: name a folder."),
        (["convert", "--from={1}", "--to=", "--format=native"], "--to= must be a local or mounted folder."),
        (["convert", "--from={1}", "--to={0}/x", "--format=native", "--compression=none"], "belongs to --format=t5x"),
        (
            ["convert", "--from={1}", "--to=gs://b/x", "--format=t5x"],
            "--to=gs://b/x must be a local or mounted folder.",
        ),
    ],
)
def test_a_mistake_is_one_sentence(run_folder, tmp_path, capsys, words, sentence):
    (run_folder / "config.gin").touch()
    assert main([word.format(tmp_path, run_folder) for word in words]) == 2
    assert sentence in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("told", "kept"), [(5, 5), ("5", None), (0, None)])
def test_the_capacity_that_a_hugging_face_model_tells_is_kept(run_folder, tmp_path, told, kept):
    one, other = tmp_path / "one", tmp_path / "other"
    assert main(["convert", f"--from={run_folder}", f"--to={one}", "--format=huggingface"]) == 0
    config = json.loads((one / "config.json").read_text())
    assert "expert_capacity" not in config
    (one / "config.json").write_text(json.dumps(config | {"expert_capacity": told}))
    assert main(["convert", f"--from={one}", f"--to={other}", "--format=huggingface"]) == 0
    assert json.loads((other / "config.json").read_text()).get("expert_capacity") == kept
    left_out = json.loads((other / CERTIFICATE).read_text())["left_out"]
    assert (left_out is None) == (kept is not None)


def test_what_a_file_says_is_not_obeyed_by_a_terminal(run_folder, tmp_path, capsys):
    there = tmp_path / "hf"
    assert main(["convert", f"--from={run_folder}", f"--to={there}", "--format=huggingface"]) == 0
    index = {"weight_map": {"shared.weight": "x\0\x1b[2J"}}
    (there / "model.safetensors.index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert main(["inspect", str(there)]) == 2
    assert r"it lacks x\x00\x1b[2J with shared.weight; copy it again." in capsys.readouterr().err


def test_a_checkpoint_of_ours_outside_of_a_run_is_told_where_it_belongs(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "checkpoints" / "17", tmp_path / "17")
    assert main(["inspect", str(tmp_path / "17")]) == 2
    assert (
        "is a checkpoint of ours outside of a run: move it to MODEL_DIR/checkpoints/<step>." in capsys.readouterr().err
    )


def test_an_untied_model_is_converted_again_with_its_certificate(tmp_path):
    run = saved(tmp_path / "run", state_of(dataclasses.replace(SWITCH, tied_logits=False)))
    for source, to in ((run, "hf"), (tmp_path / "hf", "again")):  # transformers wants copies of the embedding.
        assert main(["convert", f"--from={source}", f"--to={tmp_path / to}", "--format=huggingface"]) == 0


def test_a_checkpoint_that_was_put_aside_is_called_so(run_folder, tmp_path, capsys):
    aside = tmp_path / "checkpoints" / "17.damaged"
    shutil.copytree(run_folder / "checkpoints" / "17", aside)
    assert main(["inspect", str(aside)]) == 2
    assert "is no step of its run: it was put aside as damaged, or has been renamed." in capsys.readouterr().err


def test_a_run_whose_checkpoints_lie_elsewhere_is_known_for_one(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder / "checkpoints", tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for to in (tmp_path / "run" / "checkpoints" / "18", tmp_path / "elsewhere" / "18"):
        assert main(["convert", f"--from={run_folder}", f"--to={to}", "--format=native"]) == 2
        assert "would lie among a run's checkpoints" in capsys.readouterr().err


def test_what_its_certificate_knows_to_be_damaged_is_not_converted_again(run_folder, tmp_path, capsys):
    there = tmp_path / "hf"
    assert main(["convert", f"--from={run_folder}", f"--to={there}", "--format=huggingface"]) == 0
    flip(there / "model.safetensors", at=-1)
    again = ["convert", f"--from={there}", f"--to={tmp_path / 'again'}", "--format=native"]
    assert main(again) == 2
    assert "is damaged, or was changed since" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    (there / CERTIFICATE).unlink()  # Where that was meant.
    assert main(again) == 0


def test_a_step_that_is_not_its_folders_is_damage(run_folder, tmp_path, capsys):
    assert main(["convert", f"--from={run_folder}", f"--to={tmp_path / 't5x'}", "--format=t5x"]) == 0
    # The last number of the index is the step: 17 + 2^16 now.
    flip(tmp_path / "t5x" / "checkpoint_17" / "checkpoint", at=-2, bits=1)
    assert main(["inspect", str(tmp_path / "t5x")]) == 2
    assert "it is of step 65553, and not of step 17." in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_no_new_folder(run_folder, tmp_path, capsys, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "_fill", full)
    assert main(["convert", f"--from={run_folder}", f"--to={tmp_path / 'a' / 'b'}", "--format=t5x"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("make", [adamw(0.1), sgd(0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_a_run_of_another_optimizer_is_converted_without_its_state_and_said_so(tmp_path, capsys, make):
    model = Model(SWITCH)
    params = random_params(model)
    run = saved(tmp_path / "run", TrainState(jnp.int32(17), params, make(model.axes).init(params)))
    for form in ("t5x", "huggingface"):
        words = ["convert", f"--from={run}", f"--to={tmp_path / form}", f"--format={form}", "--json=-"]
        assert main(words) == 0
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        more = "; expert_capacity, which no array tells: without it in config.json transformers takes 64"
        what = "the optimizer's state, which is not Adafactor's" + (more if form == "huggingface" else "")
        assert found["left_out"] == what
        assert "left out: the optimizer's state, which is not Adafactor's" in captured.err
        assert not found["to"]["optimizer"]
        assert_same(params_of(tmp_path / form, SWITCH), params)
    assert main(["inspect", str(run), "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["optimizer"] == "unknown"
