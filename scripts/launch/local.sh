#!/usr/bin/env bash
# Runs switch-t5 as several processes on this machine, which share the CPU:
#
#   scripts/launch/local.sh --processes=2 --devices=4 train --gin_file=runs/pretrain.gin --gin.MODEL_DIR=...
#
#   --processes=N   how many; 2 unless given
#   --devices=N     virtual CPU devices of each; unless given, what the configuration says
#   --port=N        of process 0, where the others find it; a free one unless given
#   --dry-run       print the commands instead
#
# SWITCH_T5 may name the program; it is the switch-t5 on PATH otherwise. Ctrl-C or SIGTERM stops all processes after one
# step. When one fails, the others get a minute to notice it, and the script ends with its exit code.
set -euo pipefail

processes=2 devices='' port='' dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --processes | --devices | --port) echo "local.sh: write $1=N, in one word." >&2; exit 2 ;;
    *) echo "local.sh: there is no flag $1; the first lines of this script say which there are." >&2; exit 2 ;;
  esac
  shift
done
for number in "$processes" "${devices:-1}" "${port:-1}"; do
  if ! [[ $number =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "local.sh: $number is not a number from 1 to 999999." >&2
    exit 2
  fi
done
if ((${port:-1} > 65535)); then
  echo "local.sh: --port is at most 65535, got $port." >&2
  exit 2
fi
if (($# == 0)); then
  echo "local.sh: a command of switch-t5 is missing, such as train." >&2
  exit 2
fi

read -ra program <<<"${SWITCH_T5:-switch-t5}"
# A port on which nobody answers is free.
while [[ -z $port ]]; do
  port=$((20000 + RANDOM % 10000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=''; fi
done
common=("--gin.RuntimeConfig.coordinator_address=127.0.0.1:$port" "--gin.RuntimeConfig.num_processes=$processes")
if [[ -n $devices ]]; then common+=("--gin.RuntimeConfig.num_cpu_devices=$devices"); fi

declare -A running=()
for ((id = 0; id < processes; id++)); do
  command=("${program[@]}" "$@" "${common[@]}" "--gin.RuntimeConfig.process_id=$id")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo '&'
  else
    "${command[@]}" &
    running[$!]=$id
  fi
done
if [[ -n $dry_run ]]; then exit 0; fi

stop() { kill -s "$1" "${!running[@]}" 2>/dev/null || true; }
trap 'stop TERM' TERM INT
code=0 watch=''
while ((${#running[@]})); do
  status=0
  wait -n -p ended "${!running[@]}" ${watch:+"$watch"} || status=$?
  if [[ -z ${ended:-} ]]; then continue; fi # A signal came, and was passed on.
  if [[ $ended == "$watch" ]]; then
    echo "local.sh: the other processes did not end within a minute, and are killed." >&2
    stop KILL
    watch=''
    continue
  fi
  if ((status && !code)); then
    code=$status
    if ((${#running[@]} > 1)); then
      echo "local.sh: process ${running[$ended]} ended with code $status; the others have a minute to end." >&2
      sleep 60 &
      watch=$!
    fi
  fi
  unset "running[$ended]"
done
if [[ -n $watch ]]; then kill "$watch" 2>/dev/null || true; fi
exit "$code"
