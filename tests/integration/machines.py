"""Several machines on one, for tests of clusters: processes with networks, host names and mounts of their own.

They need Linux, root, and the programs in REQUIRED; `available` says whether they can be had.
"""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = ("unshare", "nsenter", "ip", "mount")


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        name: Its host name.
        address: Its address in the network of the test.
        processes: Whether it has a process tree of its own, which ends with its first process.
        empty: Folders that are empty and its own.
    """

    name: str
    address: str
    processes: bool = True
    empty: tuple[Path, ...] = ()

    def enter(self, first: psutil.Process) -> list[str]:
        """The command that executes another one on the machine."""
        own = ["--pid"] if self.processes else []
        return ["nsenter", "--target", str(first.pid), "--net", "--mount", "--uts", *own]


def available() -> bool:
    """Whether machines can be made here."""
    if any(shutil.which(program) is None for program in REQUIRED):
        return False
    isolated = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc"]
    return subprocess.run([*isolated, "ip", "link", "set", "lo", "up"], capture_output=True).returncode == 0


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    """Wait until a condition holds; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@contextlib.contextmanager
def started(machine: Machine, others: Sequence[Machine], folder: Path) -> Iterator[psutil.Process]:
    """Start a machine; yield its first process. `folder` is for its files, which all machines see."""
    # As Debian writes it: the own name is a loopback address.
    lines = [
        "127.0.0.1 localhost",
        f"127.0.1.1 {machine.name}",
        *(f"{other.address} {other.name}" for other in others if other is not machine),
    ]
    (folder / f"{machine.name}.hosts").write_text("\n".join(lines) + "\n")
    begin = f"""
        hostname {machine.name}
        mount --bind {folder}/{machine.name}.hosts /etc/hosts
        for path in {" ".join(map(str, machine.empty))}; do mount -t tmpfs none $path; done
        ip link set lo up
        touch {folder}/{machine.name}.up
        exec sleep 3600
    """
    own = ["--pid", "--mount-proc"] if machine.processes else []
    options = ["--net", "--mount", "--uts", *own, "--fork", "--kill-child"]
    process = subprocess.Popen(["unshare", *options, "bash", "-ec", begin])
    wait_for((folder / f"{machine.name}.up").exists, 20)
    first = psutil.Process(process.pid).children()[0]
    (folder / f"{machine.name}.pid").write_text(str(first.pid))
    try:
        yield first
    finally:
        if first.is_running():
            for one in [*processes_of(first), first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait()


@contextlib.contextmanager
def network(machines: dict[Machine, psutil.Process]) -> Iterator[None]:
    """A switch with a cable to each machine: when a machine ends, the others keep their interfaces."""
    switch = subprocess.Popen(["unshare", "--net", "--kill-child", "--fork", "sleep", "3600"])
    try:
        wait_for(lambda: psutil.Process(switch.pid).children(), 20)
        inside = psutil.Process(switch.pid).children()[0].pid

        def ip(pid: int, *command: str) -> None:
            subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *command], check=True)

        ip(inside, "link", "add", "switch", "type", "bridge")
        ip(inside, "link", "set", "switch", "up")
        for machine, first in machines.items():
            end = ["name", "eth0", "netns", str(first.pid)]
            ip(inside, "link", "add", machine.name, "type", "veth", "peer", *end)
            ip(inside, "link", "set", machine.name, "master", "switch", "up")
            ip(first.pid, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip(first.pid, "link", "set", "eth0", "up")
        yield
    finally:
        switch.kill()
        switch.wait()


@contextlib.contextmanager
def running(machines: Sequence[Machine], folder: Path) -> Iterator[dict[str, psutil.Process]]:
    """Start machines in one network; yield their first processes by name."""
    with contextlib.ExitStack() as stack:
        firsts = {machine: stack.enter_context(started(machine, machines, folder)) for machine in machines}
        with network(firsts):
            yield {machine.name: first for machine, first in firsts.items()}


def processes_of(first: psutil.Process, title: str = "") -> list[psutil.Process]:
    """The processes on a machine, but those that make it; only those whose command line contains `title`."""
    processes, makers = [], (first.pid, first.ppid())
    try:
        network_of_machine = Path(f"/proc/{first.pid}/ns/net").readlink()
    except OSError:  # the machine has ended
        return []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            here = process.pid not in makers and Path(f"/proc/{process.pid}/ns/net").readlink() == network_of_machine
            if here and title in " ".join(process.cmdline()):
                processes.append(process)
    return processes


def installed_project(folder: Path) -> Path:
    """Make a project's folder as after `scripts/setup cluster`, with this environment; return it."""
    folder.mkdir(parents=True)
    for name in ("pipeline", "conf", "jobs", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    environment = folder / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if not entry.name.startswith(".installed"):
            (environment / entry.name).symlink_to(entry)
    # The stamp of scripts/setup: the inputs of the installation, and where it is.
    inputs = "cat pyproject.toml constraints.txt | cksum"
    digest = subprocess.run(
        ["bash", "-c", inputs], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()
    for stamp in (".installed", ".installed-cluster"):
        (environment / stamp).write_text(f"{digest} {folder}\n")
    return folder
