#!/usr/bin/env bash
# Neuron Atlas on Slurm: one Ray node on each node of the job. Submit it again to continue a run.
#
#   sbatch --nodes=4 --gpus-per-node=1 jobs/slurm.sh run.root=/shared/runs run.name=overnight experiment=overnight
#
# Submit it from the project's folder, which all nodes must see, as they must see run.root. Run scripts/setup there before.
# The first node starts the run at once; the other nodes join when they are ready. A node that does not start, or is lost,
# costs the tasks in progress on it. Three minutes before the time limit the run is stopped in order and the job requeued.
#
# Exit codes: those of `atlas run`; 2 also if run.root is missing; 75 if the run was stopped before its end or Ray could not
# start, so that the same job can be submitted again.
#
# The token of the cluster is not encrypted on the network between the nodes: whoever can read that traffic can join the
# cluster. On an untrusted network set up TLS for Ray (RAY_USE_TLS=1 and its certificates) before sbatch.
#
#   ATLAS_BIN        folder with `python` and `ray`; default: .venv/bin in the project's folder
#   ATLAS_TMP        local folder for Ray's files on each node; default: /tmp
#   ATLAS_ADDRESS    IPv4 address of the first node in the network to use; default: that of its name
#   ATLAS_GRACE      seconds to stop the run before it is killed; default: 90
#   ATLAS_RETRY      seconds between two checks of a node whether it and the first node are there; default: 15
#SBATCH --job-name=atlas
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --output=atlas-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
job="${SLURM_JOB_ID:?submit this with sbatch}"
me="${SLURMD_NODENAME:-$(hostname -s)}"
bin="${ATLAS_BIN:-$PWD/.venv/bin}"
try_again=75 # EX_TEMPFAIL of sysexits.h

say() { echo "jobs/slurm.sh: $*" >&2; }

