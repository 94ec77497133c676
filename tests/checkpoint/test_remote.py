"""Checkpoints at a URL: found, checked, read and converted as those on a disk are."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from switch_t5.checkpoint import huggingface_files, safetensors_remote
from switch_t5.checkpoint.conversion import plan
from switch_t5.checkpoint.folder import array_errors
from switch_t5.checkpoint.formats import format_of, open_checkpoint, read_checkpoint
from switch_t5.checkpoint.load import load_params, load_state
from switch_t5.checkpoint.native_files import verify
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.cli.main import main
from switch_t5.errors import UserError
from switch_t5.layers.moe_config import MoEConfig
from tests.checkpoint.damage import flip
from tests.checkpoint.golden import abstract
from tests.checkpoint.storage_server import serve
from tests.checkpoint.test_conversion import SCANNED, SWITCH, assert_same, converted, saved, state_of


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What lies at ``gs://bucket``: a run, the same in other formats, and a run of a model that only ours can hold."""
    root = tmp_path_factory.mktemp("storage")
    folder = root / "bucket"
    saved(folder / "run", state_of(SCANNED))
    (folder / "run" / "config.gin").write_text("TransformerConfig.relpos_max_distance = 128\n")
    converted(folder / "run", folder / "hf", "huggingface")
    converted(folder / "run", folder / "t5x", "t5x")
    saved(folder / "shared", state_of(SHARED))
    with pytest.MonkeyPatch.context() as patch, serve(root) as address:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")  # Nobody is asked who we are.
        yield folder


MANIFEST = "checkpoints/17/manifest/manifest.json"
SHARED = dataclasses.replace(SWITCH, moe=MoEConfig(3, num_shared_experts=1))
NAMES = {"native": "gs://bucket/run", "t5x": "gs://bucket/t5x", "huggingface": "gs://bucket/hf"}


@pytest.mark.parametrize("form", list(NAMES))
def test_what_lies_there_is_recognised_and_read(bucket, form):
    url = NAMES[form]
    assert format_of(url)[0] == form
    local = open_checkpoint(str(bucket / url.rsplit("/", 1)[1]))
    remote = open_checkpoint(f"{url}/")
    assert remote.step == local.step
    assert {name: (array.shape, array.dtype) for name, array in remote.arrays.items()} == {
        name: (array.shape, array.dtype) for name, array in local.arrays.items()
    }
    for name, array in remote.arrays.items():
        np.testing.assert_array_equal(array.whole(), local.arrays[name].whole(), err_msg=name)
    state = state_of(SCANNED)
    assert_same(load_params(url, SCANNED, abstract(state.params)).params, state.params)
    written_out = dataclasses.replace(SCANNED, scan_layers=False)
    params = state_of(written_out).params
    assert_same(
        load_params(url, written_out, abstract(params)).params,
        load_params(local.path, written_out, abstract(params)).params,
    )


@pytest.mark.parametrize("url", ["gs://bucket/run/checkpoints", "gs://bucket/run/checkpoints/17", "gs://bucket/t5x"])
def test_the_whole_state_goes_on(bucket, url):
    state = state_of(SCANNED)
    assert_same(load_state(url, SCANNED, abstract(state)), state)
    written_out = dataclasses.replace(SCANNED, scan_layers=False)
    wanted, local = abstract(state_of(written_out)), str(bucket / url.removeprefix("gs://bucket/"))
    assert_same(load_state(url, written_out, wanted), load_state(local, written_out, wanted))


def test_a_model_that_no_table_knows_is_read_from_ours(bucket):
    state = state_of(SHARED)
    assert_same(load_params("gs://bucket/shared", SHARED, abstract(state.params)).params, state.params)
    with pytest.raises(UserError, match=r"^The checkpoint gs://bucket/shared/checkpoints/17 does not fit this "):
        load_params("gs://bucket/shared", SWITCH, abstract(state_of(SWITCH).params))


