#!/usr/bin/env bash
# Runs switch-t5 on a TPU slice of a GKE cluster, as a JobSet: a pod a host, which JAX finds by GKE's own variables. A
# host that fails or is taken away restarts them all, and the run goes on from its last checkpoint.
#
#   scripts/launch/gke_jobset.sh --name=run-1 --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x8 --hosts=32 \
#     --claim=shared-disk train --gin_file=runs/pretrain.gin --gin.MODEL_DIR=/shared/run
#
#   --name=NAME          of the JobSet
#   --image=IMAGE        a container image with switch-t5[tpu]
#   --accelerator=TYPE   as the node pool's label cloud.google.com/gke-tpu-accelerator has it
#   --topology=AxBxC     as its label cloud.google.com/gke-tpu-topology has it
#   --hosts=N            the slice's hosts
#   --chips=N            TPU chips of a host; 4 unless given
#   --claim=NAME         a volume claim that all hosts may write, mounted at /shared
#   --restarts=N         how often a failed slice is started anew; 100 unless given
#   --dry-run            print the JobSet instead
set -euo pipefail

refuse() {
  echo "gke_jobset.sh: $*" >&2
  exit 2
}

declare -A flag=([chips]=4 [restarts]=100)
dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --name=* | --image=* | --accelerator=* | --topology=* | --hosts=* | --chips=* | --claim=* | --restarts=*)
      key=${1%%=*}
      flag[${key#--}]=${1#*=}
      ;;
    --name | --image | --accelerator | --topology | --hosts | --chips | --claim | --restarts)
      refuse "write $1=VALUE, in one word."
      ;;
    *) refuse "there is no flag $1; the first lines of this script say which there are." ;;
  esac
  shift
done
for key in name image accelerator topology hosts claim; do
  if [[ -z ${flag[$key]:-} ]]; then
    refuse "--$key is missing; the first lines of this script say what it is."
  fi
done
for key in hosts chips; do
  [[ ${flag[$key]} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "--$key is a number of 1 or more, got ${flag[$key]}."
done
[[ ${flag[restarts]} =~ ^(0|[1-9][0-9]{0,5})$ ]] || refuse "--restarts is a number, got ${flag[restarts]}."
[[ ${flag[topology]} =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] ||
  refuse "--topology is such as 4x4x8, got ${flag[topology]}."
if ((${flag[topology]//x/*} != flag[hosts] * flag[chips])); then
  refuse "a slice of ${flag[topology]} has $((${flag[topology]//x/*})) chips, which ${flag[hosts]} hosts" \
    "of ${flag[chips]} do not add up to; set --hosts or --chips."
fi
for key in name claim; do
  [[ ${flag[$key]} =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] ||
    refuse "--$key is a name of small letters, digits and hyphens, got ${flag[$key]}."
done
for key in image accelerator; do
  [[ ${flag[$key]} =~ ^[A-Za-z0-9][A-Za-z0-9._:/@-]*$ ]] || refuse "--$key is a name without spaces, got ${flag[$key]}."
done
if (($# == 0)); then
  refuse "a command of switch-t5 is missing, such as train."
fi

words=''
for word in switch-t5 "$@" --gin.RuntimeConfig.find_processes=True; do
  # A single quote is doubled in YAML.
  words+="${words:+, }'${word//\'/\'\'}'"
done
jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: '${flag[name]}'
spec:
  failurePolicy:
    maxRestarts: ${flag[restarts]}
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: ${flag[hosts]}
        completions: ${flag[hosts]}
        backoffLimit: 0
        template:
          metadata:
            annotations:
              alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: '${flag[accelerator]}'
              cloud.google.com/gke-tpu-topology: '${flag[topology]}'
            containers:
            - name: switch-t5
              image: '${flag[image]}'
              command: [$words]
              resources:
                limits:
                  google.com/tpu: ${flag[chips]}
              volumeMounts:
              - name: shared
                mountPath: /shared
            volumes:
            - name: shared
              persistentVolumeClaim:
                claimName: '${flag[claim]}'"
if [[ -n $dry_run ]]; then
  echo "$jobset"
else
  kubectl apply -f - <<<"$jobset"
fi
