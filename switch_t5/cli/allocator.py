"""Large pages for the arrays of the CPU.

A training step takes and returns gigabytes. By default glibc gives each large array back to the system at once, and
the next one is made of 4 KB pages that are cleared one fault at a time: up to a quarter of a step on two cores went
there (``scripts/benchmarks/train_step.py`` with and without ``--large_pages``). glibc reads its tunables when a
process starts, so a program that wants others starts itself anew.
"""

from __future__ import annotations

import os
import sys

_TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # Ask for transparent huge pages; needs glibc 2.35, older ones ignore it.
    "glibc.malloc.mmap_threshold": 1 << 40,  # Arrays below this many bytes come from memory that is kept,
    "glibc.malloc.trim_threshold": 1 << 40,  # of which so much may lie idle until the next step.
    "glibc.malloc.arena_max": 1,  # Other threads' arenas are too small for a large array, and would map it anew.
}
_VARIABLE = "GLIBC_TUNABLES"


def large_page_environment() -> dict[str, str]:
    """The environment variables that ask for large pages; none where the user has tuned malloc, or has no glibc."""
    tuned = any(name == _VARIABLE or name.startswith("MALLOC_") for name in os.environ)
    if tuned or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}):
        return {}
    return {_VARIABLE: ":".join(f"{name}={value}" for name, value in _TUNABLES.items())}


def restart_with_large_pages() -> None:
    """Replaces this process by the same program with large pages; returns where it has nothing to change."""
    environment = large_page_environment()
    if environment:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **environment})
