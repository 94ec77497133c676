"""Damaged, hostile and foreign folders: each one clear error, before anything is allocated or run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from switch_t5.checkpoint import conversion
from switch_t5.checkpoint import t5x as t5x_tables
from switch_t5.checkpoint.conversion import plan, write
from switch_t5.checkpoint.formats import format_of, open_checkpoint, read_checkpoint
from switch_t5.checkpoint.load import load_params
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.checkpoint.recognition import recognise
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged, OpenCheckpoint, StoredArray
from switch_t5.errors import UserError
from switch_t5.model.functional import Model
from tests.checkpoint.damage import on_a_disk
from tests.checkpoint.golden import abstract
from tests.checkpoint.test_conversion import GATED, SWITCH, converted, saved, state_of


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    run = saved(folder / "run", state_of(SWITCH))
    return {
        "t5x": converted(run, folder / "t5x", "t5x") / "checkpoint_17",
        "huggingface": converted(run, folder / "hf", "huggingface"),
        "run": run,
    }


@pytest.fixture(autouse=True)
def untouched(sources) -> Iterator[None]:
    """Whatever a test does with copies or as a source, these stay as they are."""
    before = {path: contents(path) for path in sources.values()}
    yield
    assert {path: contents(path) for path in sources.values()} == before


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def t5x(sources, tmp_path) -> Path:
    return shutil.copytree(sources["t5x"], tmp_path / "checkpoint_17")


@pytest.fixture
def hugging_face(sources, tmp_path) -> Path:
    return shutil.copytree(sources["huggingface"], tmp_path / "hf")


def edit_index(folder: Path, change) -> None:
    index = msgpack.unpackb((folder / "checkpoint").read_bytes(), ext_hook=msgpack.ExtType)
    change(index)
    (folder / "checkpoint").write_bytes(msgpack.packb(index))


def leaf(index: dict) -> dict:
    return index["optimizer"]["target"]["token_embedder"]["embedding"]


def inline(dtype: str, *shape: int) -> msgpack.ExtType:
    """A small array as the index holds it."""
    return msgpack.ExtType(1, msgpack.packb((list(shape), dtype, bytes(4 * math.prod(shape)))))


NO_HEADS = {"relpos_bias": {"rel_embedding": inline("float32", 0, 32)}}


def last_layer(index: dict, number: int) -> None:
    encoder = index["optimizer"]["target"]["encoder"]
    encoder[f"layers_{number}"] = encoder["layers_0"]


def test_a_partly_downloaded_t5x_folder_names_its_missing_arrays(t5x):
    os.remove(t5x / "target.encoder.layers_1.mlp.expert.wi.kernel" / "0.0.0")
    shutil.rmtree(t5x / "target.encoder.layers_2.mlp.wo.kernel")
    with pytest.raises(CheckpointDamaged, match=r"lacks files of target\.encoder\.layers_1\.mlp\.expert\.wi\.kernel, "):
        read_checkpoint(str(t5x))
    os.remove(t5x / "checkpoint")
    with pytest.raises(CheckpointDamaged, match="has no file 'checkpoint', T5X's index"):
        read_checkpoint(str(t5x))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda index: leaf(index)["kvstore"].update(path="../../etc/passwd"), "outside of the checkpoint: refused"),
        (lambda index: leaf(index)["kvstore"].update(path="/etc"), "outside of the checkpoint: refused"),
        (lambda index: leaf(index)["metadata"].update(shape=[1 << 39, 1 << 30]), "larger than any model's: refused"),
        (lambda index: leaf(index)["metadata"].update(shape=[-1, 8]), "gives target/token_embedder/embedding shape"),
        (lambda index: leaf(index)["metadata"].update(chunks=[0, 8]), "gives target/token_embedder/embedding shape"),
        (lambda index: leaf(index)["metadata"].update(chunks=[1 << 16, 1 << 16]), "larger than any model's: refused"),
        (lambda index: leaf(index).update(driver="json"), "describes no array"),
        (lambda index: index["optimizer"]["state"].update(step=inline("int32", 0)), "its step has shape"),
        (lambda index: index["optimizer"]["state"].update(step=inline("float32")), "its step has shape"),
        (lambda index: index["optimizer"]["target"]["encoder"].update(NO_HEADS), "array whose axis heads is of size 0"),
        (
            lambda index: last_layer(index, 999_999_999),
            r"names target/encoder/layers_999999999/.*, a number beyond that of its",
        ),
        (lambda index: index["optimizer"]["target"].pop("token_embedder"), "lacks "),
        (lambda index: index["optimizer"]["target"].update(extra=leaf(index)), "holds target/extra"),
        (lambda index: index.update(version=2), "is of version 2"),
        (lambda index: index.pop("optimizer"), "no index of T5X"),
        (lambda index: index["optimizer"].update(target=[1]), "is list"),
    ],
)
def test_a_hostile_or_foreign_index_is_refused(t5x, change, sentence):
    edit_index(t5x, change)
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(str(t5x))


@pytest.mark.parametrize(
    "content", [b"", b"\xc1", b"\x91" * 5000, b"\xdf\xff\xff\xff\xff", b"\xc7\xff\x01" + b"x" * 300]
)
def test_bytes_that_are_no_msgpack_are_refused(t5x, content):
    (t5x / "checkpoint").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"is damaged: it is no msgpack|is no index of T5X"):
        read_checkpoint(str(t5x))


def test_a_truncated_array_of_t5x_is_named_when_it_is_read(t5x):
    chunk = t5x / "target.token_embedder.embedding" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    source = read_checkpoint(str(t5x))
    with pytest.raises(CheckpointDamaged, match=r"target\.token_embedder\.embedding is damaged"):
        source.reader.stored("embedding")[0].whole()


def test_pickles_are_never_read_and_the_way_round_is_told(hugging_face):
    (hugging_face / "model.safetensors").rename(hugging_face / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"never read; write them anew .* safe_serialization=True"):
        read_checkpoint(str(hugging_face))


def header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        header(1 << 62, b"{}"),
        header(2, b"{}") + b"rest",
        header(5, b"{]{]{"),
        header(70, b'{"shared.weight":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'[:70]),
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(hugging_face, content):
    (hugging_face / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=r"model\.safetensors is damaged: it is no safetensors file"):
        read_checkpoint(str(hugging_face))


def test_a_truncated_safetensors_file_is_refused(hugging_face):
    file = hugging_face / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointDamaged, match="is no safetensors file"):
        read_checkpoint(str(hugging_face))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts": 5}, r"lacks .*expert_3\.wi\.weight"),
        ({"num_layers": 8, "num_sparse_encoder_layers": 4}, r"lacks encoder\.block\.4"),
        ({"d_model": 16}, "of shape"),
        ({"model_type": "llama"}, "a model of type 'llama'"),
        ({"model_type": []}, r"a model of type \[\]"),
        ({"d_ff": -1}, "d_ff = -1, where a number from 1 to 16,777,216 belongs"),
        ({"d_ff": 1 << 40}, "where a number from 1 to 16,777,216 belongs"),
        ({"d_ff": "many"}, "where a number from 1 to 16,777,216 belongs"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon 1e-05"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance 64, where 128 can be read"),
        ({"model_type": "t5", "feed_forward_proj": "gelu_new"}, "feed-forward 'gelu_new': relu and gated-gelu can"),
        ({"dense_act_fn": "gated-gelu"}, "feed-forward 'gated-gelu'"),
        ({"num_layers": 1 << 20}, "more blocks than there are arrays, 78"),
        ({"num_decoder_layers": 1 << 20}, "more blocks than there are arrays, 78"),
        ({"num_experts": 1 << 20}, "more experts in all blocks than there are arrays, 78"),
        ({"router_bias": True}, "router_bias"),
    ],
)
def test_a_config_that_does_not_fit_the_arrays_is_told(hugging_face, change, sentence):
    file = hugging_face / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(str(hugging_face))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_hostile_config_is_refused(hugging_face, text):
    (hugging_face / "config.json").write_text(text)
    with pytest.raises(CheckpointDamaged, match=r"config\.json is damaged"):
        read_checkpoint(str(hugging_face))


def test_a_config_that_cannot_be_read_is_one_sentence(hugging_face):
    (hugging_face / "config.json").unlink()
    (hugging_face / "config.json").mkdir()
    with pytest.raises(CheckpointDamaged, match=r"config\.json cannot be read \(Is a directory\)"):
        open_checkpoint(str(hugging_face))


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/etc/passwd", ".."])
def test_an_index_that_names_files_elsewhere_is_refused(hugging_face, where):
    index = {"weight_map": {"shared.weight": where}}
    (hugging_face / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of the folder: refused"):
        read_checkpoint(str(hugging_face))


def test_a_missing_shard_is_named_with_an_array_of_it(hugging_face):
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (hugging_face / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointDamaged, match=r"lacks model-00001-of-00002\.safetensors with shared\.weight"):
        read_checkpoint(str(hugging_face))


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, r"\(No space left on device\): make room there"),
        (errno.EROFS, r"\(Read-only file system\): name a folder that can be written"),
    ],
)
def test_a_disk_that_fails_half_way_leaves_nothing(sources, tmp_path, form, number, sentence):
    source = read_checkpoint(str(sources["run"]))
    target = plan(source, str(tmp_path / "to"), form, dtype=None, scanned=False)
    arrays: dict[str, Any] = dict(target.arrays)
    made: list[int] = []
    for name, array in target.arrays.items():

        def read(index, array=array):
            made.append(1)
            if len(made) > 20:
                raise OSError(number, "met on the way")
            return array.read(index)

        arrays[name] = type(array)(array.shape, array.dtype, read)
    target = dataclasses.replace(target, arrays=arrays)
    with pytest.raises(UserError, match=rf"Writing {tmp_path}/.* failed {sentence}"):
        write(source, target)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
def test_a_target_that_is_a_file_or_below_one_is_named(sources, tmp_path, form):
    (tmp_path / "file").write_text("mine")
    source = read_checkpoint(str(sources["run"]))
    with pytest.raises(
        UserError, match=r"file is a file: name a folder|cannot be written \((File exists|Not a directory)\)"
    ):
        write(source, plan(source, str(tmp_path / "file"), form, dtype=None, scanned=False))
    with pytest.raises(UserError, match=r"--to .*/file.* cannot be written \((File exists|Not a directory)\)"):
        write(source, plan(source, str(tmp_path / "file" / "x"), form, dtype=None, scanned=False))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


READ_ONLY = """
import sys
from pathlib import Path
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.cli.main import main
from switch_t5.errors import UserError

