#!/usr/bin/env bash
# sbatch this-file: a job whose time is over queues itself again and goes on.
#SBATCH --job-name=hope
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --partition=long
set -uo pipefail
# One process a node has all its GPUs.
export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7
srun nlx train hope-1.3b --run /shared/hope --batch 256 --mesh.fsdp 4 --model.remat dots_saveable --hosts.coordinator auto --time-limit 230
code=$?
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
