"""The program starts itself anew with malloc's tunables, once, and leaves a user's own alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from switch_t5.cli import main as program
from switch_t5.cli.allocator import large_page_environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's tunables")

CHILD = """
import os, sys
from switch_t5.cli.allocator import restart_with_large_pages
restart_with_large_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""))
"""


def run_child(**variables: str) -> tuple[int, str]:
    """The child's process number as its parent knows it, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    command = [sys.executable, "-c", CHILD, "a word", "--gin.X=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, **variables}) as child:
        return child.pid, child.communicate(timeout=60)[0]


def test_the_same_process_runs_the_same_words_with_large_pages() -> None:
    pid, output = run_child()
    assert output.startswith(f"{pid} ['a word', '--gin.X=1'] ")
    assert "glibc.malloc.hugetlb=1" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("variables", [{"GLIBC_TUNABLES": "glibc.malloc.check=0"}, {"MALLOC_ARENA_MAX": "1"}])
def test_what_the_user_has_tuned_is_left_alone(variables: dict[str, str]) -> None:
    _, output = run_child(**variables)
    assert output.strip().endswith(variables.get("GLIBC_TUNABLES", "]"))


@pytest.mark.parametrize(("words", "restarts"), [(["train"], 1), (["data", "list"], 0), (["--help"], 0), ([], 0)])
def test_only_commands_that_run_a_model_start_anew(
    words: list[str], restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(sys, "argv", ["switch-t5", *words])
    monkeypatch.setattr(program, "restart_with_large_pages", lambda: calls.append(words))
    monkeypatch.setattr(program, "main", lambda: 0)
    assert program.program() == 0
    assert len(calls) == restarts


def test_the_environment_asks_for_kept_memory_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("GLIBC_", "MALLOC_"))]:
        monkeypatch.delenv(name)
    (value,) = large_page_environment().values()
    assert {setting.split("=")[0] for setting in value.split(":")} == {
        "glibc.malloc.hugetlb",
        "glibc.malloc.mmap_threshold",
        "glibc.malloc.trim_threshold",
        "glibc.malloc.arena_max",
    }