root=""
for argument in "$@"; do
    case "$argument" in run.root=/*) root="${argument#run.root=}" ;; esac
done
if [ -z "$root" ]; then
    say "set run.root=/…, a folder that all nodes see."
    exit 2
fi
if ! [ -x "$bin/ray" ]; then
    say "there is no $bin/ray: run scripts/setup in $PWD, and submit from there; or set ATLAS_BIN."
    exit 2
fi
mkdir -p "$root"
# Ray calls itself by name.
export PATH="$bin:$PATH"
# As in scripts/atlas: threads of PyTorch that wait for each other keep their core busy for a short time only.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-3000}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1 # workers without a GPU must not see one

# A token for this job, which no other user can read: only nodes of the job can join the cluster.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$root/.ray-token-$job"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # the nodes end after the run
# Ports by job number, below the range of temporary ports: two jobs on one node do not connect to each other.
port=$((20000 + job % 12000))
export ATLAS_RAY_TEMP="${ATLAS_TMP:-/tmp}/ray-$job"

# Executed on every node: `start_ray ADDRESS OPTION…` replaces the shell by a Ray node that uses what Slurm allocated here.
start_ray() {
    local gpus="${SLURM_GPUS_ON_NODE:-}"
    if [ -z "$gpus" ]; then
        gpus=0
        case "${CUDA_VISIBLE_DEVICES:-NoDevFiles}" in
            NoDevFiles | -1) ;;
            *) gpus="$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)" ;;
        esac
    fi
    if [ "$gpus" = 0 ] && nvidia-smi --list-gpus 2> /dev/null | grep -q GPU; then
        echo "jobs/slurm.sh: warning: ${SLURMD_NODENAME:-$HOSTNAME} has GPUs that are not allocated to this job and not" \
            "used: submit with --gpus-per-node." >&2
    fi
    exec ray start --block --node-ip-address="$1" --num-cpus="${SLURM_CPUS_ON_NODE:-$(nproc)}" --num-gpus="$gpus" \
        --temp-dir="$ATLAS_RAY_TEMP" --disable-usage-stats --include-log-monitor=false "${@:2}"
}

# Executed on every node but the first: keep a Ray node that belongs to the head at `ADDRESS PORT`. A node that is lost is
# started again. If the head cannot be reached for minutes and has not ended this step, the first node has failed, on which
# the script of the job ran: requeue the job, as nobody else does. (Ray itself takes longer to miss a silent head.)
# shellcheck disable=SC2329  # called by another shell
join_head() {
    local child="" source tries=0 misses=0 head="$1" port="$2" job="$3" mark="$4"
    leave() {
        trap - TERM
        if [ -n "$child" ]; then
            kill "$child" 2> /dev/null
            wait "$child"
        fi
        rm -rf "$ATLAS_RAY_TEMP"
        exit 0
    }
    trap leave TERM
    source="$(python -c 'import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
print(s.getsockname()[0])' "$head")"
    while [ "$misses" -lt 12 ]; do
        if [ -z "$child" ] || ! kill -0 "$child" 2> /dev/null; then
            if [ "$tries" -gt 0 ]; then
                echo "jobs/slurm.sh: the Ray node of ${SLURMD_NODENAME:-$HOSTNAME} has ended ($tries of 5 starts)" >&2
            fi
            if [ "$tries" = 5 ]; then exit 1; fi
            tries=$((tries + 1))
            (start_ray "$source" --address="$head:$port") > /dev/null &
            child=$!
        fi
        sleep "${ATLAS_RETRY:-15}" & wait $!
        misses=$((misses + 1))
        if timeout 5 bash -c ": < /dev/tcp/$head/$port" 2> /dev/null; then misses=0; fi
    done
    # One of the nodes left makes this folder; it requeues the job.
    if mkdir "$mark" 2> /dev/null; then
        echo "jobs/slurm.sh: the first node does not answer any more: requeueing the job" >&2
        scontrol requeue "$job"
    fi
    leave
}

# Print the first IPv4 address of a node's name that other nodes can use.
address_of() { getent ahostsv4 "$1" | awk '$1 !~ /^127\./ && !found { print $1; found = 1 }' || true; }

others=()
while read -r node; do
    [ "$node" = "$me" ] || others+=("$node")
done < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
# A step on one node takes what the job has there, not what the job has in all.
unset SLURM_GPUS SLURM_NTASKS SLURM_NPROCS
step=(srun --nodes=1 --ntasks=1 --cpu-bind=none --mem=0 --input=none)

# A machine's own name often stands for a loopback address on it (/etc/hosts): another node knows the address.
head="${ATLAS_ADDRESS:-$(address_of "$me")}"
for node in "${others[@]}"; do
    [ -z "$head" ] || break
    head="$("${step[@]}" --nodelist="$node" bash -c "$(declare -f address_of); address_of \"\$1\"" atlas "$me" || true)"
done
if [ -z "$head" ]; then
    head="$(hostname -I | tr ' ' '\n' | grep -m 1 -v ':' || true)"
    say "warning: the name $me has no address; using ${head:=127.0.0.1}. Set ATLAS_ADDRESS if other nodes cannot reach it."
fi

ray="" driver="" stopped="" requeue=""
steps=()
log="${ATLAS_TMP:-/tmp}/ray-$job.log"
mark="$root/.requeue-$job"
rm -rf "$mark" "$log"

alive() { [ -n "$1" ] && kill -0 "$1" 2> /dev/null; }
# Wait for the seconds in $1, or until a signal arrives.
pause() { sleep "$1" & wait $! || true; }
# End processes in order, and kill those that have not ended after the seconds in $1.
# shellcheck disable=SC2329  # called by a trap
end() {
    local deadline=$((SECONDS + $1)) process
    for process in "${@:2}"; do kill -TERM "$process" 2> /dev/null || true; done
    for process in "${@:2}"; do
        while alive "$process" && [ "$SECONDS" -lt "$deadline" ]; do pause 0.2; done
        if alive "$process"; then kill -KILL "$process" 2> /dev/null || true; fi
    done
}
# shellcheck disable=SC2329  # called by a trap
clean() {
    trap '' TERM INT USR1
    end 20 "${steps[@]}" # before the head, or they would take its end for a fault
    if [ -n "$ray" ]; then end 20 "$ray"; fi
    rm -rf "$RAY_AUTH_TOKEN_PATH" "$mark" "$ATLAS_RAY_TEMP" "$log"
}
# shellcheck disable=SC2329  # called by a trap
stop() { stopped="$1"; if [ -n "$driver" ]; then kill -TERM "$driver" 2> /dev/null || true; fi; }
# End a script that was stopped: requeue the job, or say how to go on.
resubmit() {
    say "$stopped. All finished work is kept."
    if [ -n "$requeue" ] && scontrol requeue "$job"; then
        say "requeued job $job, which continues the run."
    else
        say "submit the job again to continue the run."
    fi
    exit "$try_again"
}
trap clean EXIT
trap 'requeue=yes; stop "the time limit is near"' USR1
trap 'stop "the job was told to end"' TERM INT
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")

# Ray gives a node 30 s to start, which may be too short on a slow file system: try three times.
tries=0
until grep -q "Ray runtime started" "$log" 2> /dev/null; do
    if [ -n "$stopped" ]; then resubmit; fi
    if ! alive "$ray"; then
        if [ "$tries" -gt 0 ]; then cat "$log" >&2; fi
        if [ "$tries" = 3 ]; then
            say "Ray has not started on $me ($head:$port); see above. Submit the job again."
            exit "$try_again"
        fi
        tries=$((tries + 1))
        (start_ray "$head" --head --port="$port" --include-dashboard=false --no-monitor) > "$log" &
        ray=$!
    fi
    pause 0.2
done
for node in "${others[@]}"; do
    "${step[@]}" --nodelist="$node" bash -c "$(declare -f start_ray join_head); join_head \"\$@\"" atlas \
        "$head" "$port" "$job" "$mark" &
    steps+=($!)
done

python -m pipeline run "engine.address=$head:$port" "$@" &
driver=$!
deadline=""
while alive "$driver"; do
    if [ -n "$stopped" ] && [ -z "$deadline" ]; then deadline=$((SECONDS + ${ATLAS_GRACE:-90})); fi
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then kill -KILL "$driver" 2> /dev/null || true; fi
    pause 1
done
code=0
wait "$driver" || code=$?
if [ -z "$stopped" ] || [ "$code" = 0 ]; then
    exit "$code"
fi
resubmit