source, disk = sys.argv[1:]
for form in ("native", "t5x", "huggingface"):
    print(main(["convert", f"--from={source}", f"--to={disk}/{form}", f"--format={form}"]))
try:
    Checkpointer(Path(disk) / "run")
except UserError as error:
    print(error)
"""


def test_a_read_only_disk_is_one_sentence(sources, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*on_a_disk("ro", disk), sys.executable, "-c", READ_ONLY, str(sources["run"]), str(disk)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    refused = "cannot be written (Read-only file system): name a folder that can."
    *codes, of_save = result.stdout.splitlines()
    assert codes == ["2", "2", "2"]
    assert of_save.startswith(f"MODEL_DIR {disk}/run") and of_save.endswith(refused)
    said = [line for line in result.stderr.splitlines() if "--to" in line]
    assert len(said) == 3 and all(line.endswith(refused) for line in said)


FULL = """
import sys
from pathlib import Path
from switch_t5.cli.main import main

source, disk = sys.argv[1:]
for form in ("native", "t5x", "huggingface"):
    code = main(["convert", f"--from={source}", f"--to={disk}/{form}", f"--format={form}"])
    print(code, [path.name for path in Path(disk).iterdir()])
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(sources, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*on_a_disk("size=32k", disk), sys.executable, "-c", FULL, str(sources["run"]), str(disk)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["2 []"] * 3, result.stderr
    said = [line for line in result.stderr.splitlines() if "failed (No space left on device): make room there" in line]
    assert len(said) == 3, result.stderr


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
def test_of_two_conversions_into_one_folder_the_first_stays(sources, tmp_path, form):
    source, to = read_checkpoint(str(sources["run"])), tmp_path / "to"
    first, second = (plan(source, str(to), form, dtype=None, scanned=False) for _ in range(2))
    write(source, first)
    written = contents(to)
    with pytest.raises(UserError, match=r"is there already and not empty"):
        write(source, second)
    assert contents(to) == written
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize("form", ["native", "t5x", "huggingface"])
def test_a_conversion_that_another_overtakes_is_refused(sources, tmp_path, monkeypatch, form):
    source, to = read_checkpoint(str(sources["run"])), tmp_path / "to"
    slow, fast = (plan(source, str(to), form, dtype=None, scanned=False) for _ in range(2))
    sync, overtaken = conversion.sync, []

    def overtake(folder: Path) -> None:
        sync(folder)
        if not overtaken:
            overtaken.append(folder)
            write(source, fast)
            overtaken.append(contents(fast.path))

    monkeypatch.setattr(conversion, "sync", overtake)
    with pytest.raises(UserError, match=r"is there already and not empty"):
        write(source, slow)
    assert contents(fast.path) == overtaken[1] != {}
    assert list(tmp_path.rglob("*.partial")) == []


def test_a_conversion_into_the_folder_of_a_run_under_way_is_refused(sources, tmp_path):
    source = read_checkpoint(str(sources["run"]))
    with Checkpointer(tmp_path / "run"), pytest.raises(UserError, match="is there already and not empty"):
        plan(source, str(tmp_path / "run"), "native", dtype=None, scanned=False)


def test_a_safetensors_file_of_hundreds_of_gigabytes_is_refused_by_its_header(hugging_face):
    """The file keeps what its header promises, as a hole that takes no room: nothing of it may be read for that."""
    file = hugging_face / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8 : 8 + size])
    last = max((name for name in described if name != "__metadata__"), key=lambda name: described[name]["data_offsets"])
    begin = described[last]["data_offsets"][0]
    described[last] |= {"shape": [1 << 36], "data_offsets": [begin, begin + (4 << 36)]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(header(len(text), text) + content[8 + size :])
    os.truncate(file, 8 + len(text) + begin + (4 << 36))
    with pytest.raises(UserError, match=rf"holds {last} of shape \({1 << 36},\), where .* has"):
        read_checkpoint(str(hugging_face))


def test_chunks_by_the_million_are_missed_before_they_are_listed(t5x):
    def many(index: dict) -> None:
        leaf(index)["metadata"] |= {"shape": [1 << 20, 1 << 20], "chunks": [1, 1]}

    edit_index(t5x, many)
    with pytest.raises(CheckpointDamaged, match="is not whole: it lacks files of"):
        read_checkpoint(str(t5x))


@pytest.mark.parametrize("change", [{"shape": [1 << 40, 1 << 20]}, {"chunks": [1 << 30, 1 << 28]}])
def test_a_zarr_header_of_an_absurd_size_is_refused_when_the_array_is_read(t5x, change):
    file = t5x / "target.token_embedder.embedding" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointDamaged, match=r"target\.token_embedder\.embedding is damaged"):
        read_checkpoint(str(t5x)).reader.stored("embedding")[0].whole()


