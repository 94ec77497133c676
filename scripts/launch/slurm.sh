#!/usr/bin/env bash
# Submits switch-t5 as a SLURM job: a process for each accelerator, or for each node of CPUs. JAX finds the processes in
# SLURM's own variables.
#
#   scripts/launch/slurm.sh --nodes=4 --gpus=8 [--time=24:00:00] [--partition=NAME] \
#     train --gin_file=runs/pretrain.gin --gin.MODEL_DIR=/shared/run
#
#   --nodes=N        nodes; 1 unless given
#   --gpus=N         GPUs of a node; 0, unless given, is one process a node on its CPUs
#   --time=, --partition=, --account=   handed to sbatch
#   --dry-run        print the job's script and sbatch's command instead
#
# SWITCH_T5 may name the program; it is the switch-t5 on PATH otherwise. MODEL_DIR must be a folder that all nodes share.
# SLURM warns the run with SIGTERM two minutes before its time is up; it saves, and the same command goes on from there.
set -euo pipefail

nodes=1 gpus=0 dry_run='' job=()
while [[ ${1:-} == --* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=?* | --partition=?* | --account=?*) job+=("$1") ;;
    --dry-run) dry_run=yes ;;
    --nodes | --gpus | --time* | --partition* | --account*)
      echo "slurm.sh: write ${1%%=*}=VALUE, in one word." >&2
      exit 2
      ;;
    *) echo "slurm.sh: there is no flag $1; the first lines of this script say which there are." >&2; exit 2 ;;
  esac
  shift
done
if ! [[ $nodes =~ ^[1-9][0-9]{0,5}$ && $gpus =~ ^(0|[1-9][0-9]{0,5})$ ]]; then
  echo "slurm.sh: --nodes and --gpus are numbers, got $nodes and $gpus." >&2
  exit 2
fi
if (($# == 0)); then
  echo "slurm.sh: a command of switch-t5 is missing, such as train." >&2
  exit 2
fi

job+=("--job-name=switch-t5" "--nodes=$nodes" "--ntasks-per-node=$((gpus ? gpus : 1))" "--signal=TERM@120")
# The processes of a node share its GPUs, each by its local number.
if ((gpus)); then job+=("--gpus-per-node=$gpus"); fi
read -ra program <<<"${SWITCH_T5:-switch-t5}"
# When one task fails the step ends, whatever the others do; SIGTERM reaches the program itself and not this shell.
printf -v run '%q ' srun --kill-on-bad-exit=1 "${program[@]}" "$@" --gin.RuntimeConfig.find_processes=True
script="#!/usr/bin/env bash
exec $run"

if [[ -n $dry_run ]]; then
  printf '%q ' sbatch "${job[@]}"
  printf '<<END\n%s\nEND\n' "$script"
else
  sbatch "${job[@]}" <<<"$script"
fi
