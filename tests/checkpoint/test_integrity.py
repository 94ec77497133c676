"""Damage, kills and rivals: nothing goes unnoticed, and no earlier checkpoint is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from switch_t5.checkpoint import fingerprint, native_restore
from switch_t5.checkpoint.agreement import agreed
from switch_t5.checkpoint.conversion import plan, write
from switch_t5.checkpoint.fingerprint import Running, as_text, begin, finish, of_numpy
from switch_t5.checkpoint.formats import open_checkpoint, read_checkpoint
from switch_t5.checkpoint.load import load_params
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.checkpoint.manifest import ManifestHandler, read_manifest
from switch_t5.checkpoint.native_files import verify
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.checkpoint.stored_arrays import CheckpointDamaged
from switch_t5.cli.trained import load_model
from switch_t5.errors import UserError
from switch_t5.model.functional import Model
from tests.checkpoint.damage import flip, halve
from tests.checkpoint.golden import abstract as abstract_of
from tests.checkpoint.test_conversion import SCANNED, saved, state_of

TIMES_ALONE = "_CHECKPOINT_METADATA"
"""Orbax's file of when a checkpoint was made: nothing of a state is in it."""


def state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.arange(600, dtype=jnp.float32) + step, "n": jnp.asarray(step, jnp.int32)}


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {"0_of_1": str(step).encode()}, {"loss": 0.5})
    return folder


def promise_another(checkpoint: Path, array: jax.Array) -> None:
    """Changes an array's fingerprint in a manifest that is sound otherwise."""
    manifest = checkpoint / "manifest" / "manifest.json"
    _, text, _ = manifest.read_text().split("\n")
    right = of_numpy(np.asarray(array))
    assert right in text
    text = text.replace(right, as_text(np.array([1, 2], np.uint32)))
    manifest.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
