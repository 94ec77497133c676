#!/usr/bin/env bash
# Trains a small Switch Transformer on the embedded corpus and shows what it learned.
#
#   bash scripts/quickstart.sh [FOLDER]     FOLDER is where the run's files go, ./quickstart unless given
#
# Run it again to go on from where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

folder=${1:-quickstart}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
make_environment "$CHECKOUT/.venv"
export PATH="$CHECKOUT/.venv/bin:$PATH"

show_and_run() {
  echo
  echo "\$ $*"
  "$@"
}

if ! mkdir -p "$folder"; then
  printf '%s\n' "quickstart.sh: $folder cannot be made; name a folder that can be." >&2
  exit 2
fi
show_and_run switch-t5 data vocabulary --input=sotu --size=2048 --output="$folder/sotu.model" --reuse
show_and_run switch-t5 train --gin_file=runs/quickstart.gin --gin.MODEL_DIR="$folder/run" \
  --gin.VOCABULARY_PATH="$folder/sotu.model"
show_and_run switch-t5 eval --gin_file="$folder/run/config.gin"
show_and_run switch-t5 infer --gin_file="$folder/run/config.gin" --count=3
cat <<END

The run's files are in $folder/run: config.gin, metrics.jsonl, checkpoints, tensorboard. What to do next, after
  source $CHECKOUT/.venv/bin/activate

  train for longer     switch-t5 train --gin_file=runs/quickstart.gin --gin.MODEL_DIR=$folder/run \\
                         --gin.VOCABULARY_PATH=$folder/sotu.model --gin.TRAIN_STEPS=10000
  fill in your words   switch-t5 infer --gin_file=$folder/run/config.gin --text="The President of the ___ States."
  your own text        see "Your own text" in README.md
END