def test_more_stacked_blocks_than_any_model_has_are_refused_before_they_are_counted():
    name = "target/encoder/encoder/subblock_0/pre_mlp_layer_norm/scale"
    array = StoredArray((8, 1 << 40), np.dtype(np.float32), lambda index: np.zeros(0))
    with pytest.raises(UserError, match=r"stacks 1,099,511,627,776 blocks, more than any model has: refused"):
        recognise(OpenCheckpoint("here", "t5x", {name: array}), t5x_tables.LAYOUTS)


def test_an_index_of_gigabytes_is_refused_unread(t5x):
    os.truncate(t5x / "checkpoint", 1 << 40)  # A hole that takes no room, and could not be read into memory.
    with pytest.raises(UserError, match=r"checkpoint has 1,099,511,627,776 bytes, which no such file has"):
        read_checkpoint(str(t5x))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Writes the weights of a Hugging Face folder anew."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


@pytest.mark.parametrize("name", ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_copies_of_the_embedding_are_the_same_or_the_folder_is_refused(hugging_face, name):
    expected = read_checkpoint(str(hugging_face)).reader.stored("embedding")[0].whole()
    rewrite(hugging_face, lambda arrays: arrays.update({name: arrays["shared.weight"].copy()}))
    np.testing.assert_array_equal(read_checkpoint(str(hugging_face)).reader.stored("embedding")[0].whole(), expected)
    rewrite(hugging_face, lambda arrays: arrays[name].__setitem__((-1, -1), 7.0))
    with pytest.raises(UserError, match=rf"holds {name}, which differs from shared\.weight, and its config\.json says"):
        read_checkpoint(str(hugging_face)).reader.stored("embedding")[0].read((slice(0, 1), slice(0, 1)))
    rewrite(hugging_face, lambda arrays: arrays.update({name: arrays[name][:-1].copy()}))
    with pytest.raises(UserError, match=rf"holds {name}, which differs"):
        read_checkpoint(str(hugging_face))


def test_position_buckets_that_the_other_side_has_not_are_refused_both_ways(hugging_face, sources, tmp_path):
    other = dataclasses.replace(SWITCH, relpos_max_distance=64)
    with pytest.raises(UserError, match=r"relpos_max_distance is 128 in .*/hf and 64 here: set it to 128"):
        load_params(str(hugging_face), other, abstract(Model(other).abstract_params))
    run = shutil.copytree(sources["run"], tmp_path / "run")
    (run / "config.gin").write_text("a/TransformerConfig.relpos_max_distance = 9\n")
    source = read_checkpoint(str(run))
    plan(source, str(tmp_path / "to"), "huggingface", dtype=None, scanned=False)
    (run / "config.gin").write_text("X.y = 1\nTransformerConfig.relpos_max_distance = 64\n")
    for form in ("t5x", "huggingface"):
        with pytest.raises(UserError, match=r"run/config\.gin has TransformerConfig\.relpos_max_distance = 64, and "):
            plan(source, str(tmp_path / "to"), form, dtype=None, scanned=False)
    plan(source, str(tmp_path / "to"), "native", dtype=None, scanned=False)


def test_activations_that_the_other_side_has_not_are_refused_both_ways(tmp_path):
    silu = dataclasses.replace(GATED, mlp_activations=("silu", "linear"))
    run = saved(tmp_path / "run", state_of(silu))
    (run / "config.gin").write_text("TransformerConfig.mlp_activations = ('silu', 'linear')\n")
    source = read_checkpoint(str(run))
    for form in ("t5x", "huggingface"):
        with pytest.raises(UserError, match=r"config\.gin has .*mlp_activations = \('silu', 'linear'\)"):
            plan(source, str(tmp_path / "to"), form, dtype=None, scanned=False)
    (run / "config.gin").write_text("TransformerConfig.mlp_activations = ['gelu', 'linear']\n")
    there = converted(run, tmp_path / "hf", "huggingface")
    load_params(str(there), GATED, abstract(Model(GATED).abstract_params))
    with pytest.raises(UserError, match=r"is \('gelu', 'linear'\) in .*/hf and \('silu', 'linear'\) here"):
        load_params(str(there), silu, abstract(Model(silu).abstract_params))


def test_a_folder_below_one_called_checkpoints_is_recognised(sources, tmp_path):
    for form in ("t5x", "huggingface"):
        there = shutil.copytree(sources[form], tmp_path / "checkpoints" / f"my_{form}")
        assert format_of(str(there)) == (form, str(there))
    step = sources["run"] / "checkpoints" / "17"
    assert format_of(str(step)) == ("native", str(step))


def test_a_store_with_checkpoints_deeper_than_one_folder_is_one_sentence(sources, tmp_path):
    url = f"file://{tmp_path}/bucket"
    shutil.copytree(sources["t5x"], tmp_path / "bucket" / "base" / "checkpoint_17")
    with pytest.raises(UserError, match=r"bucket is no checkpoint: name a MODEL_DIR of ours, a T5X folder"):
        format_of(url)
    assert format_of(f"{url}/base") == ("t5x", f"{url}/base/checkpoint_17")


def test_what_killed_conversions_left_is_removed_and_what_others_are_writing_is_not(sources, tmp_path):
    source = read_checkpoint(str(sources["run"]))
    left, live, foreign = (tmp_path / name for name in (".to.1.partial", ".to.2.partial", ".two.1.partial"))
    for folder in (left, live, foreign):
        folder.mkdir()
        (folder / "half").write_text("")
    held = os.open(live, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    write(source, plan(source, str(tmp_path / "to"), "huggingface", dtype=None, scanned=False))
    os.close(held)
    assert sorted(tmp_path.iterdir()) == [live, foreign, tmp_path / "to"]


def test_a_mount_point_is_refused_before_anything_is_read(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    source = read_checkpoint(str(sources["run"]))
    with pytest.raises(UserError, match=r"is where a disk is mounted, which no new folder can replace"):
        plan(source, str(tmp_path), "huggingface", dtype=None, scanned=False)
    plan(source, str(tmp_path / "below"), "huggingface", dtype=None, scanned=False)