@pytest.mark.parametrize("form", ["native", "huggingface"])
def test_each_device_gets_its_own_part(bucket, form):
    state = state_of(SCANNED)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))

    def split(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "model" if leaf.shape[-1] % 2 == 0 else None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree.map(split, state.params)
    read = load_params(NAMES[form], SCANNED, wanted).params
    assert_same(read, state.params)
    assert jax.tree.leaves(read)[0].sharding == jax.tree.leaves(wanted)[0].sharding


@pytest.mark.parametrize("form", list(NAMES))
def test_inspect_and_convert(bucket, form, tmp_path, capsys):
    assert main(["inspect", NAMES[form], "--deep", f"--json={tmp_path / 'found.json'}"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["format"] == form
    checked = {"native": "as they were saved", "t5x": "as they were converted", "huggingface": "as they were converted"}
    assert found["integrity"].endswith(checked[form])
    assert main(["convert", f"--from={NAMES[form]}", f"--to={tmp_path / 'out'}", "--format=huggingface"]) == 0
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(bucket / "hf/model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def becomes(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def unused_dtype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


@pytest.mark.parametrize(
    ("name", "file", "damage", "sentence"),
    [
        ("hf", "model.safetensors", cut, r"model\.safetensors is damaged: it is cut short\.$"),
        ("hf", "model.safetensors", becomes(b"1234"), r"a header of 0 bytes\)\.$"),
        ("hf", "model.safetensors", becomes(b"\xff" * 99), r"a header of 18,446,744,073,709,551,615 bytes\)"),
        ("hf", "model.safetensors", becomes(b"\x09" + b"\0" * 30), r"its header is none \("),
        ("hf", "model.safetensors", unused_dtype, r"of dtype I32: F32, BF16, F16 can be read\.$"),
        ("hf", "model.safetensors", os.remove, r"/hf has no model\.safetensors and no model\.safetensors\.index"),
        ("hf", "config.json", os.remove, r"/hf/config\.json is missing"),
        ("run", MANIFEST, flip, r"manifest\.json is damaged"),
        ("run", MANIFEST, os.remove, r"manifest\.json is missing\.$"),
        ("run", "checkpoints/17/_CHECKPOINT_METADATA", os.remove, r"/run is no checkpoint: name a MODEL_DIR"),
        ("run", "checkpoints/17/state/manifest.ocdbt", flip, r"manifest\.ocdbt is damaged: its checksum differs\.$"),
        ("run", "checkpoints/17/state/manifest.ocdbt", os.remove, r"manifest\.ocdbt is missing\.$"),
        ("t5x", "checkpoint_17/checkpoint", cut, r"checkpoint_17/checkpoint is damaged: it is no msgpack"),
        ("t5x", "checkpoint_17/checkpoint", os.remove, r"checkpoint_17 has no file 'checkpoint', T5X's index"),
    ],
)
def test_damage_is_told(bucket, name, file, damage: Damage, sentence):
    copy = bucket / "damaged" / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bucket / name, copy)
    damage(copy / file)
    with pytest.raises(UserError, match=sentence):
        read_checkpoint(f"gs://bucket/damaged/{name}")


def with_arrays(arrays: object) -> Damage:
    """A manifest whose checksum is right and whose names and fingerprints of arrays are these."""

    def rewrite(path: Path) -> None:
        content = json.loads(path.read_text().split("\n")[1])
        changed = content["arrays"] | arrays if isinstance(arrays, dict) and arrays else arrays
        text = json.dumps({**content, "arrays": changed}, sort_keys=True)
        path.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")

    return rewrite


@pytest.mark.parametrize("arrays", [3, [], {}, [1], {"params/x": 1}, {"\ud800": "0"}], ids=repr)
def test_a_manifest_that_names_no_arrays_is_damaged(bucket, tmp_path, arrays):
    shutil.copytree(bucket / "run", tmp_path / "run")
    with_arrays(arrays)(tmp_path / "run" / MANIFEST)
    with pytest.raises(UserError, match=r"manifest\.json is damaged \("):
        open_checkpoint(f"file://{tmp_path}/run")


def test_what_is_not_what_was_saved_is_not_started_from(bucket, tmp_path):
    wanted = abstract(state_of(SCANNED).params)
    shutil.copytree(bucket / "run", tmp_path / "run")
    table = wanted["embedding"]["table"]
    with_arrays({"params/embedding/table": [table.shape, "float32", "0" * 16]})(tmp_path / "run" / MANIFEST)
    with pytest.raises(UserError, match="params/embedding/table is damaged: its values are not those that were saved"):
        load_params(f"file://{tmp_path}/run", SCANNED, wanted)
    shutil.copytree(bucket / "run", tmp_path / "other")
    largest = max((tmp_path / "other").rglob("d/*"), key=lambda path: path.stat().st_size)
    with_arrays({"params/none": [[2], "float32", "0" * 16]})(tmp_path / "other" / MANIFEST)
    with pytest.raises(UserError, match=r"^file://.*/17: params/none is damaged \("):
        verify(open_checkpoint(f"file://{tmp_path}/other"))
    cut(largest)
    with pytest.raises(UserError, match=r"is shorter than [\d,]+ bytes\.$"):
        open_checkpoint(f"file://{tmp_path}/other")


def header(entry: object, rest: bytes = b"\0" * 8, name: str = "shared.weight") -> bytes:
    """A safetensors file with one entry in its header."""
    text = json.dumps({name: entry}).encode()
    return len(text).to_bytes(8, "little") + text + rest


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        header({**WHOLE, "data_offsets": [0, 4, 8]}),
        header({**WHOLE, "data_offsets": [0, 8.0]}),
        header({**WHOLE, "data_offsets": [False, 8]}),
        header({**WHOLE, "data_offsets": [0, float("inf")]}),
        header({**WHOLE, "dtype": []}),
        header({**WHOLE, "shape": [10**30]}),
        header({**WHOLE, "shape": [1] * 9}),
        header({**WHOLE, "shape": 2}),
        header([WHOLE]),
        b"\x0d" + b"\0" * 7 + b'[[1, {"a":1}]]',
    ],
)
def test_a_header_that_describes_no_arrays_is_damaged(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its header is none \("):
        open_checkpoint(f"file://{tmp_path}")


@pytest.mark.parametrize("change", [{"shape": [3]}, {"data_offsets": [4, 12]}], ids=["too few", "not from the start"])
def test_bytes_that_are_not_an_arrays_own_are_damage(tmp_path, change):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(header({**WHOLE, **change}, b"\0" * 12))
    with pytest.raises(UserError, match=r"its header gives shared\.weight bytes that are not its own\.$"):
        open_checkpoint(f"file://{tmp_path}")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../x"}}'}, r"names the file '\.\./x', outside"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "x"}}'}, r"is not whole: it lacks x with a; copy"),
        ({"model.safetensors.index.json": "[]"}, r"index\.json is damaged: it is no JSON object"),
        ({"pytorch_model.bin": ""}, r"holds pickled weights"),
    ],
)
def test_a_folder_that_is_not_whole_is_told(tmp_path, files, sentence):
    for name, text in {"config.json": "{}", **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        open_checkpoint(f"file://{tmp_path}")


def test_a_large_array_is_read_in_pieces(bucket, monkeypatch):
    array = open_checkpoint(f"file://{bucket}/hf").arrays["shared.weight"]
    expected = load_file(bucket / "hf/model.safetensors")["shared.weight"]
    monkeypatch.setattr(safetensors_remote, "_PIECE", 3 * 8 * 4)  # Three rows.
    np.testing.assert_array_equal(array.read((slice(2, 39), slice(1, 7))), expected[2:39, 1:7])


def test_a_file_beyond_any_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_files, "_LARGEST_JSON", 5)
    (tmp_path / "config.json").write_text('{"a": 1}')
    for path in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(UserError, match=r"config\.json has (8|more than 5) bytes, which no such file has\.$"):
            open_checkpoint(path)


def test_a_copy_under_way_does_not_hide_what_is_whole(bucket, tmp_path):
    shutil.copytree(bucket / "t5x", tmp_path / "t5x")
    (tmp_path / "t5x/checkpoint_18").mkdir()
    (tmp_path / "t5x/checkpoint_18/target.x").write_text("")
    for path in (f"{tmp_path}/t5x", f"file://{tmp_path}/t5x"):
        assert format_of(path) == ("t5x", f"{path}/checkpoint_17")


def test_a_store_out_of_reach_is_no_damage():
    with pytest.raises(CheckpointDamaged, match=r"^gs://b/x is damaged \(DATA_LOSS: "), array_errors("gs://b/x"):
        raise ValueError("DATA_LOSS: cut short\nmore")
    with pytest.raises(UserError, match=r"^gs://b/x cannot be read \(UNAVAILABLE: ") as told, array_errors("gs://b/x"):
        raise ValueError("UNAVAILABLE: no route")
    assert not isinstance(told.value, CheckpointDamaged)


def test_what_is_refused(bucket):
    with pytest.raises(UserError, match=r"^gs://bucket/none does not exist: name a MODEL_DIR of ours, a T5X folder"):
        format_of("gs://bucket/none")
    with pytest.raises(UserError, match=r"^nosuch://bucket/x cannot be read \("):
        format_of("nosuch://bucket/x")
    with pytest.raises(UserError, match=r"^gs://bucket/run/checkpoints/3 is no checkpoint \(gs://.* has step 17\):"):
        open_checkpoint("gs://bucket/run/checkpoints/3")
    config = bucket / "run" / "config.gin"
    kept = config.read_text()
    config.write_text("TransformerConfig.relpos_max_distance = 64\n")
    with pytest.raises(UserError, match=r"^gs://bucket/run/config\.gin has \S+\.relpos_max_distance = 64, and"):
        plan(read_checkpoint("gs://bucket/run"), "/nowhere/x", "t5x", dtype=None, scanned=False)
    config.write_text(kept)
