"""What happens to files and disks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def flip(path: Path, at: int | None = None, bits: int = 1 << 3) -> None:
    """Flips bits of one byte of a file: of that at ``at``, or of the middle one."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= bits
    path.write_bytes(content)


def halve(path: Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def on_a_disk(options: str, folder: Path) -> list[str]:
    """What a command must begin with to find a disk of its own at a folder: permissions are nothing to root.

    Args:
      options: of the mount, such as ``"size=3m"``; nobody else sees it.
      folder: where it is mounted.
    """
    mount = f'mount -t tmpfs -o {options} tmpfs "{folder}" && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("mounting a disk needs user namespaces")
    return prefix
