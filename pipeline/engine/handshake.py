"""Comparison of the versions on the driver and on its workers, before any work.

Shards bear the digest that the driver computed, whoever made them: a worker with other code or another PyTorch would
store other results under the same identity. `VersionedActor` therefore reports the versions of its process before it
imports anything of the project.

This module is sent to workers by value, because the project on another machine may be another one or missing. It must
therefore import the standard library only.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Packages whose version changes results, or must be the same for driver and workers to understand each other.
PACKAGES = ("torch", "torchvision", "timm", "numpy", "ray")

# Files of the project that results depend on: code, loops in C, packaged statistics; but not those of packages that
# only a driver uses. (A worker that is replaced after such a file was edited may go on.)
SOURCES = (".py", ".c", ".npz")
OF_DRIVERS = ("api.py", "cli", "compare", "judges", "planning", "runs", "site")

# Value of a package or project that is not installed.
MISSING = "missing"


def source_digest(package: str) -> str:
    """Return a digest of those source files of an importable package that workers use, without importing it.

    Returns:
        The first 12 digits of a sha256, or "missing" if there is no such package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.suffix in SOURCES and name.parts[0] not in OF_DRIVERS and path.is_file():
            digest.update(f"{name.as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:12]


def versions(package: str) -> dict[str, str]:
    """Return the versions of this process: project, libraries, Python, and the platform.

    Args:
        package: Name of the project's package.
    """
    result = {"project": source_digest(package)}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = MISSING
    result["python"] = platform.python_version()
    result["platform"] = f"{platform.system()} {platform.machine()}"
    return result


def differences(driver: Mapping[str, str], worker: Mapping[str, str]) -> list[str]:
    """Return what differs, as texts such as "torch 2.5.0 (driver: 2.6.0)"."""
    return [
        f"{name} {worker.get(name, MISSING)} (driver: {value})"
        for name, value in driver.items()
        if worker.get(name, MISSING) != value
    ]


def nothing() -> None:
    """Do nothing: a task that waits for a node."""


class VersionedActor:
    """Executes tasks with a worker that is constructed only if its versions are accepted.

    Args:
        package: Name of the project's package.
        arguments: One-element list of the reference to (class of the worker, setup), which Ray leaves alone in a list:
            they are read after the versions are known.
        weights: Weights of the network as bytes, or None.
        environment: Environment variables to set, unless they are set, before a library is imported.
    """

    def __init__(
        self, package: str, arguments: list[Any], weights: bytes | None, environment: Mapping[str, str]
    ) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self.package, self.arguments, self.weights = package, arguments, weights
        self.worker: Any = None

    def hello(self, expected: Mapping[str, str] | None) -> dict[str, str]:
        """Construct the worker if it may work, and return the versions of this process and its name.

        Args:
            expected: Versions of the driver; with others no worker is constructed. None accepts all versions.

        Returns:
            The `versions`, and under "name" "host:process".
        """
        present = versions(self.package)
        if expected is None or not differences(expected, present):
            import ray

            worker_class, setup = ray.get(self.arguments[0])
            self.worker = worker_class(setup, weights=self.weights)
            self.weights = None
        return {**present, "name": f"{os.uname().nodename}:{os.getpid()}"}

    def do(self, *arguments: Any) -> Any:
        """Execute a task; see `engine.worker.Worker.do`."""
        return self.worker.do(*arguments)
