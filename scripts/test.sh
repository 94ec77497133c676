#!/usr/bin/env bash
# Runs the default test suite in an environment of its own, which the first run makes:
#
#   bash scripts/test.sh [pytest's arguments]      # --numprocesses=0 for one process, as a debugger wants
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment "$CHECKOUT/.venv-test" "[dev]"
cd "$CHECKOUT"
exec .venv-test/bin/python -m pytest --numprocesses=auto --dist=worksteal "$@"
