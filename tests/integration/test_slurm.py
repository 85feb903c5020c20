"""jobs/slurm.sh itself, as Slurm starts it: on two nodes with their own networks and process trees, and real Ray.

A node is a process with network, host name, mounts and processes of its own (Linux namespaces). `srun` and `scontrol`
are small scripts with the interface that Slurm documents. The environment has what Slurm gives a job and nothing else:
no virtual environment, and only the programs of the system on PATH.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from machines import Machine, available, installed_project, processes_of, running, wait_for

import pipeline

JOB = "4711"
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not available(), reason="needs namespaces: root, unshare, nsenter and ip"),
]

# Executes the command on the node in --nodelist, as a task of a step, and sends a signal on to it, as srun does.
SRUN = """
    echo "srun $*" >> @/srun.log
    while [[ "$1" == --* ]]; do case "$1" in --nodelist=*) node="${1#*=}" ;; esac; shift; done
    if [ -e "@/$node.bad" ]; then echo "srun: error: Task launch failed on node $node" >&2; exit 1; fi
    forward() { for task in $(cat /proc/$inside/task/$inside/children); do kill -TERM "$task"; done; }
    trap forward TERM
    export SLURM_PROCID=0 SLURM_NODEID=0 SLURMD_NODENAME="$node" SLURM_STEP_NODELIST="$node"
    nsenter --target "$(cat "@/$node.pid")" --net --pid --mount --uts --wd="$PWD" "$@" &
    inside=$!
    while kill -0 "$inside" 2> /dev/null; do wait "$inside"; done
    wait "$inside"
"""
SCONTROL = """
    echo "scontrol $*" >> @/scontrol.log
    if [ "$1 $2" = "show hostnames" ]; then echo node1; echo node2; fi
"""


def tool(path: Path, text: str, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text).replace("@/", f"{folder}/"))
    path.chmod(0o755)


@dataclasses.dataclass
class Slurm:
    """Two nodes, the folder of what Slurm keeps, and the folder that a user submits from."""

    folder: Path
    project: Path
    local: Path
    nodes: dict[str, psutil.Process]

    def sbatch(self, *settings: str, **variables: str) -> subprocess.Popen[str]:
        """Start the script as Slurm does: a copy of it, on the first node, with the variables of a job."""
        script = self.folder / "slurm_script"
        shutil.copy(self.project / "jobs" / "slurm.sh", script)
        environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.local), "LANG": "C.UTF-8",
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_ON_NODE": "1", "SLURMD_NODENAME": "node1",
            "SLURM_SUBMIT_DIR": str(self.project), "ATLAS_TMP": str(self.local),
            "ATLAS_RETRY": "1", "OMP_WAIT_POLICY": "passive", **variables,
        }  # fmt: skip
        enter = ["nsenter", "--target", str(self.nodes["node1"].pid), "--net", "--mount", "--uts"]
        assigned = [f"{name}={value}" for name, value in environment.items()]
        return subprocess.Popen(
            [*enter, "env", "-i", *assigned, "bash", str(script), *settings],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def requeued(self) -> int:
        """How often `scontrol requeue` was called for the job."""
        return (self.folder / "scontrol.log").read_text().splitlines().count(f"scontrol requeue {JOB}")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    folder = tmp_path / "slurm"
    local = Path(tempfile.mkdtemp(prefix="at-"))  # names of Unix sockets are short
    tool(folder / "bin" / "srun", SRUN, folder)
    tool(folder / "bin" / "scontrol", SCONTROL, folder)
    project = installed_project(tmp_path / "project")
    # `srun` on the first node reaches the second one by its process number, so that the first has no tree of its own.
    one = Machine("node1", "10.77.0.1", processes=False, empty=(local,))
    two = Machine("node2", "10.77.0.2", empty=(local,))
    try:
        with running([one, two], folder) as nodes:
            yield Slurm(folder, project, local, nodes)
    finally:
        shutil.rmtree(local, ignore_errors=True)


def settings_of(tiny_run: Sequence[str], *more: str) -> list[str]:
    return [o for o in tiny_run if not o.startswith("engine=")] + ["engine.cpus_per_worker=1", *more]


def tasks_by_node(run: Path) -> dict[str, int]:
    tasks: dict[str, int] = {}
    for worker in json.loads((run / "status.json").read_text())["report"]["workers"]:
        host = worker["name"].partition(":")[0]
        tasks[host] = tasks.get(host, 0) + worker["tasks"]
    return tasks


def units_of(run: Path) -> int:
    with pipeline.open_atlas(run) as atlas:
        return len(atlas.units())


def nothing_left(slurm: Slurm) -> None:
    """No process of the job is left on the nodes; some of Ray's take a while to see that their node is gone."""
    deadline = time.monotonic() + 60
    while left := [p for first in slurm.nodes.values() for p in processes_of(first)]:
        assert time.monotonic() < deadline, [" ".join(p.cmdline())[:200] for p in left if p.is_running()]
        time.sleep(0.5)