def test_damage_to_any_file_is_noticed_and_the_checkpoint_before_is_used(two, tmp_path, damage, capsys):
    files = [path.relative_to(two) for path in (two / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(files) > 8
    for number, file in enumerate(files):
        run = tmp_path / str(number)
        shutil.copytree(two, run)
        damage(run / file)
        with Checkpointer(run) as checkpointer:
            restored = checkpointer.restore(abstract())
        if file.name in (TIMES_ALONE, "commit_success.txt") and restored.step == 2:
            assert restored.data_state == {"0_of_1": b"2"}
            np.testing.assert_array_equal(restored.state["x"], state(2)["x"])
            continue
        assert restored.step == 1, file
        np.testing.assert_array_equal(restored.state["x"], state(1)["x"])
        assert sorted(path.name for path in (run / "checkpoints").glob("[0-9]*")) == ["1", "2.damaged"]
        said = capsys.readouterr().err
        assert "checkpoints/2 is damaged (" in said
        assert "; it is now 2.damaged, and step 1 is used." in said


def test_a_bit_flipped_in_memory_before_it_was_written_is_named(two, tmp_path):
    """The files are whole and their checksums right: only the array's own fingerprint tells."""
    run = tmp_path / "run"
    shutil.copytree(two, run)
    promise_another(run / "checkpoints" / "2", state(2)["x"])
    with Checkpointer(run, read_only=True) as checkpointer, pytest.raises(CheckpointDamaged, match="x is damaged"):
        checkpointer.restore(abstract(), 2)
    with pytest.raises(CheckpointDamaged, match="x is damaged: its values are not those that were saved"):
        verify(open_checkpoint(str(run)))


@pytest.mark.parametrize("stored_scanned", [True, False])
def test_a_checkpoint_that_is_stacked_otherwise_is_checked_as_it_is_read(tmp_path, stored_scanned):
    state = state_of(dataclasses.replace(SCANNED, scan_layers=stored_scanned))
    other = dataclasses.replace(SCANNED, scan_layers=not stored_scanned)
    run, wanted = saved(tmp_path / "run", state), abstract_of(Model(other).abstract_params)
    kernel = state.params["decoder"]["stack"]["blocks"]["layers_1"]["self_attention"]["query"]
    promise_another(run / "checkpoints" / "17", kernel)
    for load in (load_params, lambda path, config, wanted: load_model(config, wanted, path)):
        with pytest.raises(CheckpointDamaged, match=r"layers_1/self_attention/query is damaged: its values are not"):
            load(str(run), other, wanted)
    source = read_checkpoint(str(run))
    with pytest.raises(CheckpointDamaged, match="query is damaged"):
        write(source, plan(source, str(tmp_path / "t5x"), "t5x", dtype=None, scanned=False))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_large_array_that_is_damaged_anywhere_is_noticed(tmp_path):
    """A file above a megabyte has no checksum in the manifest: fingerprints alone tell."""
    numbers = np.random.default_rng(0).standard_normal(1 << 19).astype(np.float32)
    large = {"x": jnp.asarray(numbers)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, large, {})
    file = max((tmp_path / "checkpoints" / "1").rglob("*"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    assert len(content) > 2 << 20
    begin = content.index(numbers.tobytes()[:64])
    places = [begin, begin + 1, begin + (1 << 20), begin + (2 << 20) - 1, 0, len(content) - 1]
    like = {"x": jax.ShapeDtypeStruct((1 << 19,), jnp.float32, sharding=large["x"].sharding)}
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        for place in places:
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                restored = checkpointer.restore(like).state
            except CheckpointDamaged:
                continue
            assert not begin <= place < begin + (2 << 20)
            np.testing.assert_array_equal(restored["x"], numbers)  # Of what lies beside the numbers.
        file.write_bytes(content)
        np.testing.assert_array_equal(checkpointer.restore(like).state["x"], numbers)


def test_a_large_position_in_the_data_that_is_damaged_anywhere_is_noticed(tmp_path):
    """It is no array: the manifest has its checksum, whatever its size."""
    position = np.random.default_rng(0).bytes(3 << 20)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1), {"0_of_1": position})
    (file,) = (
        path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    )
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.restore(abstract()).data_state["0_of_1"] == position
        flip(file)
        with pytest.raises(CheckpointDamaged, match="is damaged: its checksum differs"):
            checkpointer.restore(abstract())


def test_a_checkpoint_that_lost_its_manifest_is_not_taken_for_an_older_one(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    checkpoint = run / "checkpoints" / "2"
    shutil.rmtree(checkpoint / "manifest")
    with Checkpointer(run, read_only=True) as checkpointer:
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json is missing"):
            checkpointer.restore(abstract(), 2)
        metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
        metadata["custom_metadata"] = {}  # As it was before there were manifests.
        (checkpoint / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
        assert checkpointer.restore(abstract(), 2).step == 2
        (checkpoint / "_CHECKPOINT_METADATA").unlink()
        with pytest.raises(CheckpointDamaged, match=r"manifest\.json is missing"):
            checkpointer.restore(abstract(), 2)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        '{"version": 2, "files": {}, "arrays": {}}',
        '{"version": 2, "files": {"a": []}, "arrays": {"x": [[4], "int32", "0"]}}',
        '{"version": 2, "files": {"a": ["5", null]}, "arrays": {"x": [[4], "int32", "0"]}}',
        '{"version": 2, "files": {"/etc/hostname": [5, null]}, "arrays": {"x": [[4], "int32", "0"]}}',
        '{"version": 2, "files": {"a/../../b": [5, null]}, "arrays": {"x": [[4], "int32", "0"]}}',
        '{"version": 2, "files": {"%s": [5, null]}, "arrays": {"x": [[4], "int32", "0"]}}' % ("a" * 5000),
        '{"version": 2, "files": {}, "arrays": {"x": [["4"], "int32", "0"]}}',
        '{"version": 2, "files": {}, "arrays": {"x": [[4], "int33", "0"]}}',
        '{"version": 2, "files": {}, "arrays": {"x": [[4], "int32"]}}',
        '{"version": 2, "files": 3}',
        '{"version": "2"}',
        "[" * 100_000,
    ],
)
def test_a_hostile_manifest_is_damage(two, tmp_path, content):
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "manifest.json").write_text(f"{zlib.crc32(content.encode()):08x}\n{content}\n")
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_no_damage(tmp_path):
    rewrite_manifest(tmp_path, lambda content: {"version": 3})
    with pytest.raises(UserError, match="is of version 3, and this release reads version 2") as raised:
        read_manifest(tmp_path)
    assert not isinstance(raised.value, CheckpointDamaged)


def rewrite_manifest(checkpoint: Path, change: Callable[[dict], dict]) -> None:
    """Changes a manifest, or makes one, as somebody would who knows of its checksum."""
    file = checkpoint / "manifest" / "manifest.json"
    file.parent.mkdir(exist_ok=True)
    content = json.loads(file.read_text().split("\n")[1]) if file.exists() else {}
    text = json.dumps(change(content), sort_keys=True)
    file.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")


@pytest.mark.parametrize(
    ("shape", "chunk", "dtype", "promised", "said"),
    [
        (1 << 40, 1 << 40, "float32", [[600], "float32"], r"it is float32\[1099511627776\] and not float32\[600\]"),
        (1 << 40, 1 << 40, "float32", [[1 << 40], "float32"], "its chunks are"),
        (600, 600, "int32", [[600], "float32"], r"it is int32\[600\] and not float32\[600\]"),
    ],
    ids=["an absurd shape", "the manifest's too", "another dtype"],
)
def test_a_header_of_an_absurd_size_or_another_dtype_is_refused_before_anything_is_read(
    two, tmp_path, shape, chunk, dtype, promised, said
):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    folder = run / "checkpoints" / "2"
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/state/"}}
    entries = ts.KvStore.open(store).result()
    header = json.loads(entries["x/zarr.json"])
    header |= {"shape": [shape], "data_type": dtype, "fill_value": 0}
    header["chunk_grid"]["configuration"]["chunk_shape"] = [chunk]
    for codec in header["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = [chunk]
    entries["x/zarr.json"] = json.dumps(header).encode()
    rewrite_manifest(
        folder,
        lambda content: (
            content | {"files": {}, "arrays": content["arrays"] | {"x": [*promised, content["arrays"]["x"][2]]}}
        ),
    )
    with pytest.raises(CheckpointDamaged, match=said):
        verify(open_checkpoint(str(folder)))
    if promised[0] == [600]:
        with Checkpointer(run, read_only=True) as checkpointer, pytest.raises(CheckpointDamaged, match=said):
            checkpointer.restore(abstract(), 2)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), ValueError("UNKNOWN: Error reading: [OS error 5: EIO]")]
)
def test_a_disk_that_cannot_read_a_checkpoint_is_damage(two, tmp_path, monkeypatch, error):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    read = native_restore.read_arrays

    def failing(folder: str, *args: object) -> object:
        if folder.endswith("/2"):
            raise error
        return read(folder, *args)

    monkeypatch.setattr(native_restore, "read_arrays", failing)
    with Checkpointer(run) as checkpointer:
        assert checkpointer.restore(abstract()).step == 1
    assert (run / "checkpoints" / "2.damaged").is_dir()


