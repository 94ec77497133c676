"""The whole program as several processes of one machine: the run of one process, whatever becomes of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import Program

pytestmark = pytest.mark.timeout(1200)  # Several programs start, several times, on as many cores as there are.

LOCAL = Path(__file__).parents[2] / "scripts" / "launch" / "local.sh"
STEPS = 20
RUN = ("--gin.DataConfig.num_shards=4", "--gin.CHECKPOINT_PERIOD=10", f"--gin.TRAIN_STEPS={STEPS}")
ONE_DEVICE = ("--gin.NUM_EXPERT_PARTITIONS=1", "--gin.NUM_MODEL_PARTITIONS=1", "--gin.RuntimeConfig.num_cpu_devices=1")
FSDP = "--gin.MeshConfig.num_fsdp_partitions=2"
EXPLICIT = ("--gin.NUM_EXPERT_PARTITIONS=4", "--gin.NUM_MODEL_PARTITIONS=1", "--gin.MoEConfig.exchange='all_to_all'")
# Sums in another order differ in float32's last digits, and updates carry that on.
RTOL = 2e-5


def free_address() -> str:
    """Of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(
    program: Program,
    model_dir: Path,
    processes: int,
    devices: int,
    *flags: str,
    differing: dict[int, list[str]] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts the processes of a run."""
    settings = [f"coordinator_address={free_address()}", f"num_processes={processes}", f"num_cpu_devices={devices}"]
    common = [*flags, *(f"--gin.RuntimeConfig.{setting}" for setting in settings)]
    started = []
    for process in range(processes):
        own = [f"--gin.RuntimeConfig.process_id={process}", *(differing or {}).get(process, [])]
        started.append(program.start("train", model_dir, *common, *own))
    return started


def ends(started: list[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str]]:
    """Exit codes and standard errors."""
    outputs = [process.communicate(timeout=seconds)[1] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def together(
    program: Program, model_dir: Path, processes: int, devices: int, *flags: str, command: str = "train"
) -> str:
    """Runs all processes to their end by the launch script; returns what they say."""
    words = program.command(command, model_dir, *flags)
    environment = {**os.environ, "SWITCH_T5": " ".join(words[:3])}
    launch = [str(LOCAL), f"--processes={processes}", f"--devices={devices}", *words[3:]]
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stderr


def entries(model_dir: Path) -> list[dict]:
    path = model_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def assert_same_losses(one: Path, other: Path) -> None:
    """Those of each step and of each evaluation."""
    losses = [[(entry["step"], entry.get("task"), entry["loss"]) for entry in entries(run)] for run in (one, other)]
    assert [entry[:2] for entry in losses[0]] == [entry[:2] for entry in losses[1]]
    assert losses[0][-1][0] == STEPS
    np.testing.assert_allclose(*([entry[2] for entry in of_run] for of_run in losses), rtol=RTOL)


def arrays(model_dir: Path) -> dict[str, np.ndarray]:
    from switch_t5.checkpoint.manager import Checkpointer

    with Checkpointer(model_dir, read_only=True) as checkpointer:
        assert checkpointer.latest_step() == STEPS
        return checkpointer.restore_numpy()


def wait_until_logged(started: list[subprocess.Popen[str]], model_dir: Path, step: int) -> None:
    def logged() -> bool:
        return any(entry["step"] >= step for entry in entries(model_dir))

    while all(process.poll() is None for process in started) and not logged():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one_process(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process on eight devices."""
    model_dir = tmp_path_factory.mktemp("one") / "run"
    program.run("train", model_dir, *RUN)
    return model_dir


@pytest.fixture(scope="module")
def two_processes(program: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same run by two processes of four devices, and what they said."""
    model_dir = tmp_path_factory.mktemp("two") / "run"
    return model_dir, together(program, model_dir, 2, 4, *RUN)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(one_process: Path, two_processes: tuple[Path, str]) -> None:
    model_dir, said = two_processes
    assert_same_losses(one_process, model_dir)
    assert sorted(path.name for path in model_dir.iterdir()) == sorted(path.name for path in one_process.iterdir())
    assert len(list((model_dir / "tensorboard").iterdir())) == 1
    shards = sorted(path.name for path in (model_dir / "checkpoints" / "20" / "data").glob("shard_*"))
    assert shards == [f"shard_{shard}_of_4" for shard in range(4)]
    # The first process speaks, and alone.
    assert said.count(f"Trained to step {STEPS}") == 1
    assert "8 of 8 cpu in 2 processes" in said
    assert "process_id" not in (model_dir / "config.gin").read_text()


@pytest.mark.slow
def test_two_processes_answer_a_file_as_one_does(program: Program, one_process: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    words = ["".join(chr(97 + (row * place) % 8) for place in range(1 + row % 30)) for row in range(70)]
    asked.write_text("".join(json.dumps({"inputs": word}) + "\n" for word in words))
    flags = (f"--input={asked}", "--gin.DecodingConfig.max_length=4", "--gin.DecodingConfig.num_beams=2")
    program.run("infer", one_process, *flags, f"--output={tmp_path / 'one.jsonl'}")
    said = together(program, one_process, 2, 4, *flags, f"--output={tmp_path / 'two.jsonl'}", command="infer")
    assert said.count("70 inputs.") == 1
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert len(one) == 70
    assert len({answer["outputs"][0]["text"] for answer in one}) > 1
    for alone, shared in zip(one, two, strict=True):
        assert (shared["index"], shared["inputs"]) == (alone["index"], alone["inputs"])
        for ours, theirs in zip(shared["outputs"], alone["outputs"], strict=True):
            assert ours["text"] == theirs["text"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    # Two processes go on with the file of one.
    torn = tmp_path / "one.jsonl"
    begun = torn.read_bytes().splitlines(keepends=True)[:65]
    torn.write_bytes(b"".join(begun))
    assert "64 were done before" in together(program, one_process, 2, 4, *flags, f"--output={torn}", command="infer")
    rest = (tmp_path / "two.jsonl").read_bytes().splitlines(keepends=True)[64:]
    assert torn.read_bytes() == b"".join([*begun[:64], *rest])


@pytest.mark.slow
def test_four_processes_make_the_run_of_one(program: Program, one_process: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "run"
    together(program, model_dir, 4, 2, *RUN, *EXPLICIT)
    assert_same_losses(one_process, model_dir)


@pytest.mark.slow
def test_four_processes_begin_and_two_go_on_along_other_axes(
    program: Program, one_process: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "run"
    together(program, model_dir, 4, 2, *RUN, FSDP, "--gin.TRAIN_STEPS=10")
    shutil.rmtree(model_dir / "tensorboard")
    together(program, model_dir, 2, 4, *RUN, *EXPLICIT)
    assert_same_losses(one_process, model_dir)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_other_along_and_the_pair_goes_on_bitwise(
    program: Program, two_processes: tuple[Path, str], tmp_path: Path
) -> None:
    model_dir = tmp_path / "run"
    started = start(program, model_dir, 2, 4, *RUN)
    wait_until_logged(started, model_dir, 13)
    started[1].send_signal(signal.SIGKILL)
    (code, said), (killed, _) = ends(started, 60)
    assert killed == -signal.SIGKILL
    assert code != 0
    assert "another process has died" in said or "heartbeat" in said, said
    together(program, model_dir, 2, 4, *RUN)
    whole = two_processes[0]
    assert (model_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    left, right = arrays(model_dir), arrays(whole)
    assert {name: value.tobytes() for name, value in left.items()} == {
        name: value.tobytes() for name, value in right.items()
    }


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_at_one_step_and_one_process_goes_on(
    program: Program, one_process: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "run"
    started = start(program, model_dir, 2, 4, *RUN)
    wait_until_logged(started, model_dir, 3)
    started[1].send_signal(signal.SIGTERM)
    (code, said), (other_code, _) = ends(started)
    assert (code, other_code) == (143, 143), said
    assert "the same command goes on from there" in said
    program.run("train", model_dir, *RUN)
    assert_same_losses(one_process, model_dir)


@pytest.mark.slow
def test_four_processes_go_on_from_the_checkpoint_of_one_device(
    program: Program, one_process: Path, tmp_path: Path
) -> None:
    model_dir = tmp_path / "run"
    program.run("train", model_dir, *RUN, *ONE_DEVICE, "--gin.TRAIN_STEPS=10")
    shutil.rmtree(model_dir / "tensorboard")
    together(program, model_dir, 4, 2, *RUN)
    assert_same_losses(one_process, model_dir)


@pytest.mark.slow
def test_processes_of_different_configurations_are_refused_with_the_difference(
    program: Program, tmp_path: Path
) -> None:
    model_dir = tmp_path / "run"
    differing = {1: ["--gin.TrainConfig.seed=5"]}
    for process, (code, said) in enumerate(ends(start(program, model_dir, 2, 1, *ONE_DEVICE, differing=differing))):
        assert code == 2, said
        assert (
            f"switch-t5: process {process} of 2: The processes have different configurations; process 1 says:" in said
        )
        assert "TrainConfig.seed is 0 in process 0 and here 5 (set by --gin.TrainConfig.seed=5)." in said
        assert "Traceback" not in said
    assert not model_dir.exists()


@pytest.mark.slow
def test_a_coordinator_that_cannot_be_reached_is_one_sentence(program: Program, tmp_path: Path) -> None:
    address = free_address()
    settings = [f"coordinator_address={address}", "num_processes=2", "process_id=1", "initialization_timeout_seconds=3"]
    flags = [f"--gin.RuntimeConfig.{setting}" for setting in settings]
    done = program.run("train", tmp_path / "run", *flags, code=2)
    assert f"switch-t5: Process 0 could not be reached at {address} within 3 s" in done.stderr
    assert "is it running, was it started with this address" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
