#!/bin/bash
# Two nodes, eight ranks each: sbatch examples/ranks/slurm.sh
#SBATCH --job-name=protomamba
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
# SIGTERM a minute before the time limit (and before preemption, where Slurm has PreemptParameters=send_user_signal): the run
# saves and ends, the job goes back into the queue and resumes.
#SBATCH --signal=B:TERM@60
#SBATCH --requeue

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_CPUS_PER_TASK" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29400" \
    -m protomamba train "$DATA" --threads 1 --resume auto --out-dir "$RUN" &
trap 'kill -TERM %1; wait; scontrol requeue "$SLURM_JOB_ID"' TERM
wait
