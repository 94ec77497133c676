"""``python -m switch_t5``: the same program as ``switch-t5``."""

from __future__ import annotations

import sys

from switch_t5.cli.main import program

if __name__ == "__main__":
    sys.exit(program())
