#!/bin/bash
# Training on SLURM with one torchrun per machine.
#
#   DATA=/photos OUT=/runs/vitl14 sbatch deploy/training/slurm.sh [key=value ...]
#
# Adapt the number of nodes and GPUs and the time limit. Five minutes before the time limit, SLURM sends SIGTERM to this
# script, which passes it on. The run then saves its state and exits, and the script requeues the job. An error ends the
# job. If a check of the run stops it, for example because the features collapse, the job ends with status 3.
#SBATCH --job-name=dinov2-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
set -euo pipefail

DATA=${DATA:?set DATA to the images, tar shards or data set to train on}
OUT=${OUT:?set OUT to the folder of the run, on a file system that all machines share}
RECIPE=${RECIPE:-vitl14}

run= stopped=
trap 'stopped=yes; ${run:+kill -TERM "$run"}' TERM
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29400" --rdzv-id="$SLURM_JOB_ID" \
  -m training --data "$DATA" --out "$OUT" --recipe "$RECIPE" "$@" &
run=$!
status=0
wait "$run" || status=$?
if [ "$stopped" ]; then
  wait "$run" || true  # the signal ended the first wait
fi
if [ -e "$OUT/stopped.json" ]; then  # torchrun does not pass on the status of its processes
  exit 3
fi
if [ "$stopped" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
