#!/usr/bin/env bash
# Neuron Atlas on Slurm: one Ray node per Slurm node, stopped with the job. Submit it again to continue.
#
#   sbatch --nodes=4 --gpus-per-node=1 jobs/slurm.sh run.root=/shared/runs run.name=overnight experiment=overnight
#
# Submit it from the project's folder, which all nodes must see, as they must see run.root. Run scripts/setup there before.
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
    echo "jobs/slurm.sh: set run.root=/…, a folder that all nodes see." >&2
    exit 2
fi
mkdir -p "$root"

# A token for this job, which no other user can read: only nodes of the job can join the cluster.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$root/.ray-token-$job"
mark="$root/.exit-$job"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH" "$mark"' EXIT
rm -f "$mark"
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

# A port by job number, so that two jobs on one node do not connect to each other. Ray waits 30 s for nodes by default,
# which is too short for slow file systems.
port=$((20000 + job % 20000))
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
read -r first < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
read -r head _ < <(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname -I)
gpus="${SLURM_GPUS_ON_NODE:-0}"

# The exit code of the run is written to a file: symmetric-run exits with 0 if Ray could not start, and the other nodes exit
# with an error when the cluster is stopped.
# shellcheck disable=SC2016  # expands in the inner shell
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    "$bin/ray" symmetric-run --address "$head:$port" --min-nodes "$nodes" \
    --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --num-gpus="$gpus" --temp-dir="${ATLAS_TMP:-/tmp}/ray-$job" \
    --include-dashboard=false --disable-usage-stats -- \
    bash -c 'mark="$1"; shift; "$@"; echo $? > "$mark"' atlas "$mark" \
    "$bin/python" -m pipeline run "engine.address=$head:$port" "$@" || true

if [ ! -s "$mark" ]; then
    echo "The run did not finish (see above). All finished work is kept: submit it again." >&2
    exit 1
fi
exit "$(cat "$mark")"
