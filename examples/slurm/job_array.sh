#!/usr/bin/env bash
# One fold a task: five GPUs at once where the queue has them, one after the other where it has not.
#
#     train=$(sbatch --parsable examples/slurm/job_array.sh train_cv.py --path ./data.csv \
#         --outpath ./output/ --model modelA24)
#     sbatch --dependency=afterok:$train examples/slurm/job_array.sh heatmap.py --path ./data.csv \
#         --modelpath ./output/ --model modelA24 --method LRP IG GGC --outpath ./maps/
#
# The task that finishes the last fold puts all folds together. A task that was killed resumes when
# the same command is submitted again. svm.py needs no GPU and is one process: it is no array.
#SBATCH --job-name=heatmaps
#SBATCH --array=0-4
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%A_%a.out
set -euo pipefail

# srun does not take this over from sbatch since Slurm 22.05
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
options=(--only-fold "$SLURM_ARRAY_TASK_ID")
if [[ -n ${TMPDIR:-} && $1 != *heatmap.py ]]; then
    options+=(--cache-dir "$TMPDIR") # decoded scans stay on the node, as long as its TMPDIR
fi
srun python3 "$@" "${options[@]}"
