"""The gin files under test, loaded once, and the golden files beside them."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from switch_t5.cli.config_files import packaged_configs
from switch_t5.cli.configuration import Configuration
from switch_t5.model.config import TransformerConfig
from switch_t5.model.functional import Model

CONFIGS = packaged_configs()
GOLDENS = Path(__file__).parents[1] / "goldens" / "configs"
REGENERATE = "--regenerate-goldens"
MOST_LINES = 60
"""Of a difference, before it is cut."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the flag that writes the goldens anew."""
    parser.addoption(REGENERATE, action="store_true", help="write tests/goldens/configs instead of comparing")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Calls a test that takes ``model_name`` with each file of configs/models."""
    if "model_name" in metafunc.fixturenames:
        metafunc.parametrize("model_name", sorted(path.stem for path in (CONFIGS / "models").glob("*.gin")))


class Goldens:
    """Texts that were looked at and kept.

    Args:
      folder: where they are.
      regenerate: writes them instead of comparing.
    """

    def __init__(self, folder: Path, *, regenerate: bool) -> None:
        self.folder = folder
        self.regenerate = regenerate

    def check(self, name: str, text: str) -> None:
        """Fails with what is different where ``text`` is not the golden called ``name``."""
        path = self.folder / name
        if self.regenerate:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        how = f"If the change is meant, `python -m pytest tests/configs {REGENERATE}` writes the goldens anew."
        if not path.is_file():
            pytest.fail(f"There is no golden {name}. {how}", pytrace=False)
        stored = path.read_text(encoding="utf-8").splitlines()
        lines = list(difflib.unified_diff(stored, text.splitlines(), "golden", "now", n=0, lineterm=""))
        if lines:
            shown = list(itertools.islice(lines, MOST_LINES))
            rest = [f"and {len(lines) - len(shown)} more lines"] if len(lines) > len(shown) else []
            pytest.fail("\n".join([f"{name} is not what its golden says. {how}", *shown, *rest]), pytrace=False)

    def names(self) -> set[str]:
        """All goldens, relative to the folder."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix() for path in files}


@pytest.fixture
def goldens(request: pytest.FixtureRequest) -> Goldens:
    """The goldens of the gin files."""
    # The flag is known only where pytest was started on this folder.
    return Goldens(GOLDENS, regenerate=bool(request.config.getoption(REGENERATE, default=False)))


@pytest.fixture(scope="session")
def load() -> Callable[..., Configuration]:
    """Loads gin files, named as for ``--gin_file``, and bindings, given as for ``--gin.NAME=VALUE``."""

    def load(*gin_files: str, bindings: tuple[str, ...] = ()) -> Configuration:
        return Configuration.load([str(CONFIGS / name) for name in gin_files], bindings)

    return load


@pytest.fixture(scope="session")
def transformer(load: Callable[..., Configuration]) -> Callable[[str], TransformerConfig]:
    """Builds the TransformerConfig of a file of configs/models."""
    return functools.cache(lambda name: load(f"models/{name}.gin").get("TransformerConfig"))


@pytest.fixture(scope="session")
def model(transformer: Callable[[str], TransformerConfig]) -> Callable[[str], Model]:
    """Builds the model of a file of configs/models, by shapes alone."""
    return functools.cache(lambda name: Model(transformer(name)))
