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

declare -A flag=([chips]=4 [restarts]=100)
dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=yes ;;
    --name=* | --image=* | --accelerator=* | --topology=* | --hosts=* | --chips=* | --claim=* | --restarts=*)
      key=${1%%=*}
      flag[${key#--}]=${1#*=}
      ;;
    *) echo "gke_jobset.sh: there is no flag $1; the first lines of this script say which there are." >&2; exit 2 ;;
  esac
  shift
done
for key in name image accelerator topology hosts claim; do
  if [[ -z ${flag[$key]:-} ]]; then
    echo "gke_jobset.sh: --$key is missing; the first lines of this script say what it is." >&2
    exit 2
  fi
done
if (($# == 0)); then
  echo "gke_jobset.sh: a command of switch-t5 is missing, such as train." >&2
  exit 2
fi

words=''
for word in switch-t5 "$@" --gin.RuntimeConfig.find_processes=True; do
  # A single quote is doubled in YAML.
  words+="${words:+, }'${word//\'/\'\'}'"
done
jobset="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: ${flag[name]}
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
              cloud.google.com/gke-tpu-accelerator: ${flag[accelerator]}
              cloud.google.com/gke-tpu-topology: ${flag[topology]}
            containers:
            - name: switch-t5
              image: ${flag[image]}
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
                claimName: ${flag[claim]}"
if [[ -n $dry_run ]]; then
  echo "$jobset"
else
  kubectl apply -f - <<<"$jobset"
fi
