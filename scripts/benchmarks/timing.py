"""What the benchmarks share: timing in turn, a process for each row, and the flags and files of results."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def times(
    functions: Mapping[str, Callable[[], None]],
    repeats: int,
    warm_up: int = 1,
    statistic: Callable[[Iterable[float]], float] = statistics.median,
) -> dict[str, tuple[float, float]]:
    """(Wall, CPU) seconds of each function, called in turn: medians, or another statistic; the first rounds warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(warm_up + repeats):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: tuple(statistic(column) for column in zip(*pairs[warm_up:], strict=True))  # pyright: ignore
        for name, pairs in seconds.items()
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has held, libraries and compiler included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def kept_memory_environment() -> dict[str, str]:
    """The variables with which a process keeps what it has freed, in large pages, whoever asks for memory in it."""
    tunables = "hugetlb=1", "mmap_max=0", f"trim_threshold={2**40}", "arena_max=1"
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{tunable}" for tunable in tunables)}


def in_process(script: str, *flags: str, python: str = sys.executable, variables: Mapping[str, str] = {}) -> Any:
    """Runs a script by itself and returns the JSON of its last line."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [python, script, *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def add_common_flags(parser: argparse.ArgumentParser, repeats: int) -> None:
    """``--repeats``, ``--quick`` and ``--json``."""
    parser.add_argument("--repeats", type=int, default=repeats, help="timed steps of each row")
    parser.add_argument("--quick", action="store_true", help="a few rows of three steps, to see that it runs")
    parser.add_argument("--json", help="where to write the rows; - is standard output")


def report(rows: list[dict[str, Any]], table: str, destination: str | None) -> None:
    """Prints the table and writes the rows; with ``-`` the rows alone are printed."""
    text = json.dumps(rows, indent=1)
    if destination == "-":
        print(text)
        return
    print(table)
    if destination:
        Path(destination).write_text(text + "\n")
