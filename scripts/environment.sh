# Virtual environments of pinned versions. To be sourced; needs nothing but Python and pip.

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Prints the path of the Python to use, or complains.
find_python() {
  local candidate path
  for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
    # By running it, for a name on PATH may be a shim with nothing behind it, or a Python without venv.
    if path=$("$candidate" -c '
import sys, ensurepip, venv
sys.exit("other version") if not (3, 11) <= sys.version_info[:2] < (3, 13) else print(sys.executable)' 2>/dev/null); then
      printf '%s\n' "$path"
      return
    fi
  done
  printf '%s\n' "${0##*/}: no Python 3.11 or 3.12 with venv was found as ${PYTHON:-python3.12, python3.11 or python3}; install one, or name one with PYTHON=/path/to/python." >&2
  return 2
}

# Prints what an environment's content follows from: Python, what is asked for, and the lock.
_fingerprint() { # PYTHON LOCK WHAT
  "$1" -VV
  printf '%s %s\n' "$CHECKOUT" "$3"
  cat "$2" "$CHECKOUT/pyproject.toml" "$CHECKOUT/setup.py"
}

# Makes the environment FOLDER with the package, editable, and its EXTRAS (such as "[dev]"), or reuses it as it is
# when nothing that it follows from has changed.
make_environment() { # FOLDER [EXTRAS]
  local folder=$1 what=".${2:-}" python version lock stamp
  python=$(find_python) || return
  version=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
  lock="$CHECKOUT/requirements/py$version.txt"
  if [[ -e $folder && ! -e $folder/.made-by-switch-t5 ]]; then
    printf '%s\n' "${0##*/}: $folder is there and is not an environment of this script; move it away." >&2
    return 2
  fi
  stamp=$(_fingerprint "$python" "$lock" "$what")
  if [[ -e $folder/.made-by-switch-t5 && $(<"$folder/.made-by-switch-t5") == "$stamp" ]] && "$folder/bin/python" -c ''; then
    return
  fi
  printf '%s\n' "Installing what requirements/py$version.txt pins into $folder; the first time takes a few minutes." >&2
  mkdir -p "$folder"
  : >"$folder/.made-by-switch-t5"
  # --clear empties the folder; until the mark is back and whole, the environment counts as unfinished.
  "$python" -m venv --clear "$folder"
  : >"$folder/.made-by-switch-t5"
  pip_install "$folder" --constraint "$lock" --editable "$CHECKOUT${2:-}"
  printf '%s\n' "$stamp" >"$folder/.made-by-switch-t5"
}

# Runs `pip install` in an environment so that nothing is compiled: wheels only, but for `promise`, which
# tensorflow-datasets needs and which is published as pure Python source.
pip_install() { # FOLDER ARGUMENTS...
  local folder=$1
  shift
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: --no-binary promise "$@"
}
