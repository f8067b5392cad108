#!/usr/bin/env bash
# bash this-file: makes a slice, trains on it, removes it. Needs gcloud, logged in, with a project.
set -euo pipefail
gcloud compute tpus tpu-vm create hope --zone=us-east5-a \
  --accelerator-type=v5litepod-256 --version=v2-alpha-tpuv5-lite
trap 'gcloud compute tpus tpu-vm delete hope --zone=us-east5-a --quiet' EXIT
gcloud compute tpus tpu-vm ssh hope --zone=us-east5-a --worker=all \
  --command='curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --python 3.12 ~/nlx && ~/.local/bin/uv pip install --python ~/nlx/bin/python '"'"'nlx[experiments]'"'"' '"'"'jax[tpu]'"'"''
gcloud compute tpus tpu-vm ssh hope --zone=us-east5-a --worker=all \
  --command='. ~/nlx/bin/activate && sudo mount 10.0.0.2:/runs /shared && exec nlx train hope-1.3b --run /shared/hope --batch 256 --mesh.fsdp 4 --model.remat dots_saveable --hosts.coordinator auto --time-limit 1430'
