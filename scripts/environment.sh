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

# Prints a digest of all that an environment follows from: Python, the pinned versions and what is asked for.
_digest() { # PYTHON LOCK EXTRAS
  { "$1" -VV && printf '%s %s\n' "$CHECKOUT" "$3" && cat "$2" "$CHECKOUT/pyproject.toml" "$CHECKOUT/setup.py"; } |
    "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# Makes the environment FOLDER with the package, editable, and its EXTRAS (such as "[dev]"), or reuses it where
# nothing that it follows from has changed.
make_environment() { # FOLDER [EXTRAS]
  local folder=$1 extras=${2:-} mark=$1/.made-by-switch-t5 python lock digest
  python=$(find_python) || return
  lock=$CHECKOUT/requirements/$("$python" -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])')
  digest=$(_digest "$python" "$lock" "$extras")
  if [[ -e $folder && ! -e $mark ]]; then
    printf '%s\n' "${0##*/}: $folder was not made by this script; move it away, and run this again." >&2
    return 2
  fi
  if [[ -e $mark && $(<"$mark") == "$digest" ]] && "$folder/bin/python" -c ''; then
    return
  fi
  printf '%s\n' "Installing the versions of requirements/${lock##*/} into $folder; the first time takes a few minutes." >&2
  if [[ -e $folder ]]; then
    mv "$folder" "$folder.old.$$"
    rm -rf "$folder.old.$$"
  fi
  mkdir "$folder"
  : >"$mark"
  "$python" -m venv "$folder"
  pip_install "$folder" --constraint "$lock" --editable "$CHECKOUT$extras"
  printf '%s\n' "$digest" >"$mark"  # Last: an interrupted installation is begun anew.
}

# Runs `pip install` in an environment so that nothing is compiled: wheels only, but for `promise`, which
# tensorflow-datasets needs and which is published as pure Python source.
pip_install() { # FOLDER ARGUMENTS...
  local folder=$1
  shift
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: --no-binary promise "$@"
}
