"""What a run shows and keeps: metrics.jsonl, TensorBoard, the progress line; and how it is stopped."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from switch_t5.errors import UserError
from switch_t5.training.graceful_stop import GracefulStop
from switch_t5.training.metrics_file import MetricsFile
from switch_t5.training.progress import Progress, Speedometer
from switch_t5.training.tensorboard import TensorBoard

# --- metrics.jsonl


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_an_entry_is_one_line_with_the_step_first_and_keys_in_their_order(path):
    with MetricsFile(path, None) as metrics:
        metrics.write(2, {"task": "c4", "loss": 0.1, "accuracy": 1, "b": 1e-45, "a": -0.0})
        metrics.write(4, {"loss": 2.0})
    assert path.read_text() == (
        '{"step": 2, "task": "c4", "loss": 0.1, "accuracy": 1, "b": 1e-45, "a": -0.0}\n{"step": 4, "loss": 2.0}\n'
    )


@pytest.mark.parametrize(
    "value", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, np.float32(0.1), jnp.float32(0.1), np.float64(1 / 3)]
)
def test_a_float_is_read_back_exactly(path, value):
    with MetricsFile(path, None) as metrics:
        metrics.write(1, {"x": value})
    assert json.loads(path.read_text())["x"] == float(value)


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (jnp.float32(-jnp.inf), "-inf")])
def test_what_json_lacks_is_a_string_that_float_takes(path, value, text):
    with MetricsFile(path, None) as metrics:
        metrics.write(1, {"x": value})
    assert path.read_text() == f'{{"step": 1, "x": "{text}"}}\n'
    assert repr(float(text)) == repr(float(value))


ENTRIES = [
    b'{"step": 0, "x": 1}\n',
    b'{"step": 5, "x": 2}\n',
    b'{"step": 5, "task": "t"}\n',
    b'{"step": 9}\n',
]


@pytest.mark.parametrize(("resume_step", "kept"), [(None, 0), (0, 1), (4, 1), (5, 3), (8, 3), (9, 4), (1000, 4)])
def test_a_restart_takes_back_the_entries_after_its_step(path, resume_step, kept):
    path.write_bytes(b"".join(ENTRIES))
    with MetricsFile(path, resume_step) as metrics:
        metrics.write(10, {})
    assert path.read_bytes() == b"".join(ENTRIES[:kept]) + b'{"step": 10}\n'
    assert os.listdir(path.parent) == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b"{", b'{"step": 3, "x": 0.12', b'{"step": 3}'])
def test_a_line_that_a_kill_cut_short_is_dropped(path, torn):
    path.write_bytes(ENTRIES[0] + torn)
    with MetricsFile(path, 100) as metrics:
        metrics.write(3, {})
    assert path.read_bytes() == ENTRIES[0] + b'{"step": 3}\n'


def test_a_file_with_nothing_to_take_back_is_left_alone(path):
    path.write_bytes(b"".join(ENTRIES))
    before = path.stat().st_ino
    MetricsFile(path, 9).close()
    assert (path.stat().st_ino, path.read_bytes()) == (before, b"".join(ENTRIES))


@pytest.mark.parametrize("line", [b"loss 3\n", b"{}\n", b'{"step": "1"}\n', b"[1]\n"])
def test_a_line_that_is_no_entry_is_named(path, line):
    path.write_bytes(ENTRIES[0] + line + ENTRIES[1])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not an entry"):
        MetricsFile(path, 9)
    assert path.read_bytes() == ENTRIES[0] + line + ENTRIES[1]


def test_an_entry_outlives_a_kill(path):
    code = (
        "import os, sys; from switch_t5.training.metrics_file import MetricsFile\n"
        "metrics = MetricsFile(sys.argv[1], None); metrics.write(1, {'loss': 0.5})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b'{"step": 1, "loss": 0.5}\n'


def test_metrics_on_a_full_disk_are_one_sentence(path):
    path.symlink_to("/dev/full")
    with MetricsFile(path, None) as metrics, pytest.raises(UserError) as caught:
        metrics.write(1, {"loss": 0.5})
    assert str(caught.value) == f"Writing {path} failed (No space left on device): make room there."


def test_a_synced_file_has_its_entries(path):
    with MetricsFile(path, None) as metrics:
        metrics.write(1, {})
        metrics.sync()
        assert path.read_bytes() == b'{"step": 1}\n'


def test_processes_that_do_not_write_touch_nothing(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", None, active=False) as metrics:
        metrics.write(1, {"loss": 0.5})
        metrics.sync()
    with TensorBoard(tmp_path / "board", None, active=False) as board:
        board.scalars(1, {"loss": 0.5})
        board.expert_loads(1, {"layer": [1, 2]})
    stream = io.StringIO()
    with Progress(10, stream=stream, active=False) as progress:
        progress.log(1, 0.5, 0.0, math.nan)
    assert (list(tmp_path.iterdir()), stream.getvalue()) == ([], "")


# --- TensorBoard


def _events(directory: Path) -> list:
    """All events of the files in a folder, oldest first, read by the format: length, check, event, check."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    events = []
    for file in directory.iterdir():
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return sorted(events, key=lambda event: event.wall_time)


