#!/usr/bin/env bash
# All folds in one job over several nodes, one process a GPU, started by torchrun on each node.
#
#     sbatch examples/slurm/torchrun.sh train_cv.py --path ./data.csv --outpath ./output/ \
#         --model modelA24
#     sbatch examples/slurm/torchrun.sh heatmap.py --path ./data.csv --modelpath ./output/ \
#         --model modelA24 --method LRP IG GGC --outpath ./maps/
#
# train_cv.py gives each process its folds (more than one process a fold only where there are more
# processes than folds); heatmap.py shares the scans of each fold, svm.py the Gram matrix.
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

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_node:29500" \
    "$@"
