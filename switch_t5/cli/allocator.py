"""Large pages for the arrays of the CPU.

A training step takes and returns gigabytes, in arrays that the system makes of 4 KB pages, cleared one fault at a time
and found again through too small a table of addresses: about a fifth of a step on two cores went there
(``scripts/benchmarks/train_step.py`` with and without ``--large_pages``). glibc asks for large pages if a tunable
says so when a process starts, so a program that wants them starts itself anew.
"""

from __future__ import annotations

import contextlib
import os
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_MARK = "SWITCH_T5_STARTED_ANEW"
_FIRST_GLIBC = (2, 35)


def large_page_environment() -> dict[str, str]:
    """The variables that ask for large pages: what the user has set, and the tunable.

    Returns:
      Nothing where there is no glibc that knows it, or where the user has set it (``=0`` turns large pages off).
    """
    tunables = os.environ.get(_VARIABLE, "")
    if not _has_glibc() or _TUNABLE in tunables:
        return {}
    return {_VARIABLE: ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))}


def restart_with_large_pages() -> None:
    """Replaces this process by the same program with large pages; returns where it has nothing to change.

    The process keeps its number, by which it knows that it is the second start: a launcher that drops the variable
    leaves it without large pages, never in a loop.
    """
    environment = large_page_environment()
    if not environment or not sys.executable or os.environ.get(_MARK) == str(os.getpid()):
        return
    with contextlib.suppress(OSError):  # Slower is better than not at all.
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment, _MARK: str(os.getpid())})


def _has_glibc() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_GLIBC
    except (AttributeError, OSError, ValueError):  # Another system, or another C library.
        return False
