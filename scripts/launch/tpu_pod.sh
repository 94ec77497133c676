#!/usr/bin/env bash
# Runs switch-t5 on every worker of a Cloud TPU slice that is there already; JAX finds the workers by the slice's
# metadata.
#
#   scripts/launch/tpu_pod.sh --name=my-slice --zone=us-east5-a [--project=NAME] \
#     train --gin_file=runs/pretrain.gin --gin.MODEL_DIR=/mnt/shared/run
#
#   --name=NAME      the TPU VM
#   --zone=ZONE      where it is
#   --project=NAME   whose it is; unless given, gcloud's own
#   --dry-run        print the command instead
#
# switch-t5 must be installed on the workers (pip install 'switch-t5[tpu]'); SWITCH_T5 may name it there. MODEL_DIR must
# be a folder that all of them have mounted.
set -euo pipefail

name='' zone='' dry_run='' where=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=?*) where+=("$1") ;;
    --dry-run) dry_run=yes ;;
    --name | --zone | --project*) echo "tpu_pod.sh: write ${1%%=*}=VALUE, in one word." >&2; exit 2 ;;
    *) echo "tpu_pod.sh: there is no flag $1; the first lines of this script say which there are." >&2; exit 2 ;;
  esac
  shift
done
if [[ $name == -* ]]; then
  echo "tpu_pod.sh: --name is a TPU VM, and none is called $name." >&2
  exit 2
fi
if [[ -z $name || -z $zone ]]; then
  echo "tpu_pod.sh: --name and --zone say which slice to run on; one of them is missing." >&2
  exit 2
fi
if (($# == 0)); then
  echo "tpu_pod.sh: a command of switch-t5 is missing, such as train." >&2
  exit 2
fi

read -ra program <<<"${SWITCH_T5:-switch-t5}"
printf -v remote '%q ' "${program[@]}" "$@" --gin.RuntimeConfig.find_processes=True
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" ${where[@]+"${where[@]}"} --worker=all "--command=$remote")
if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
