#!/bin/bash
# Two nodes, eight ranks each: sbatch examples/ranks/slurm.sh
#SBATCH --job-name=protomamba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
# A preempted job gets SIGTERM a minute ahead: the run saves and ends, and the requeued job resumes it.
#SBATCH --signal=B:TERM@60
#SBATCH --requeue

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_CPUS_PER_TASK" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29400" \
    -m protomamba train "$DATA" --threads 1 --resume auto --out-dir "$RUN" &
trap 'kill -TERM %1; wait' TERM
wait
