#!/usr/bin/env bash
# The 32 published models, one a task, each with its five folds; then the table to choose one by.
#
#     sweep=$(sbatch --parsable examples/slurm/sweep.sh ./sweep/ --path ./data.csv --seed 0)
#     sbatch --dependency=afterany:$sweep --array=0 examples/slurm/sweep.sh --table ./sweep/
#
# The first word is the folder of the runs, what follows are options of train_cv.py. The table,
# runs.csv in the folder, is sorted by validation loss; its columns test_… must choose nothing. A task
# that was killed resumes when it is submitted again.
#SBATCH --job-name=sweep
#SBATCH --array=0-31
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
if [[ $1 == --table ]]; then
    finished=("$2"/model*/metrics.csv)
    srun python3 compare.py --run "${finished[@]%/metrics.csv}" --outpath "$2"
    exit
fi
models=(model{A,B,C,D}{24,28,32,36,40,44,48,52})
model=${models[SLURM_ARRAY_TASK_ID]}
folder=$1
shift
options=(--model "$model" --outpath "$folder/$model")
if [[ -n ${TMPDIR:-} ]]; then
    options+=(--cache-dir "$TMPDIR") # decoded scans stay on the node, as long as its TMPDIR
fi
srun python3 train_cv.py "$@" "${options[@]}"
