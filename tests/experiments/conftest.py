"""The flag that writes the loss curves anew."""

from __future__ import annotations

import pytest

REGENERATE = "--regenerate-curves"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the flag."""
    parser.addoption(REGENERATE, action="store_true", help="write tests/goldens/curves instead of comparing")


@pytest.fixture(scope="session")
def regenerate(request: pytest.FixtureRequest) -> bool:
    """Whether curves are written instead of compared."""
    # The flag is known only where pytest was started on this folder.
    return bool(request.config.getoption(REGENERATE, default=False))
