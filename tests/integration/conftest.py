"""Runs of the whole program, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TINY = Path(__file__).parent / "tiny.gin"


class Program:
    """``switch-t5`` on the tiny configuration."""

    def __init__(self, texts: Path, cache: Path) -> None:
        self.texts, self.cache = texts, cache

    def command(self, name: str, model_dir: Path, *flags: str) -> list[str]:
        """The words of a command."""
        settings = {"MODEL_DIR": model_dir, "TEXTS": self.texts, "RuntimeConfig.compilation_cache_dir": self.cache}
        bindings = [f"--gin.{key}={value}" for key, value in settings.items()]
        return [sys.executable, "-m", "switch_t5", name, f"--gin_file={TINY}", *bindings, *flags]

    def start(self, name: str, model_dir: Path, *flags: str) -> subprocess.Popen[str]:
        """Starts a command; its output is captured."""
        return self._start(self.command(name, model_dir, *flags))

    def begin(self, name: str, *flags: str) -> subprocess.Popen[str]:
        """Starts a command with no configuration but its flags."""
        return self._start([sys.executable, "-m", "switch_t5", name, *flags])

    def _start(self, words: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def run(self, name: str, model_dir: Path, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, and checks its exit code."""
        return self._run(self.command(name, model_dir, *flags), code)

    def call(self, name: str, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Runs a command with no configuration but its flags to its end, and checks its exit code."""
        return self._run([sys.executable, "-m", "switch_t5", name, *flags], code)

    def _run(self, words: list[str], code: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The program, with texts to train on and a cache that spares later starts the compilation."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(50)]
    for index in range(60):
        (folder / f"{index:02}.txt").write_text(" ".join(random.choice(words, 200)))
    return Program(folder, tmp_path_factory.mktemp("compiled"))