def test_a_checkpoint_that_cannot_be_opened_just_now_is_not_put_aside(two, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    read, limits = native_restore.read_arrays, resource.getrlimit(resource.RLIMIT_NOFILE)

    def without_files(*args: object) -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            return read(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    monkeypatch.setattr(native_restore, "read_arrays", without_files)
    with Checkpointer(run) as checkpointer, pytest.raises(UserError, match="cannot be read") as raised:
        checkpointer.restore(abstract())
    assert not isinstance(raised.value, CheckpointDamaged)
    assert checkpointer.steps() == [1, 2]


def test_no_more_is_read_ahead_than_there_is_room_for(two, monkeypatch):
    begun: list[object] = []
    to_read = native_restore._to_read
    monkeypatch.setattr(native_restore, "_to_read", lambda *boxes: begun.append(boxes) or to_read(*boxes))
    monkeypatch.setattr(native_restore, "_AHEAD", 0)
    folder = str(two / "checkpoints" / "2")
    manifest = read_manifest(folder)
    assert manifest is not None
    coming = native_restore._as_they_come(folder, abstract(), manifest.leaves)
    for count, (name, array) in enumerate(coming, start=1):
        assert len(begun) == min(count + 1, 2)  # This one, and the one after it.
        assert array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_array_equal(array, state(2)[name])


@pytest.mark.parametrize(
    ("boxes", "piece", "read"),
    [
        ({((0, 2), (0, 4)), ((2, 4), (0, 4))}, (3, 4), {((0, 4), (0, 4))}),
        ({((0, 2), (0, 4)), ((2, 4), (0, 4))}, (2, 4), {((0, 2), (0, 4)), ((2, 4), (0, 4))}),
        ({((0, 2), (0, 4)), ((3, 4), (0, 4))}, (4, 4), {((0, 2), (0, 4)), ((3, 4), (0, 4))}),
        ({()}, (), {()}),
    ],
    ids=["side by side in a piece", "each of its own pieces", "with a gap", "a scalar"],
)
def test_parts_are_read_at_once_where_they_share_pieces_and_leave_no_gap(boxes, piece, read):
    assert native_restore._to_read(boxes, piece) == read


def test_an_array_of_more_bits_than_jax_holds_is_no_damage(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": np.arange(3, dtype=np.float64)}, {})
        wanted = {"x": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=state(0)["n"].sharding)}
        with pytest.raises(UserError, match="x is float64, which JAX holds only with jax_enable_x64 set") as raised:
            checkpointer.restore_part("", wanted)
    assert not isinstance(raised.value, CheckpointDamaged)


@pytest.mark.parametrize(
    ("mine", "others", "raised"),
    [
        (None, 0, None),
        (None, 1, CheckpointDamaged),
        (None, 2, UserError),
        (CheckpointDamaged("it is"), 0, CheckpointDamaged),
        (CheckpointDamaged("it is"), 2, UserError),
        (RuntimeError("no memory"), 1, RuntimeError),
    ],
    ids=str,
)
def test_processes_fail_alike(monkeypatch, mine, others, raised):
    """What one process of two makes of its own error and of the other's."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda value: np.stack([value, np.int32(others)]))
    found: Exception | None = None
    try:
        with agreed("here"):
            if mine is not None:
                raise mine
    except Exception as error:
        found = error
    assert type(found) is (raised or type(None))


def test_an_older_checkpoint_stays_where_the_disk_does_not_keep_the_newer(tmp_path, monkeypatch, capsys):
    finalize = ManifestHandler.finalize

    def and_lose(self: ManifestHandler, directory: Path) -> None:
        finalize(self, directory)  # pyright: ignore[reportArgumentType]
        for file in Path(directory).parent.rglob("_METADATA"):
            halve(file)

    with Checkpointer(tmp_path, CheckpointConfig(keep=1)) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(ManifestHandler, "finalize", and_lose)
            checkpointer.save(2, state(2), {})
            with pytest.raises(
                UserError, match=r"Saving the checkpoint of step 2 in .* failed \(.*_METADATA has .*disk"
            ):
                checkpointer.wait()
        assert sorted(path.name for path in checkpointer.directory.iterdir()) == ["1"]
        assert checkpointer.restore(abstract()).step == 1
        checkpointer.save(3, state(3), {})
    assert checkpointer.steps() == [3]


def test_a_save_that_fails_in_the_background_does_not_cost_the_next(tmp_path, monkeypatch, capsys):
    finalize = ManifestHandler.finalize

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpointer(tmp_path, CheckpointConfig(tolerated_failures=2)) as checkpointer:
        monkeypatch.setattr(ManifestHandler, "finalize", fail)
        assert checkpointer.save(1, state(1), {})
        while not checkpointer._manager._finalize_thread.map(lambda thread: thread is not None and thread.exception):
            time.sleep(0.01)
        monkeypatch.setattr(ManifestHandler, "finalize", finalize)
        assert checkpointer.save(2, state(2), {"0_of_1": b"2"})
        assert "step 1 in" in (said := capsys.readouterr().err) and said.count("It is tried again") == 1
        checkpointer.wait()
        assert checkpointer.steps() == [2]
        monkeypatch.setattr(ManifestHandler, "finalize", fail)
        for step in (3, 4, 5):  # Each fails in the background, and is told when the next begins.
            assert checkpointer.save(step, state(step), {})
        with pytest.raises(UserError, match=r"step 5 in .* failed \(No space left"):
            checkpointer.save(6, state(6), {})
        monkeypatch.setattr(ManifestHandler, "finalize", finalize)
        checkpointer._failures.clear()


def test_a_programming_error_in_a_save_is_not_tried_again(tmp_path, monkeypatch):
    def fail(*args: object, **more: object) -> None:
        raise TypeError("wrong")

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "save", fail)
        with pytest.raises(TypeError, match="wrong"):
            checkpointer.save(1, state(1), {})


def test_the_last_checkpoint_is_never_put_aside(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    shutil.rmtree(run / "checkpoints" / "1")
    flip(run / "checkpoints" / "2" / "state" / "_METADATA")
    with Checkpointer(run) as checkpointer, pytest.raises(CheckpointDamaged, match="and there is no other"):
        checkpointer.restore(abstract())
    assert (run / "checkpoints" / "2").is_dir()


def test_a_run_goes_on_over_a_damaged_checkpoint(two, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    flip(run / "checkpoints" / "2" / "state" / "_METADATA")
    with Checkpointer(run, CheckpointConfig(keep=1)) as checkpointer:
        assert checkpointer.restore(abstract()).step == 1
        assert checkpointer.save(2, state(2), {"0_of_1": b"2 again"})
        checkpointer.wait()
        assert checkpointer.restore(abstract()).data_state == {"0_of_1": b"2 again"}


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with Checkpointer(tmp_path):
        with pytest.raises(UserError, match=rf"is being written by another run \(process {os.getpid()}\)"):
            Checkpointer(tmp_path)
        Checkpointer(tmp_path, read_only=True).close()
    Checkpointer(tmp_path).close()


def test_failed_saves_are_told_tried_again_and_at_last_fatal(tmp_path, monkeypatch, capsys):
    config = CheckpointConfig(tolerated_failures=2)
    with Checkpointer(tmp_path, config) as checkpointer:
        assert checkpointer.save(1, state(1), {})
        checkpointer.wait()
        full = OSError(28, "No space left on device")

        def fail(*args: object, **more: object) -> None:
            raise full

        monkeypatch.setattr(checkpointer._manager, "save", fail)
        for step in (2, 3):
            assert not checkpointer.save(step, state(step), {})
            said = capsys.readouterr().err
            assert f"step {step} in {tmp_path}/checkpoints failed (No space left" in said
            assert "the checkpoint of step 1 is whole" in said
        with pytest.raises(UserError, match=r"step 4 .* failed"):
            checkpointer.save(4, state(4), {})
        monkeypatch.undo()
        checkpointer._failures.clear()
        assert checkpointer.save(5, state(5), {})
        checkpointer.wait()
        # A success in between begins the count anew.
        monkeypatch.setattr(checkpointer._manager, "save", fail)
        assert not checkpointer.save(6, state(6), {})
        with pytest.raises(UserError, match="step 6"):
            checkpointer.wait()
    assert checkpointer.steps() == [1, 5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8", "bool", "int32"])
@pytest.mark.parametrize("shape", [(), (7,), (1 << 14,), (4, 6, 8), (4, 136, 200)])
@pytest.mark.parametrize("large", [0, 1 << 30])
def test_a_fingerprint_is_the_same_on_the_host_and_on_any_mesh(shape, dtype, large, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LARGE", large)
    values = np.random.default_rng(0).standard_normal(shape) * 50
    array = values.astype(jnp.dtype(dtype))
    expected = of_numpy(array)
    if dtype != "float64":  # JAX has none by default.
        assert as_text(finish({"a": begin(jnp.asarray(array))})["a"]) == expected
        if len(shape) == 3:
            mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
            sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "a", "b")))
            assert as_text(finish({"a": begin(sharded)})["a"]) == expected
    running = Running()
    if len(shape) == 3:
        for at in range(0, shape[1], 4):
            index = (slice(0, 4), slice(at, min(shape[1], at + 4)), slice(0, shape[2]))
            running.add_part(array[index], index, shape)
        assert as_text(running.sums) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=4), st.sampled_from(["uint32", "bfloat16", "int8"]), st.data())
def test_the_host_and_both_programs_sum_a_part_alike(shape, dtype, data):
    array = np.random.default_rng(0).integers(0, 1 << 32, shape, np.uint32).astype(jnp.dtype(dtype))
    starts = [data.draw(st.integers(0, dim - 1)) for dim in shape]
    index = tuple(slice(at, data.draw(st.integers(at + 1, dim))) for at, dim in zip(starts, shape, strict=True))
    running, strides = Running(), fingerprint._strides(tuple(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_CHUNK", 64)
        running.add_part(array[index], index, tuple(shape))
    part, first = jnp.asarray(array[index]), jnp.uint32(fingerprint._offset(index, tuple(shape)))
    at_once = fingerprint._at_once(part, first, strides)
    np.testing.assert_array_equal(running.sums, at_once * np.array([1, fingerprint._WEIGHT], np.uint32))
    np.testing.assert_array_equal(at_once, fingerprint._by_rows(part, first, strides, row=64))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.data())
def test_one_flipped_bit_always_changes_both_kinds_of_fingerprint(seed, size, data):
    array = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    before = of_numpy(array)
    at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    array.view(np.uint32)[at] ^= np.uint32(1) << np.uint32(bit)
    after = of_numpy(array)
    assert after[:8] != before[:8]
    assert after[8:] != before[8:]


SAVING = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    import jax, jax.numpy as jnp
    from switch_t5.checkpoint import manager, orbax_manager, stored_arrays
    from switch_t5.checkpoint.retention import CheckpointConfig

    # A small state in as many pieces and files as a large one, whose parts wait for one another.
    stored_arrays._PIECE, stored_arrays._LEAST_PIECE, orbax_manager._FILE_BYTES = 1 << 14, 1 << 10, 1 << 15
    handler = orbax_manager.PiecewiseHandler
    orbax_manager.PiecewiseHandler = lambda in_flight: handler(1 << 17)

    def state(step):
        arrays = {f"x{i}": jnp.full((1 << 14,), step, jnp.float32) for i in range(4)}
        return {**arrays, "n": jnp.asarray(step, jnp.int32)}

    def save_until_killed(folder):
        with manager.Checkpointer(folder, CheckpointConfig(keep=2)) as checkpointer:
            step = checkpointer.latest_step() or 0
            if step:
                like = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state(0)
                )
                restored = checkpointer.restore(like)
                assert restored.step == step == int(restored.state["n"]), (restored.step, step)
                assert all((np.asarray(restored.state[f"x{i}"]) == step).all() for i in range(4))
                assert restored.data_state == {"0_of_1": str(step).encode()}
            (folder / "sound").write_text(str(step))
            while True:
                step += 1
                checkpointer.save(step, state(step), {"0_of_1": str(step).encode()})

    # The imports are done once: each kill is of a child that was forked before JAX had started anything.
    for line in sys.stdin:
        child = os.fork()
        if not child:
            save_until_killed(Path(line.strip()))
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def newest_step(folder: Path) -> int:
    """The last checkpoint that was committed, 0 where there is none."""
    return max((int(step.name) for step in (folder / "checkpoints").glob("*") if step.name.isdecimal()), default=0)


@pytest.mark.slow
def test_every_restart_after_a_kill_at_a_random_moment_finds_a_sound_checkpoint(tmp_path):
    code = textwrap.dedent(SAVING)
    environment = {**os.environ, "XLA_FLAGS": ""}
    nursery = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert nursery.stdin is not None and nursery.stdout is not None
    moments = random.Random(0)
    last = 0
    for _ in range(50):
        sound = tmp_path / "sound"
        sound.unlink(missing_ok=True)
        print(tmp_path, file=nursery.stdin, flush=True)
        child = int(nursery.stdout.readline())
        deadline = time.monotonic() + 60
        while not sound.exists() or not sound.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert int(sound.read_text()) >= last, "a checkpoint was lost"
        last = int(sound.read_text())
        # Some die in their first save, some later; however slow the machine, half of them leave a new one.
        wanted = last + moments.choice((0, 0, 1, 2))
        while newest_step(tmp_path) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.7))
        os.kill(child, signal.SIGKILL)
        assert int(nursery.stdout.readline()) == signal.SIGKILL
    nursery.stdin.close()
    nursery.wait(10)
    nursery.stdout.close()
    assert last > 10
