"""Checkpoints: exact, atomic, on any mesh; kept as asked; failures as sentences."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from switch_t5.checkpoint import native_restore, orbax_manager
from switch_t5.checkpoint.manager import Checkpointer, locate_checkpoint
from switch_t5.checkpoint.native_files import open_array
from switch_t5.checkpoint.retention import CheckpointConfig
from switch_t5.checkpoint.snapshot import held
from switch_t5.errors import ConfigError, UserError
from tests.checkpoint.damage import on_a_disk

AXES = ("data", "expert", "model")

BFLOAT16 = np.arange(1 << 16, dtype=np.uint16)
"""Every bit pattern there is, but that NaNs have no payload: the emitters that tests compile with would drop it."""
BFLOAT16[(BFLOAT16 & 0x7FFF) > 0x7F80] = 0x7FC0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Of the kinds that a training state is made of."""

    step: Any
    params: Any
    opt_state: Any


def _sharding(mesh_shape: tuple[int, ...], *spec: str | None) -> NamedSharding:
    devices = jax.devices()[: math.prod(mesh_shape)]
    return NamedSharding(jax.make_mesh(mesh_shape, AXES, devices=devices), PartitionSpec(*spec))


def _bits(seed: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random bit patterns: NaNs with payloads, infinities, subnormals and both zeros among them."""
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8).view(dtype).reshape(shape)


def _state(mesh_shape: tuple[int, ...] = (2, 2, 2)) -> State:
    def put(array: Any, *spec: str | None) -> jax.Array:
        return jax.device_put(array, _sharding(mesh_shape, *spec))

    return State(
        step=put(np.int32(7)),
        params={
            "experts": put(_bits(0, (8, 16, 8), np.float32), "expert", None, "model"),
            "every": put(BFLOAT16.view(jnp.bfloat16), "data"),
        },
        opt_state=({}, [put(_bits(1, (32,), np.int32), "data"), None], put(np.array(True))),
    )


def _abstract(state: Any, sharding: Any = None) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or leaf.sharding), state
    )


def _assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def _number(value: float) -> dict[str, jax.Array]:
    return {"x": jnp.full((4,), value, jnp.float32)}


def _save_numbers(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, _number(step), {"0_of_1": str(step).encode()})
    checkpointer.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, bytes]:
    """A MODEL_DIR with one checkpoint on a (2, 2, 2) mesh; its state and data state."""
    model_dir = tmp_path_factory.mktemp("saved")
    state, data_state = _state(), {"0_of_1": np.random.default_rng(2).bytes(3_000_000)}
    with Checkpointer(model_dir) as checkpointer:
        assert checkpointer.save(7, state, data_state, {"loss": 0.1 + 0.2, "accuracy": float("nan")})
    return model_dir, state, data_state


def test_everything_comes_back_bit_for_bit(saved):
    model_dir, state, data_state = saved
    with Checkpointer(model_dir) as checkpointer:
        restored = checkpointer.restore(_abstract(state))
    assert restored.step == 7
    assert restored.data_state == data_state
    _assert_same_bits(restored.state, state)


@pytest.mark.parametrize("large", [0, native_restore._LARGE], ids=["in place", "through NumPy"])
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1), (8, 1, 1), (4, 1, 2), (1, 1, 1)])
def test_a_checkpoint_is_restored_onto_another_mesh(saved, monkeypatch, mesh_shape, large):
    monkeypatch.setattr(native_restore, "_LARGE", large)
    model_dir, state, _ = saved
    old = (2, 2, 2)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(mesh_shape, *leaf.sharding.spec)),
        state,
    )
    with Checkpointer(model_dir) as checkpointer:
        restored = checkpointer.restore(abstract).state
    _assert_same_bits(restored, state)
    experts = restored.params["experts"]
    assert experts.sharding.mesh.devices.shape == mesh_shape != old
    assert experts.addressable_shards[0].data.shape == (8 // mesh_shape[1], 16, 8 // mesh_shape[2])


def test_what_is_read_in_place_is_its_own_and_may_be_given_away(saved, monkeypatch):
    monkeypatch.setattr(native_restore, "_LARGE", 0)
    native_restore._blanks.cache_clear()
    with Checkpointer(saved[0], read_only=True) as checkpointer:
        first, second = (checkpointer.restore(_abstract(saved[1])).state.params["experts"] for _ in range(2))
    assert native_restore._blanks.cache_info().hits + native_restore._blanks.cache_info().misses > 0
    memory = [shard.data.unsafe_buffer_pointer() for shard in first.addressable_shards]
    negated = jax.jit(lambda array: -array, donate_argnums=0)(first)
    assert [shard.data.unsafe_buffer_pointer() for shard in negated.addressable_shards] == memory
    _assert_same_bits(second, saved[1].params["experts"])


def test_memory_that_is_read_into_stays_after_its_array_was_dropped():
    array = jax.block_until_ready(jnp.zeros(1 << 10))
    memory, dropped = np.asarray(native_restore._Memory(array)), weakref.ref(array)
    del array
    gc.collect()
    assert dropped() is not None
    memory[:] = 1
    del memory
    gc.collect()
    assert dropped() is None


def test_arrays_are_read_by_name_without_the_model(saved):
    model_dir, state, _ = saved
    with Checkpointer(model_dir, read_only=True) as checkpointer:
        arrays = checkpointer.restore_numpy()
    assert list(arrays) == ["opt_state/1/0", "opt_state/2", "params/every", "params/experts", "step"]
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    _assert_same_bits(
        list(arrays.values()), [*jax.tree.leaves(state.opt_state), *jax.tree.leaves(state.params), state.step]
    )


def test_one_part_is_read_and_cast(saved):
    model_dir, state, _ = saved
    abstract = {
        "experts": jax.ShapeDtypeStruct((8, 16, 8), jnp.bfloat16, sharding=SingleDeviceSharding(jax.devices()[3]))
    }
    with Checkpointer(model_dir, read_only=True) as checkpointer:
        with pytest.raises(UserError, match="params/every, of shape"):
            checkpointer.restore_part("params", abstract)
        abstract["every"] = _abstract(state.params["every"])
        part = checkpointer.restore_part("params", abstract)
    assert part["experts"].dtype == jnp.bfloat16
    with np.errstate(invalid="ignore"):  # NaNs are among the values.
        expected = np.asarray(state.params["experts"]).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(part["experts"]).astype(np.float32), expected.astype(np.float32))
    assert part["experts"].devices() == {jax.devices()[3]}
    _assert_same_bits(part["every"], state.params["every"])


def test_metrics_are_kept_exactly(saved):
    with Checkpointer(saved[0], read_only=True) as checkpointer:
        metrics = checkpointer.metrics(7)
    assert metrics["loss"] == 0.1 + 0.2
    assert math.isnan(metrics["accuracy"])


def test_a_part_that_does_not_fit_is_named_with_both_shapes(saved):
    model_dir, state, _ = saved
    abstract = _abstract(state)
    abstract.params["experts"] = jax.ShapeDtypeStruct((8, 16, 4), jnp.float32)
    with Checkpointer(model_dir) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(abstract)
    assert str(caught.value) == (
        f"The checkpoint {model_dir}/checkpoints/7 does not fit this configuration: params/experts has shape "
        "(8, 16, 8) in the checkpoint and (8, 16, 4) in this configuration."
    )


def test_a_step_that_is_missing_is_named_with_those_that_are_not(saved):
    with Checkpointer(saved[0], read_only=True) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore_numpy(8)
    assert str(caught.value) == f"{saved[0]}/checkpoints holds no checkpoint of step 8; it has step 7."


def test_a_path_to_a_checkpoint_may_be_the_run_its_folder_or_one_step(saved):
    model_dir = saved[0]
    for path in (model_dir, model_dir / "checkpoints", model_dir / "checkpoints" / "7"):
        assert locate_checkpoint(path) == (model_dir, 7)
    with pytest.raises(UserError, match=r"checkpoints/8 is no checkpoint \(.* has step 7\): name a MODEL_DIR"):
        locate_checkpoint(model_dir / "checkpoints" / "8")
    with pytest.raises(UserError, match=r"nowhere is no checkpoint: name a MODEL_DIR"):
        locate_checkpoint(model_dir / "nowhere")


def test_a_new_run_has_no_checkpoint(tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpointer.restore(_number(0))


def test_reading_makes_nothing_and_leaves_a_save_under_way_alone(tmp_path):
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() is None
    with Checkpointer(tmp_path, read_only=True) as checkpointer, pytest.raises(UserError):
        checkpointer.restore_numpy()
    assert half.is_dir()
    Checkpointer(tmp_path / "absent", read_only=True).close()
    assert not (tmp_path / "absent").exists()


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    add = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"x": jnp.zeros((1 << 20,)), "y": jnp.zeros((1 << 20,))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(3):
            state = add(state)
        jax.block_until_ready(state)
        assert {name: set(np.unique(x)) for name, x in checkpointer.restore_numpy(1).items()} == {
            "x": {0.0},
            "y": {0.0},
        }


def test_a_save_holds_copies_of_what_lies_on_a_cpu(tmp_path):
    state = {"x": jax.device_put(np.arange(64.0, dtype=np.float32), _sharding((4, 1, 1), "data"))}
    copies = held(state)
    assert copies["x"].sharding == state["x"].sharding
    for shard, copy in zip(state["x"].addressable_shards, copies["x"].addressable_shards, strict=True):
        assert shard.data.unsafe_buffer_pointer() != copy.data.unsafe_buffer_pointer()
    _assert_same_bits(copies, state)


def test_arrays_are_written_as_they_are_and_compressed_ones_of_earlier_versions_read(tmp_path, monkeypatch):
    zeros = {"x": jnp.zeros((1 << 20,))}

    def size(folder: Path) -> int:
        with Checkpointer(folder) as checkpointer:
            checkpointer.save(1, zeros, {})
            checkpointer.wait()
            _assert_same_bits(checkpointer.restore(_abstract(zeros)).state, zeros)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(tmp_path / "new") > 4 << 20
    handler = orbax_manager.ArraysHandler
    monkeypatch.setattr(orbax_manager, "of_shards", lambda array: array)
    monkeypatch.setattr(orbax_manager, "ArraysHandler", lambda **more: handler(**more | {"use_compression": True}))
    assert size(tmp_path / "old") < 1 << 16


def test_a_step_is_saved_once(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, _number(1), {"0_of_1": b"first"})
        assert not checkpointer.save(1, _number(2), {"0_of_1": b"second"})
        assert checkpointer.restore(_abstract(_number(0))).data_state == {"0_of_1": b"first"}
    with Checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.save(1, _number(2), {"0_of_1": b"second"})


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep=None), [1, 2, 3, 4, 5]),
        (CheckpointConfig(keep=2), [4, 5]),
        (CheckpointConfig(keep=1, keep_period=2), [2, 4, 5]),
        (CheckpointConfig(keep=1, keep_best="loss"), [2, 5]),
        (CheckpointConfig(keep=1, keep_best="loss", keep_best_mode="max"), [1, 5]),
        (CheckpointConfig(keep=1, keep_best="loss", keep_best_count=2), [2, 3, 5]),
    ],
)
def test_checkpoints_are_kept_as_configured(tmp_path, config, kept):
    losses = {1: 9.0, 2: 3.0, 3: 4.0, 4: math.nan, 5: None}
    for steps in ((1, 2, 3), (4, 5)):  # What is best is known after a restart.
        with Checkpointer(tmp_path, config) as checkpointer:
            for step in steps:
                loss = losses[step]
                checkpointer.save(step, _number(step), {}, None if loss is None else {"loss": loss})
    assert checkpointer.steps() == kept


def test_a_misspelt_metric_is_refused_without_losing_the_checkpoint(tmp_path):
    config = CheckpointConfig(keep_best="los")
    with Checkpointer(tmp_path, config) as checkpointer:
        with pytest.raises(ConfigError, match=r"\(accuracy, loss\)\. Did you mean 'loss'\?$") as caught:
            checkpointer.save(1, _number(1), {}, {"accuracy": 0.5, "loss": 1.0})
        assert caught.value.parameter == "CheckpointConfig.keep_best"
    assert checkpointer.latest_step() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep", 0), ("keep", "3"), ("keep_period", 0), ("keep_best_count", 0), ("keep_best_mode", "least")],
)
def test_a_wrong_configuration_is_refused(field, value):
    with pytest.raises(ConfigError) as caught:
        CheckpointConfig(**{field: value})
    assert caught.value.parameter == f"CheckpointConfig.{field}"


def test_positions_are_read_by_name_and_one_that_was_not_saved_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, _number(1), {"0_of_2": b"first", "1_of_2": b"second"})
        restored = checkpointer.restore(_abstract(_number(0)), positions=["1_of_2"])
        assert restored.data_state == {"1_of_2": b"second"}
        with pytest.raises(
            UserError, match=r"no position in the data of the shard 0_of_1, but of the shards 0_of_2, 1"
        ):
            checkpointer.restore(_abstract(_number(0)), positions=["0_of_1"])
        assert checkpointer.restore_part("x", _abstract(_number(0)["x"])).tolist() == [1, 1, 1, 1]


def test_a_position_that_was_saved_before_there_were_shards_is_found(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        _save_numbers(checkpointer, 1)
        folder = tmp_path / "checkpoints" / "1" / "data"
        (folder / "shard_0_of_1").rename(folder / "process_0_of_1")
        shutil.rmtree(tmp_path / "checkpoints" / "1" / "manifest")  # It would tell of the renaming.
        (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {}}')
        assert checkpointer.restore(_abstract(_number(0)), positions=["0_of_1"]).data_state == {"0_of_1": b"1"}


def _truncate_arrays(checkpoint: Path) -> None:
    for path in checkpoint.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        _truncate_arrays,
        lambda checkpoint: shutil.rmtree(checkpoint / "state"),
        lambda checkpoint: (checkpoint / "state" / "_METADATA").write_text("{"),
        lambda checkpoint: (checkpoint / "state" / "manifest.ocdbt").unlink(),
    ],
    ids=["truncated arrays", "no state", "torn metadata", "no manifest"],
)
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path, damage):
    with Checkpointer(tmp_path) as checkpointer:
        _save_numbers(checkpointer, 1, 2)
        damage(tmp_path / "checkpoints" / "2")
        for read in (lambda: checkpointer.restore(_abstract(_number(0)), 2), checkpointer.restore_numpy):
            with pytest.raises(UserError) as caught:
                read()
            assert str(caught.value).startswith(f"The checkpoint {tmp_path}/checkpoints/2 is damaged (")
            assert str(caught.value).endswith("): delete that folder to use that of step 1.")
        assert checkpointer.restore_numpy(1)["x"].tolist() == [1, 1, 1, 1]


def test_a_deletion_that_a_kill_interrupted_is_finished_by_the_next_save(tmp_path):
    config = CheckpointConfig(keep=2, keep_best="loss")
    with Checkpointer(tmp_path, config) as checkpointer:
        _save_numbers(checkpointer, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "state")
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "metrics")
    (tmp_path / "checkpoints" / "1" / "_CHECKPOINT_METADATA").unlink()
    with Checkpointer(tmp_path, config) as checkpointer:
        assert checkpointer.restore(_abstract(_number(0))).step == 2
        _save_numbers(checkpointer, 3)
    assert checkpointer.steps() == [2, 3]


def test_a_model_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^MODEL_DIR .*/file/run cannot be written \(Not a directory\)"):
        Checkpointer(tmp_path / "file" / "run")


# What the processes below start with: a run whose first checkpoint is whole.
RUN = """
    import sys
    from pathlib import Path
    from switch_t5.checkpoint import manager
    from switch_t5.errors import UserError

    model_dir = Path(sys.argv[1])
    checkpointer = manager.Checkpointer(model_dir)
    latest = checkpointer.latest_step()
    assert not any(name.startswith("orbax") for name in sys.modules), "a new run imported Orbax early"

    import jax.numpy as jnp
    import numpy as np

    checkpointer.save(1, {"x": jnp.full((4,), 1.0)}, {"0_of_1": b"1"})
    checkpointer.wait()
    large = {"x": np.random.default_rng(0).random(1 << 20, np.float32)}
"""


def _run(script: str, model_dir: Path, *, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(RUN) + textwrap.dedent(script)
    command = [*prefix, sys.executable, "-c", code, str(model_dir)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_checkpoint_half_written_at_a_kill_is_ignored_and_removed(tmp_path):
    script = """
        import os, signal
        from switch_t5.checkpoint.data_positions import DataPositionsHandler

        DataPositionsHandler.save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        checkpointer.save(2, large, {"0_of_1": b"2"})
        checkpointer.wait()
    """
    assert _run(script, tmp_path).returncode == -signal.SIGKILL
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 1
        restored = checkpointer.restore(_abstract(_number(0)))
        assert (restored.step, restored.data_state) == (1, {"0_of_1": b"1"})
        _save_numbers(checkpointer, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]


FULL_DISK = """
    import json, resource

    def attempt(step, state):
        try:
            checkpointer.save(step, state, {{}})
            checkpointer.wait()
        except UserError as error:
            return str(error)

    {begin}
    sentences = [attempt(2, large), attempt(3, large)]
    left = sorted(path.name for path in (model_dir / "checkpoints").iterdir())
    {end}
    sentences.append(attempt(4, {{"x": jnp.full((4,), 4.0)}}))
    checkpointer.close()
    print(json.dumps({{"sentences": sentences, "left": left, "steps": checkpointer.steps()}}))
"""


def _assert_survives(result: subprocess.CompletedProcess[str], model_dir: Path, reason: str) -> None:
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == {
        "sentences": [
            *(
                f"Saving the checkpoint of step {step} in {model_dir}/checkpoints failed ({reason}): make "
                "room there; the checkpoint of step 1 is whole, and the same command goes on from it."
                for step in (2, 3)
            ),
            None,
        ],
        "left": ["1"],
        "steps": [1, 4],
    }


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    result = _run(FULL_DISK.format(begin="", end=""), tmp_path, prefix=on_a_disk("size=3m", tmp_path))
    _assert_survives(result, tmp_path, "No space left on device")


def test_a_file_too_large_is_one_sentence_and_loses_nothing(tmp_path):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    script = FULL_DISK.format(begin=limit.format("1 << 20"), end=limit.format("resource.RLIM_INFINITY"))
    _assert_survives(_run(script, tmp_path), tmp_path, "File too large")


def test_the_last_of_several_failures_is_the_one_that_ends_a_run(tmp_path):
    script = """
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
        checkpointer.save(2, large, {})
        checkpointer.save(3, large, {})
        try:
            checkpointer.wait()
        except UserError as error:
            print(error)
        checkpointer.close()
    """
    result = _run(script, tmp_path)
    assert result.returncode == 0, result.stderr
    failed = [
        f"Saving the checkpoint of step {step} in {tmp_path}/checkpoints failed (File too large)" for step in (2, 3)
    ]
    assert result.stderr.startswith(failed[0])
    assert result.stderr.endswith("It is tried again at the next checkpoint.\n")
    assert result.stdout.startswith(failed[1])


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((6, 512, 256), (1, 512, 256)),  # An expert each.
        ((2, 3, 512, 256), (1, 1, 512, 256)),
        ((6, 64, 256), (6, 64, 256)),
        ((6, 1 << 10, 1 << 10), (1, 512, 512)),  # Experts that are larger than a piece may be.
        ((1 << 15, 64), (1 << 12, 64)),  # Rows are no pieces.
    ],
)
def test_what_orbax_writes_is_stored_in_pieces_along_leading_axes(tmp_path, monkeypatch, shape, chunk):
    monkeypatch.setattr(orbax_manager, "of_shards", lambda array: array)  # As where there are several processes.
    monkeypatch.setattr(orbax_manager, "_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(orbax_manager, "_LEAST_CHUNK_BYTES", 1 << 18)
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, {"x": jnp.asarray(array)}, {})
        checkpointer.wait()
        np.testing.assert_array_equal(checkpointer.restore_numpy()["x"], array)
    stored = open_array(f"{tmp_path}/checkpoints/1", "x").result()
    assert stored.chunk_layout.read_chunk.shape == chunk


@pytest.mark.slow
def test_an_array_larger_than_what_is_usually_on_its_way_to_the_disk_is_saved(tmp_path):
    state = {"x": jnp.zeros(10**9 + 1, jnp.int8)}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == checkpointer._manager.all_steps() == []  # The manager was made for small ones.
        assert checkpointer.save(1, state, {})
        checkpointer.wait()
        assert checkpointer.leaves(1)["x"].shape == state["x"].shape
