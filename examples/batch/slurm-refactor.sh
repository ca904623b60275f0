#!/usr/bin/env bash
#SBATCH --job-name=prism-refactor
#SBATCH --cpus-per-task=2
#SBATCH --requeue
# After slurm-profile.sh: merge the parts that its tasks wrote, and refactor.
set -euo pipefail
model=$1 work=$2 out=$3
shift 3
[ -e "$work/stats/index.json" ] || prism-profile merge "$work/stats" "$work"/stats-*[0-9] >&2
[ -e "$out/prism.json" ] && exit 0
exec prism-refactor "$model" "$out" --stats "$work/stats" --resume --json --log-json --workers "${SLURM_CPUS_PER_TASK:-1}" "$@"