def test_scalars_are_points_of_named_curves(tmp_path):
    with TensorBoard(tmp_path, None) as board:
        board.scalars(3, {"loss": 0.5, "task": "text", "accuracy": jnp.float32(0.25)}, prefix="train")
        board.scalars(4, {"tokens_per_second": 1000})
        points = [
            (event.step, {value.tag: value.simple_value for value in event.summary.value})
            for event in _events(tmp_path)
            if event.HasField("summary")
        ]  # Read while the file is open: each event is written through.
    assert points == [
        (3, {"train/loss": 0.5, "train/accuracy": 0.25}),
        (4, {"tokens_per_second": 1000.0}),
    ]


def test_expert_loads_are_one_bar_an_expert(tmp_path):
    with TensorBoard(tmp_path, None) as board:
        board.expert_loads(7, {"encoder/1": np.array([0, 30, 10, 2]), "decoder/1": [0.0, 0.0]})
    (event,) = (event for event in _events(tmp_path) if event.HasField("summary"))
    first, second = event.summary.value
    assert (event.step, first.tag, second.tag) == (7, "expert_load/encoder/1", "expert_load/decoder/1")
    assert list(first.histo.bucket_limit) == [-0.5, 0.5, 1.5, 2.5, 3.5]
    assert list(first.histo.bucket) == [0, 0, 30, 10, 2]
    assert (first.histo.min, first.histo.max, first.histo.num) == (0.5, 3.5, 42)
    assert (first.histo.sum, first.histo.sum_squares) == (30 + 20 + 6, 30 + 40 + 18)
    assert (second.histo.min, second.histo.max, second.histo.num) == (-0.5, 1.5, 0)


def test_a_restart_hides_the_points_after_its_step(tmp_path):
    for resume_step in (None, 10):
        TensorBoard(tmp_path, resume_step).close()
    starts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 11]


def test_a_board_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^The TensorBoard folder .*/file/board cannot be written"):
        TensorBoard(tmp_path / "file" / "board", None)


def test_tensorboard_needs_no_tensorflow():
    code = (
        "import sys, tempfile; from switch_t5.training.tensorboard import TensorBoard\n"
        "with TensorBoard(tempfile.mkdtemp(), None) as board: board.scalars(1, {'x': 1.0})\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- The progress line


class _Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_that_since_the_last_log_and_the_time_left_that_of_the_whole_run():
    clock = _Clock()
    speed = Speedometer(tokens_per_step=1000, total_steps=110, clock=clock)
    assert (speed.tokens_per_second(10), math.isnan(speed.seconds_left(10))) == (0.0, True)
    speed.start(10)
    assert (speed.tokens_per_second(10), math.isnan(speed.seconds_left(10))) == (0.0, True)
    clock.now += 5
    assert (speed.tokens_per_second(20), speed.seconds_left(20)) == (2000.0, 45.0)
    clock.now += 2.5
    assert (speed.tokens_per_second(30), speed.seconds_left(30)) == (4000.0, 30.0)


def test_a_pause_is_left_out_of_the_speed_but_not_of_the_time_left():
    clock = _Clock()
    speed = Speedometer(tokens_per_step=1000, total_steps=20, clock=clock)
    speed.start(0)
    clock.now += 5
    with speed.paused():
        clock.now += 15
    assert (speed.tokens_per_second(10), speed.seconds_left(10)) == (2000.0, 20.0)
    clock.now += 5
    assert speed.tokens_per_second(20) == 2000.0


def test_without_a_terminal_each_log_is_a_plain_line():
    stream = io.StringIO()
    with Progress(1000, first_step=100, stream=stream) as progress:
        progress.advance(101)
        progress.log(200, 5.43216, 0.0, math.nan)
        progress.message("evaluated [c4]")
        progress.log(300, 4.0, 12345.6, 3725.2)
    assert stream.getvalue() == (
        "step 200/1000  loss 5.4322  - tokens/s  - left\n"
        "evaluated [c4]\n"
        "step 300/1000  loss 4.0000  12,346 tokens/s  1:02:05 left\n"
    )


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_redrawn(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = _Terminal()
    with Progress(1000, first_step=100, stream=stream) as progress:
        progress.log(200, 5.4321, 12345.0, 60.0)
        progress.message("evaluated [c4]")
        progress.advance(201)
    shown = stream.getvalue()
    assert "evaluated [c4]" in shown
    assert "step 201/1000" in shown
    assert "loss 5.4321  12,345 tokens/s  0:01:00 left" in shown
    assert "\x1b[2K" in shown  # The line is erased and drawn again.


# --- Stopping


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_for_a_stop_and_nothing_more(number, exit_code, capfd):
    with GracefulStop() as stop:
        assert (stop.requested, stop.exit_code) == (False, 0)
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.exit_code) == (True, exit_code)
    assert "Finishing this step, then saving" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once():
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_code == 130


def test_a_second_sigterm_waits_like_the_first():
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.exit_code == 143


def test_the_handlers_before_come_back():
    before = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    with GracefulStop():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_is_changed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with GracefulStop() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
