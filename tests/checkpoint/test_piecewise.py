"""Arrays that are written part by part: in which pieces, in which order, and what a failure stops."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from switch_t5.checkpoint import stored_arrays
from switch_t5.checkpoint.manager import Checkpointer
from switch_t5.checkpoint.native_files import open_array
from switch_t5.checkpoint.orbax_manager import to_save
from switch_t5.checkpoint.piecewise import Piecewise, PiecewiseHandler, of_shards, registry
from switch_t5.checkpoint.stored_arrays import piece_shape, pieces
from switch_t5.errors import UserError


@pytest.mark.parametrize(
    ("shape", "itemsize", "piece"),
    [
        ((72, 512, 2048), 4, (8, 512, 2048)),  # Eight experts are 32 MB.
        ((32, 768, 3072), 4, (2, 768, 3072)),  # Three would not divide them.
        ((6, 12, 512, 2048), 4, (1, 6, 512, 2048)),
        ((4, 4096, 10240), 4, (1, 512, 10240)),  # One expert is larger than a piece may be.
        ((32128, 512), 4, (16064, 512)),
        ((32749, 1024), 4, (32749, 1024)),  # A prime: rows of 4 KB would be no pieces.
        ((32749 * 3, 4096), 4, (3, 4096)),  # Of more than 1 GB, small pieces are better than none.
        ((8, 16, 8), 4, (8, 16, 8)),
        ((0, 3), 4, (1, 3)),
        ((), 4, ()),
        ((1 << 40,), 1, (1 << 25,)),
    ],
)
def test_a_piece_is_what_lies_together_and_divides_the_array(shape, itemsize, piece):
    assert piece_shape(shape, itemsize) == piece


def test_pieces_are_all_of_an_array_in_order(monkeypatch):
    monkeypatch.setattr(stored_arrays, "_PIECE", 64)
    monkeypatch.setattr(stored_arrays, "_LEAST_PIECE", 16)
    array = np.arange(6 * 4 * 3, dtype=np.float32).reshape(6, 4, 3)
    parts = [array[index] for index in pieces(array.shape, array.itemsize)]
    assert {part.shape for part in parts} == {(1, 4, 3)}
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts]), array.ravel())


def test_what_nothing_divides_is_read_in_pieces_all_the_same():
    parts = [index[0] for index in pieces((32749, 1024), 4)]
    assert parts[:2] == [slice(0, 8192), slice(8192, 16384)]
    assert parts[-1].stop == 32749


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data")])
def test_a_save_stores_pieces_of_shards(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(stored_arrays, "_PIECE", 1 << 9)
    monkeypatch.setattr(stored_arrays, "_LEAST_PIECE", 1 << 6)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec(*spec))
    array = jax.device_put(np.random.default_rng(0).standard_normal((8, 4, 16), np.float32), sharding)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": array}, {})
        np.testing.assert_array_equal(checkpointer.restore_numpy()["x"], array)
        wanted = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)}
        np.testing.assert_array_equal(checkpointer.restore(wanted).state["x"], array)
    stored = open_array(f"{tmp_path}/checkpoints/1", "x").result()
    assert stored.chunk_layout.read_chunk.shape == ((4, 2, 16) if spec == (None, "data") else (2, 4, 16))


def test_only_one_copy_of_what_several_devices_hold_is_written():
    sharding = NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), PartitionSpec())
    leaf = of_shards(jax.device_put(jnp.arange(8.0), sharding))
    [(index, part)] = leaf.parts((8,))
    assert (index, leaf.nbytes) == ((slice(0, 8),), 32)
    np.testing.assert_array_equal(part, np.arange(8.0))


def _save(folder: Path, leaves: dict[str, Piecewise]) -> None:
    types = registry(PiecewiseHandler(0))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=types)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder, args=to_save(leaves))


def test_a_part_is_written_before_the_next_is_asked_for(tmp_path):
    values = np.random.default_rng(0).standard_normal((3, 1 << 18), np.float32)
    written = []

    def parts_of(row: np.ndarray) -> Piecewise:
        def parts(_piece):
            written.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
            yield (slice(0, row.size),), row

        return Piecewise(row.shape, row.dtype, row.shape, parts)

    _save(tmp_path / "saved", {name: parts_of(row) for name, row in zip("abc", values, strict=True)})
    assert [size // values[0].nbytes for size in written] == [0, 1, 2]


def test_what_comes_after_a_failure_is_not_tried(tmp_path):
    asked = []

    def parts_of(name: str) -> Piecewise:
        def parts(_piece):
            asked.append(name)
            raise OSError(28, "No space left on device")
            yield

        return Piecewise((1,), np.dtype(np.float32), (1,), parts)

    with pytest.raises(OSError, match="No space left"):
        _save(tmp_path / "saved", {name: parts_of(name) for name in "abc"})
    assert len(asked) == 1


def test_a_failed_save_is_told_when_nothing_is_being_written_any_more(tmp_path, monkeypatch):
    state, written = {"x": jnp.arange(1 << 10, dtype=jnp.float32)}, []

    def slow(array: jax.Array) -> Piecewise:
        leaf = of_shards(array)

        def parts(piece):
            time.sleep(0.5)
            yield from leaf.parts(piece)
            written.append(array)

        return dataclasses.replace(leaf, parts=parts)

    def fails(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr("switch_t5.checkpoint.orbax_manager.of_shards", slow)
            patch.setattr("switch_t5.checkpoint.data_positions.DataPositionsHandler.save", fails)
            checkpointer.save(1, state, {"data": b"1"})
            with pytest.raises(UserError, match=r"Saving the checkpoint of step 1 .* failed"):
                checkpointer.wait()
            assert len(written) == 1
        assert not list(checkpointer.directory.iterdir())
        checkpointer.save(2, state, {"data": b"2"})
        np.testing.assert_array_equal(checkpointer.restore_numpy()["x"], state["x"])
