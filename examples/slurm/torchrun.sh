#!/usr/bin/env bash
# All folds in one job over several nodes, one process a GPU, started by torchrun on each node.
#
#     sbatch --nodes=1 examples/slurm/torchrun.sh train_cv.py --path ./data.csv \
#         --outpath ./output/ --model modelA24
#     sbatch examples/slurm/torchrun.sh heatmap.py --path ./data.csv --modelpath ./output/ \
#         --model modelA24 --method LRP IG GGC --outpath ./maps/
#
# train_cv.py gives each process its folds: no more processes than folds, so that five folds take one
# node of up to five GPUs (sbatch --nodes=1). heatmap.py shares the scans of each fold among any
# number. The same command, submitted again, resumes. svm.py is one process: start it without this.
#SBATCH --job-name=heatmaps
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=128G
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.out
set -euo pipefail

# srun does not take this over from sbatch since Slurm 22.05
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((10000 + SLURM_JOB_ID % 20000)) # another job may have the same first node

if [[ -n ${TMPDIR:-} && $1 != *heatmap.py ]]; then
    set -- "$@" --cache-dir "$TMPDIR" # decoded scans stay on each node, as long as its TMPDIR
fi
# torchrun ends a node's processes when one fails; ending the other nodes' is left to srun
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_node:$port" \
    "$@"
