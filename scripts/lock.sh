#!/usr/bin/env bash
# Writes requirements/pyXY.txt anew: the newest versions that pyproject.toml allows.
#
#   PYTHON=python3.11 bash scripts/lock.sh && PYTHON=python3.12 bash scripts/lock.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python=$(find_python)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
pip_install "$folder/venv" --editable "$CHECKOUT[dev]"
lock="$CHECKOUT/requirements/py$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])').txt"
{
  printf '# Versions that scripts/ install; written by scripts/lock.sh.\n'
  "$folder/venv/bin/python" -m pip freeze --exclude-editable
} >"$lock.new"
mv "$lock.new" "$lock"
printf '%s\n' "Wrote $lock."
