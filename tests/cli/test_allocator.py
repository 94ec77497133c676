"""The program starts itself anew with large pages, once, and leaves alone what a user has set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from switch_t5.cli import allocator
from switch_t5.cli import main as program
from switch_t5.cli.allocator import large_page_environment, restart_with_large_pages

pytestmark = pytest.mark.skipif(not allocator._has_glibc(), reason="needs a glibc that knows large pages")

CHILD = """
import os, sys
from switch_t5.cli.allocator import restart_with_large_pages
restart_with_large_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""))
"""


def run_child(python: str = sys.executable, **variables: str) -> tuple[int, str]:
    """The child's process number as its parent knows it, and what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [python, "-c", CHILD, "a word", "--gin.X=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, **variables}) as child:
        return child.pid, child.communicate(timeout=60)[0]


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("SWITCH_T5_STARTED_ANEW", raising=False)
    return monkeypatch


def test_the_same_process_runs_the_same_words_with_large_pages() -> None:
    pid, output = run_child()
    assert output == f"{pid} ['a word', '--gin.X=1'] glibc.malloc.hugetlb=1\n"


def test_other_tunables_are_kept_and_the_users_own_choice_is_final() -> None:
    assert run_child(GLIBC_TUNABLES="glibc.malloc.check=0")[1].endswith(
        " glibc.malloc.check=0:glibc.malloc.hugetlb=1\n"
    )
    assert run_child(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[1].endswith(" glibc.malloc.hugetlb=0\n")


def test_a_launcher_that_drops_the_variable_is_started_twice_and_no_more(tmp_path: Path) -> None:
    launcher = tmp_path / "python"
    launcher.write_text(f'#!/bin/sh\nunset GLIBC_TUNABLES\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    starts = tmp_path / "starts"
    child = CHILD.replace("import os, sys", f"import os, sys\nopen({str(starts)!r}, 'a').write('x')\n").replace(
        "restart_with_large_pages()", f"sys.executable = {str(launcher)!r}\nrestart_with_large_pages()"
    )
    done = subprocess.run([str(launcher), "-c", child], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[] \n")
    assert starts.read_text() == "xx"


def test_a_restart_that_the_system_refuses_is_done_without(untuned: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(*_: object) -> None:
        tried.append(1)
        raise PermissionError

    untuned.setattr(os, "execve", refuse)
    restart_with_large_pages()
    assert tried


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2.5", "", None])
def test_other_c_libraries_are_left_alone(version: str | None, untuned: pytest.MonkeyPatch) -> None:
    assert large_page_environment() == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    untuned.setattr(os, "confstr", lambda _: version)
    assert large_page_environment() == {}


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
