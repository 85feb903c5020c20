"""The connection to Ray: a private instance or an existing cluster, and what happens when it is lost."""

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError, TryAgainError, first_line
from pipeline.core.machine import available_cores
from pipeline.engine.cluster_address import check_address, host_and_port, refusal

log = logging.getLogger(__name__)

# Seconds between two looks at Ray's processes. The process of a driver without a raylet is ended by Ray after about
# 15 s, without a word about the run.
LOOK_EVERY = 1.0

# Seconds that the main thread has to end the run in order.
GRACE = 6.0

# Ray's head may be restarted; it counts as lost after this many seconds without an answer. Ray ends the process of a
# driver after 60 s.
HEAD_LOST_AFTER = 30.0

# Free bytes of shared memory below which Ray may keep its objects in files; weights and setup of a run take hundreds of
# MB.
LITTLE_SHARED_MEMORY = 1e9
SHARED_MEMORY = Path("/dev/shm")

KEPT = "Finished work is kept: the same command continues from here."


@contextlib.contextmanager
def connected(config: EngineConfig) -> Iterator[Any]:
    """Yield the module `ray`, connected to a private instance or to the cluster at `config.address`.

    Raises:
        AtlasError: If Ray is not installed or there is no cluster at the address.
        TryAgainError: If a private instance does not start.
    """
    if config.address is not None:
        check_address(config.address)
    # A later connection of this process, to a cluster perhaps, must not find the variables of this one.
    with _restored_environment():
        yield from _connection(config)


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Undo the changes of environment variables inside the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _connection(config: EngineConfig) -> Iterator[Any]:
    """Connect to Ray, yield the module `ray`, and disconnect; see `connected`."""
    options: dict[str, Any] = _private_options() if config.address is None else {"address": config.address}
    # Hide GPUs from workers that were given none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise AtlasError("Ray is not installed; use engine=inline.") from error
    if config.address is not None:
        _check_head(config.address)
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        # Restore the handlers that end a run in order: that of Ray for SIGTERM aborts.
        for kind, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(kind, handler)
    except Exception as error:  # Ray raises bare exceptions when one of its processes ends while it starts
        with contextlib.suppress(Exception):
            ray.shutdown()
        raise _explained(config.address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_head(address: str) -> None:
    """Ask the head of a cluster for its number; `ray.init` tries for 20 s without a token, and for minutes if it hangs.

    Raises:
        AtlasError: If the head refuses this process, or does not answer within 40 s.
    """
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] (compiled)
    from ray.exceptions import RayError

    named = host_and_port(address)
    if named is None:
        return
    # Ray replaces a loopback address by the one of this machine, at which the head may not listen.
    head = canonicalize_bootstrap_address(named) or named
    try:
        GcsClient(address=head)
    except RayError as error:
        raise AtlasError(refusal(address, error)) from error


def _private_options() -> dict[str, Any]:
    """Return the arguments of `ray.init` for an instance on this machine, and set Ray's variables for it."""
    # By default Ray writes a token to the home folder; a private instance needs none on disk.
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", _token())
    # Ray replaces a loopback address by the address of the machine and listens on all interfaces, unless this
    # variable says that no cluster can be formed.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    _warn_of_little_shared_memory()
    return {
        "address": "local",
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        # Ray does not know the affinity mask, nor the limits of nested containers.
        "num_cpus": available_cores(),
        # Ray runs workers with niceness 15: beside two busy processes on two cores they get 2 % of a core, whereas the
        # inline engine, and the passes that the cost model times, get a third.
        "_system_config": {"worker_niceness": 0},
    }


@functools.cache
def _token() -> str:
    """Return the token of private instances: one for the process, as Ray's client reads it once and then keeps it."""
    return secrets.token_hex(32)


def _warn_of_little_shared_memory() -> None:
    """Warn if Ray will keep its objects in files, which its own log says at a level that is not shown."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < LITTLE_SHARED_MEMORY:
            log.warning(
                "%s has only %.0f MB free, so that Ray keeps the weights for its workers in files below /tmp, which is "
                "slower: give a container more (docker run --shm-size=2g)",
                SHARED_MEMORY,
                free / 1e6,
            )


def _explained(address: str | None, error: Exception) -> AtlasError:
    """Return the error of a connection that failed, with what can be done about it."""
    if address is None:
        return TryAgainError(
            f"Ray could not start on this machine: {first_line(error)} Its logs are in /tmp/ray/session_latest/logs. "
            f"{KEPT} If it fails again, engine=inline does without Ray."
        )
    if "version mismatch" in str(error).lower():
        return AtlasError(
            f"The cluster at engine.address={address} has another version of Ray or Python than this command: "
            f"{' '.join(str(error).split())} Install the same versions everywhere (constraints.txt)."
        )
    return AtlasError(refusal(address, error))


class ConnectionWatch:
    """Notices within seconds that Ray's processes are gone, in a thread of its own.

    Ray ends a driver whose raylet or head is gone with exit code 1 and a message in C++, from a thread that Python
    cannot influence. The watch notices before: `check` raises, and if nothing calls it in time, because the main thread
    waits inside Ray, the process ends with the exit code of `TryAgainError` and its message.

    Args:
        ray: The connected module `ray`.

    Attributes:
        reason: What is lost; empty while all is well.
    """

    def __init__(self, ray: Any) -> None:
        self.reason = ""
        self._noticed = threading.Event()
        self._closed = threading.Event()
        self._raylet = _local_raylet(ray)
        self._head = _head_address(ray)
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="connection-watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `TryAgainError` if the connection is lost."""
        if self.reason:
            self._noticed.set()
            raise TryAgainError(self.message)

    @property
    def message(self) -> str:
        """The reason, and how to go on."""
        return f"{self.reason} {KEPT}"

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self.reason:
            if self._closed.wait(LOOK_EVERY):
                return
            self.reason = self._loss()
        if not self._noticed.wait(GRACE) and not self._closed.is_set():
            sys.stderr.write(f"atlas: {self.message}\n")
            sys.stderr.flush()
            os._exit(TryAgainError.exit_code)

    def _loss(self) -> str:
        """Return what is lost now; empty if nothing is."""
        if self._raylet is not None and not _alive(self._raylet):
            return "Ray's process on this machine (raylet) has ended, perhaps for lack of memory."
        if self._head is not None:
            try:
                socket.create_connection(self._head, timeout=LOOK_EVERY).close()
                self._answered = time.monotonic()
            except OSError:
                silent = time.monotonic() - self._answered
                if silent > HEAD_LOST_AFTER:
                    host, port = self._head
                    return f"The head of the Ray cluster at {host}:{port} has not answered for {silent:.0f} s."
        return ""


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _local_raylet(ray: Any) -> psutil.Process | None:
    """Return the process of this node's raylet; None if it cannot be seen from here."""
    with contextlib.suppress(Exception):
        here = ray.get_runtime_context().get_node_id()
        sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet" and any(
                    f"--raylet_socket_name={s}" in process.cmdline() for s in sockets
                ):
                    return process
    return None


def _head_address(ray: Any) -> tuple[str, int] | None:
    """Return (host, port) of the cluster's head; None if it is unknown."""
    with contextlib.suppress(Exception):
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        return host.strip("[]"), int(port)
    return None
