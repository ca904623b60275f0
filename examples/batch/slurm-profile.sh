#!/usr/bin/env bash
#SBATCH --job-name=prism-profile
#SBATCH --array=1-4
#SBATCH --cpus-per-task=2
#SBATCH --requeue
# One part of the calibration text per task of a job array, then slurm-refactor.sh puts them together:
#
#     job=$(sbatch --parsable slurm-profile.sh MODEL_DIR WORK_DIR [OPTION of prism-profile]...)
#     sbatch --dependency=afterok:$job slurm-refactor.sh MODEL_DIR WORK_DIR OUT_DIR [OPTION of prism-refactor]...
#
# A task that is requeued goes on after its last finished layer. To run some tasks again: SHARDS=4 sbatch --array=3 slurm-profile.sh ...
set -euo pipefail
model=$1 work=$2
shift 2
mkdir -p "$work"
part=$SLURM_ARRAY_TASK_ID
[ -e "$work/stats-$part/index.json" ] && exit 0
exec prism-profile "$model" "$work/stats-$part" --shard "$part/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}" --resume --log-json "$@"
