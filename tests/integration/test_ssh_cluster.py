"""jobs/ssh.yaml and the commands on it: three machines with SSH servers, Ray's own cluster launcher, a real run."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from machines import Machine, available, installed_project, processes_of, running, wait_for

import pipeline

PROGRAMS = ("ssh", "ssh-keygen", "rsync", "pkill")
SERVER = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (SERVER and all(map(shutil.which, PROGRAMS)) and available()),
        reason="needs namespaces, sshd, ssh, rsync and pkill",
    ),
]


@dataclasses.dataclass
class Cluster:
    """The machines of a cluster, the machine of its user, and the file, changed as its first lines ask."""

    machines: dict[str, Machine]
    firsts: dict[str, psutil.Process]
    file: Path

    def shell(self, command: str, seconds: float = 400) -> subprocess.CompletedProcess[str]:
        """Execute a command on the user's machine, with only the environment of Ray on PATH."""
        home = self.file.parent / "client"
        variables = [f"HOME={home}", f"PATH={sys.prefix}/bin:/usr/bin:/bin", "LANG=C.UTF-8", "USER=root"]
        enter = self.machines["client"].enter(self.firsts["client"])
        return subprocess.run(
            [*enter, "env", "-i", *variables, "bash", "-c", command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip

    def processes(self, name: str, title: str) -> list[psutil.Process]:
        return processes_of(self.firsts[name], title)


def serve(machine: Machine, first: psutil.Process, folder: Path) -> None:
    """Start an SSH server, with a home folder of its own for root."""
    home = folder / machine.name
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    passwd = folder / f"{machine.name}.passwd"
    root, *rest = Path("/etc/passwd").read_text().splitlines()
    assert root.startswith("root:")
    passwd.write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *rest, ""]))
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
    if machine.name == "client":
        subprocess.run([*keygen, home / ".ssh" / "id_ed25519"], check=True)
        (home / ".atlas-token").write_text("b" * 64)
        begin = f"mount --bind {passwd} /etc/passwd"
    else:
        shutil.copy(folder / "client" / ".ssh" / "id_ed25519.pub", home / ".ssh" / "authorized_keys")
        (home / ".bashrc").touch()
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / f"{machine.name}.key"], check=True
        )
        options = f"-o HostKey={folder}/{machine.name}.key -o StrictModes=no -o UsePAM=no -o PidFile=none"
        begin = f"mount --bind {passwd} /etc/passwd; mkdir -p /run/sshd; {SERVER} -f /dev/null {options}"
    subprocess.run([*machine.enter(first), "bash", "-ec", begin], check=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="at-"))
    # Ray's own state, the cluster's folder and that of another Ray are each machine's own.
    own = (Path("/tmp/ray"), Path("/tmp/ray-atlas"))
    made = [path for path in own if not path.exists()]
    for path in made:
        path.mkdir()
    project = installed_project(tmp_path / "project")
    names = ("client", "node1", "node2")
    machines = [Machine(name, f"10.78.0.{i}", empty=own) for i, name in enumerate(names, start=1)]
    text = (project / "jobs" / "ssh.yaml").read_text()
    for old, new in (
        ("10.0.0.1", "10.78.0.2"), ("[10.0.0.2, 10.0.0.3]", "[10.78.0.3]"), ("ssh_user: me", "ssh_user: root"),
        ("/opt/neuron-atlas", str(project)),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (folder / "ssh.yaml").write_text(text)
    try:
        with running(machines, folder) as firsts:
            for machine in machines:
                serve(machine, firsts[machine.name], folder)
            yield Cluster({machine.name: machine for machine in machines}, firsts, folder / "ssh.yaml")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def documented(cluster: Cluster, start: str) -> str:
    """The command of the file's head that begins with `start`."""
    line = next(x for x in cluster.file.read_text().splitlines() if x.startswith(f"#   {start}"))
    return line.removeprefix("#   ").replace("jobs/ssh.yaml", str(cluster.file))


def test_the_cluster_of_ssh_machines(tmp_path: Path, cluster: Cluster, tiny_run: list[str]) -> None:
    # Another Ray of the same user on the head: it must go on.
    other = "export RAY_AUTH_MODE=disabled; ray start --head --port=6500 --num-cpus=0 --include-dashboard=false"
    enter = cluster.machines["node1"].enter(cluster.firsts["node1"])
    subprocess.run(
        [*enter, "env", "-i", f"PATH={sys.prefix}/bin:/usr/bin:/bin", "HOME=/tmp/ray", "bash", "-c", other],
        check=True, capture_output=True,
    )  # fmt: skip
    others = {p.pid for p in cluster.processes("node1", "gcs_server")}
    assert len(others) == 1

    up = cluster.shell(documented(cluster, "ray up"))
    assert up.returncode == 0, up.stdout + up.stderr
    wait_for(lambda: cluster.processes("node2", "raylet --"), 250)
    command = documented(cluster, "ray exec jobs/ssh.yaml 'export")
    given = command.index(" run.root=")
    settings = " ".join(o for o in tiny_run if not o.startswith("engine=")).replace("'", "'\\''")
    # One worker a node, and work for both.
    settings += f" engine.cpus_per_worker={psutil.cpu_count()} engine.task_seconds=1 render.steps=200"
    run = cluster.shell(f"{command[:given]} {settings}'", 500)
    assert run.returncode == 0, run.stdout + run.stderr
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        assert len(atlas.units()) == 15
    report = json.loads((tmp_path / "tiny" / "status.json").read_text())["report"]
    assert {worker["name"].partition(":")[0] for worker in report["workers"]} == {"node1", "node2"}

    down = cluster.shell(documented(cluster, "ray exec jobs/ssh.yaml 'for"))
    assert down.returncode == 0, down.stdout + down.stderr
    wait_for(lambda: {p.pid for p in cluster.processes("node1", "gcs_server")} == others, 60)
    # The other nodes end when they miss the head, whose machine still answers.
    wait_for(lambda: not cluster.processes("node2", "raylet --"), 250)


def test_the_file_is_read_as_written(cluster: Cluster) -> None:
    """Every start command names the token, its mode, the own folder and the own port."""
    config = yaml.safe_load(cluster.file.read_text())
    for kind in ("head", "worker"):
        start = config[f"{kind}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.atlas-token" in start
        assert "--temp-dir=/tmp/ray-atlas" in start and "6390" in start and "ray stop" not in str(config)