def test_two_nodes_share_a_run(tmp_path: Path, slurm: Slurm, tiny_run: list[str]) -> None:
    process = slurm.sbatch(*settings_of(tiny_run, "engine.task_seconds=1", "render.steps=150"))
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert units_of(tmp_path / "tiny") == 15
    tasks = tasks_by_node(tmp_path / "tiny")
    assert tasks.keys() == {"node1", "node2"} and min(tasks.values()) > 0, tasks
    calls = (slurm.folder / "srun.log").read_text()
    assert "--nodelist=node2" in calls and "--cpu-bind=none" in calls and "--nodelist=node1" not in calls
    nothing_left(slurm)
    assert not list(tmp_path.glob(".r*")) and slurm.requeued() == 0


def at_work(slurm: Slurm, name: str) -> bool:
    """Whether a worker on the node executes a task now; Ray shows it in a process's title."""
    return bool(processes_of(slurm.nodes[name], "ray::VersionedActor.do"))


def test_a_node_lost_in_the_middle_costs_only_time(tmp_path: Path, slurm: Slurm, tiny_run: list[str]) -> None:
    process = slurm.sbatch(
        *settings_of(tiny_run, "engine.task_seconds=1", "render.steps=200"),
        RAY_health_check_period_ms="1000", RAY_health_check_failure_threshold="3", RAY_health_check_timeout_ms="2000",
    )  # fmt: skip
    wait_for(lambda: at_work(slurm, "node2"), 250)
    slurm.nodes["node2"].kill()  # the kernel ends all of its processes; its network is gone
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "is complete" in output and units_of(tmp_path / "tiny") == 15
    assert slurm.requeued() == 0


def test_a_node_that_does_not_start_is_done_without(tmp_path: Path, slurm: Slurm, tiny_run: list[str]) -> None:
    (slurm.folder / "node2.bad").touch()
    process = slurm.sbatch(*settings_of(tiny_run), ATLAS_ADDRESS="10.77.0.1")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "Task launch failed on node node2" in output
    assert tasks_by_node(tmp_path / "tiny").keys() == {"node1"} and units_of(tmp_path / "tiny") == 15


def test_near_the_time_limit_the_job_is_requeued_and_continues(
    tmp_path: Path, slurm: Slurm, tiny_run: list[str]
) -> None:
    settings = settings_of(tiny_run, "engine.task_seconds=1", "render.steps=600")
    process = slurm.sbatch(*settings)
    wait_for(lambda: at_work(slurm, "node2") and list(tmp_path.glob("tiny/shards/render/**/*.h5")), 250)
    # As --signal=B:USR1@180: to the batch shell alone, not to its children.
    os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 75, output
    assert "Finished work is kept" in output and "requeued job" in output
    assert slurm.requeued() == 1
    nothing_left(slurm)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("tiny/shards/render/**/*.h5")}
    again = slurm.sbatch(*settings, SLURM_RESTART_COUNT="1")
    output, _ = again.communicate(timeout=400)
    assert again.returncode == 0, output
    assert units_of(tmp_path / "tiny") == 15
    assert kept and all(path.stat().st_mtime_ns == made for path, made in kept.items())


def test_the_job_is_requeued_by_the_other_nodes_if_the_first_fails(slurm: Slurm, tiny_run: list[str]) -> None:
    """Slurm keeps a job with --no-kill whose first node failed, although nothing runs its script any more."""
    settings = settings_of(tiny_run, "engine.task_seconds=1", "render.steps=600")
    with slurm.sbatch(*settings):
        wait_for(lambda: at_work(slurm, "node2"), 250)
        # The task of the step on the other node outlives `srun`, as with Slurm.
        for one in processes_of(slurm.nodes["node1"]):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        cable = ["nsenter", "--target", str(slurm.nodes["node1"].pid), "--net", "ip", "link", "set", "eth0", "down"]
        subprocess.run(cable, check=True)
        wait_for(lambda: slurm.requeued() == 1, 250)
        wait_for(lambda: not processes_of(slurm.nodes["node2"], "raylet"), 60)


def test_bad_settings_end_the_job_with_their_exit_code(slurm: Slurm, tiny_run: list[str]) -> None:
    process = slurm.sbatch(*settings_of(tiny_run, "render.stepz=4"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert "stepz" in output and slurm.requeued() == 0
