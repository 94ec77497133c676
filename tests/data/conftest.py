"""Small corpora that the data tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 80 short documents of numbered words, 12 to 90 words long."""
    folder = tmp_path_factory.mktemp("corpus")
    for document in range(80):
        words = [f"w{document}x{word}" for word in range(12 + (document * 37) % 79)]
        (folder / f"{document:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder
