#!/usr/bin/env bash
# Neuron Atlas on Slurm: one Ray node a Slurm node, gone with the job. Submit it again and it goes on.
#
#   sbatch --nodes=4 --gpus-per-node=1 jobs/slurm.sh run.root=/shared/runs run.name=overnight experiment=overnight
#
# From the project's folder, which all nodes see like run.root; the project set up there by scripts/setup.
# Needs Ray 2.49 or later (ray symmetric-run).
#SBATCH --job-name=atlas
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=atlas-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
nodes="${SLURM_JOB_NUM_NODES:-1}"
job="${SLURM_JOB_ID:?submit this with sbatch}"
bin="${ATLAS_BIN:-$PWD/.venv/bin}"

root=""
for argument in "$@"; do
    case "$argument" in run.root=/*) root="${argument#run.root=}" ;; esac
done
if [ -z "$root" ]; then
    echo "jobs/slurm.sh: say run.root=/…, a folder that all nodes see." >&2
    exit 2
fi
mkdir -p "$root"

# Only this job's nodes may join: a token of its own, which no other user can read.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$root/.ray-token-$job"
mark="$root/.exit-$job"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH" "$mark"' EXIT
rm -f "$mark"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

# Two jobs on one node must not meet; Ray waits half a minute for nodes, slow file systems take longer.
port=$((20000 + job % 20000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
read -r first < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
read -r head _ < <(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I)
gpus="${SLURM_GPUS_ON_NODE:-0}"

# The run's own exit code goes into a file: symmetric-run ends with 0 when Ray could not even start, and the other
# nodes end with an error when the cluster is stopped under them.
# shellcheck disable=SC2016  # expands in the inner shell
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    "$bin/ray" symmetric-run --address "$head:$port" --min-nodes "$nodes" \
    --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="$gpus" --temp-dir="${ATLAS_TMP:-/tmp}/ray-$job" \
    --include-dashboard=false --disable-usage-stats -- \
    bash -c 'mark="$1"; shift; "$@"; echo $? > "$mark"' atlas "$mark" \
    "$bin/python" -m pipeline run "engine.address=$head:$port" "$@" || true

if [ ! -s "$mark" ]; then
    echo "The run did not come to its end (see above). Everything finished is kept: submit it again." >&2
    exit 1
fi
exit "$(cat "$mark")"
