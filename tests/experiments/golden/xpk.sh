#!/usr/bin/env bash
# bash this-file: runs on a GKE cluster that `xpk cluster create` made.
set -euo pipefail
xpk workload create \
  --cluster=c --zone=us-east5-a \
  --workload=hope --docker-image=registry/nlx:0.1 \
  --tpu-type=v5p-128 --num-slices=1 --max-restarts=10 \
  --command='nlx train hope-1.3b --run /shared/hope --batch 256 --mesh.fsdp 4 --model.remat dots_saveable --hosts.coordinator auto --time-limit 1430'
