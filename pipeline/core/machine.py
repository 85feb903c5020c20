"""This machine: the cores and memory that this process may use, also in containers, and the cache of its user."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil

# Environment variable of GNU's OpenMP and its value: the number of rounds that a waiting thread of PyTorch keeps its
# core busy. By default threads wait so long that a run beside other processes takes several times as long. It is read
# when PyTorch is loaded.
SPIN_LIMIT = {"GOMP_SPINCOUNT": "3000"}

# Environment variable of PyTorch's compiler and its value, for workers: each would start a pool of as many compiling
# processes as the machine has cores. It is read when the compiler is loaded.
COMPILER_LIMIT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def user_cache() -> Path:
    """Return the folder of this user for what can be made or fetched again; it need not exist.

    Raises:
        FileNotFoundError: If this user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of this variable says that relative paths are to be ignored.
    root = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    if not root.is_absolute():
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME")
    return root / "neuron-atlas"


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, at least 1.

    The least of the affinity mask, where the system has one, and of the limits of CPU time of the control groups that
    this process is in: more threads than that only wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cores, *_cpu_limits()])))


def available_memory() -> int:
    """Return the bytes of memory that this process may use: of the machine, or of the tightest control group.

    A job's limit is often not at the root: Slurm and systemd nest groups, and each limits all groups below it.
    """
    return min([psutil.virtual_memory().total, *_memory_limits()])


def _cpu_limits() -> Iterator[float]:
    """Yield the limits of CPU time of the control groups of this process, in cores."""
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no limit
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError):  # version 1; -1 is no limit
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                yield quota / int((folder / "cpu.cfs_period_us").read_text())


def _memory_limits() -> Iterator[int]:
    """Yield the memory limits of the control groups of this process, in bytes. Above `memory.high` they are slowed."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):
                yield int((folder / name).read_text())


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, from its innermost to the root.

    Inside a container the path in `OWN_CGROUPS` may be that on the host, which is not visible: the root is always
    tried.
    """
    with contextlib.suppress(OSError):
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controller if controllers else CGROUPS
            innermost = root / path.lstrip("/")
            yield from (folder for folder in (innermost, *innermost.parents) if folder.is_relative_to(root))
    yield CGROUPS


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache, which only this user can read and write; it is created if needed.

    Args:
        name: Name of the folder below `neuron-atlas` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Raises:
        OSError: If it cannot be created, or others can write to it.
    """
    folder = user_cache() / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder.lstat()):
        raise PermissionError(f"{folder} belongs to another user, or others can write to it")
    return folder


def is_private(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and nobody else can write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
