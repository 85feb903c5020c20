"""Who works when: one driver loop over Ray actors, or the same tasks in this process.

A task is done when its shard is there, never because somebody said so. Retries belong to this loop: a lost
actor gives its task back at once and is replaced; a task that fails `attempts` times is set aside with its
traceback, and the run goes on.
"""

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import signal
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pipeline.config import EngineConfig
from pipeline.errors import AtlasError, first_line
from pipeline.worker import Done, Setup, Task, Worker

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task that was set aside, and why."""

    task: Task
    reason: str
    detail: str


class TooManyFailures(Exception):
    """So many tasks failed in a row that going on would be a waste."""


@dataclasses.dataclass(frozen=True)
class Crew:
    """How many workers, with how much of the machine each."""

    workers: int
    cpus: float
    gpus: float
    device: str

    @property
    def threads(self) -> int:
        """CPU threads of one worker."""
        return max(1, int(self.cpus))


def crew(config: EngineConfig, cpus: float, gpus: float, tasks: int) -> Crew:
    """Fill the `auto` fields for a machine or cluster of `cpus` and `gpus`.

    With GPUs one worker each, sharing the cores; without, one worker a core, which two cores were measured to
    finish more pictures with than with one worker of two threads. Never more workers than tasks.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if gpus > 0 and config.gpus_per_worker != 0 else "cpu"
    per_gpu = config.gpus_per_worker
    if isinstance(per_gpu, str):
        per_gpu = 1.0 if device.startswith("cuda") else 0.0
    if config.name == "inline":
        return Crew(1, cpus, per_gpu, device)
    by_gpu = int(gpus / per_gpu) if per_gpu else None
    per_cpu = config.cpus_per_worker
    if isinstance(per_cpu, str):
        if isinstance(config.workers, int):
            per_cpu = max(1.0, cpus // config.workers)
        else:
            per_cpu = max(1.0, cpus // by_gpu) if by_gpu else 1.0
    workers = config.workers
    if isinstance(workers, str):
        workers = by_gpu or max(1, int(cpus / per_cpu))
    return Crew(max(1, min(workers, tasks)), per_cpu, per_gpu, device)


def execute(
    tasks: Sequence[Task],
    setup: Setup,
    config: EngineConfig,
    finished: Callable[[Task, Done | Failure], None],
    idle: Callable[[], None] = lambda: None,
) -> None:
    """Do `tasks`, stage by stage in their order, costliest first, and tell `finished` of each.

    `idle` is called every second or so. Raises `TooManyFailures` after `max_failures` set aside in a row. On
    KeyboardInterrupt the workers are stopped and the exception goes on; finished shards stay.
    """
    if not tasks:
        return
    stages = list(dict.fromkeys(task.stage for task in tasks))
    ordered = sorted(tasks, key=lambda t: (stages.index(t.stage), -t.cost))
    if config.name == "inline":
        _inline(ordered, setup, config, finished, idle)
    else:
        _ray(ordered, setup, config, finished, idle)


class _Tries:
    """Counts failures: which task may be tried again, and when to give up altogether."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counts: dict[str, int] = {}
        self.in_a_row = 0

    def failed(self, task: Task, reason: str, detail: str) -> Failure | None:
        """None if the task may be tried again."""
        self.counts[task.path] = self.counts.get(task.path, 0) + 1
        log.warning("%s failed (%d of %d): %s", task.name, self.counts[task.path], self.config.attempts, reason)
        if self.counts[task.path] < self.config.attempts:
            return None
        self.in_a_row += 1
        return Failure(task, reason, detail)

    def check(self) -> None:
        if self.in_a_row >= self.config.max_failures:
            raise TooManyFailures(
                f"{self.in_a_row} tasks in a row were set aside; the last reasons are in failures.csv. "
                "Everything finished is kept: mend the cause and run again."
            )


def _inline(ordered: list[Task], setup: Setup, config: EngineConfig, finished: Any, idle: Any) -> None:
    worker = Worker(setup, stop=idle)
    tries = _Tries(config)
    for task in ordered:
        while True:
            try:
                done = worker.do(task)
            except AtlasError:
                raise
            except Exception as error:
                failure = tries.failed(task, f"{type(error).__name__}: {error}", traceback.format_exc())
                if failure is None:
                    continue
                finished(task, failure)
                tries.check()
                break
            tries.in_a_row = 0
            finished(task, done)
            break


@contextlib.contextmanager
def cluster(config: EngineConfig) -> Iterator[Any]:
    """Ray, connected: a private instance on this machine, or the cluster at `config.address`. Left on exit."""
    # Ray of its own accord would write a token into the home folder; a private instance needs none on disk.
    if config.address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A "CPU" worker on a machine with GPUs must not see them; Ray leaves them visible otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise AtlasError("Ray is not installed; use engine=inline.") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    else:
        _reachable(config.address)
        options["address"] = config.address
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
        # Ray puts a handler of its own on SIGTERM, which aborts; ours ends the run in order.
        for kind, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(kind, handler)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AtlasError(f"No Ray cluster at engine.address={config.address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _room(ray: Any, team: Crew) -> int:
    """How many of the workers the cluster's nodes can hold; asking for more would wait for ever."""
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            fits = node["Resources"].get("CPU", 0.0) // team.cpus
            room += int(min(fits, node["Resources"].get("GPU", 0.0) // team.gpus) if team.gpus else fits)
    if room < 1:
        raise AtlasError(
            f"No node of the cluster has room for a worker of {team.cpus:g} CPUs and {team.gpus:g} GPUs: "
            "lower engine.cpus_per_worker or engine.gpus_per_worker."
        )
    if room < team.workers:
        log.warning("engine.workers=%d, but the cluster has room for %d: using those", team.workers, room)
    return min(room, team.workers)


def _reachable(address: str) -> None:
    """Ray tries a dead address for many minutes; a person wants to know within seconds."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise AtlasError(f"No Ray cluster at engine.address={address}: {error}") from error


def _ray(ordered: list[Task], setup: Setup, config: EngineConfig, finished: Any, idle: Any) -> None:
    with cluster(config) as ray:
        resources = ray.cluster_resources()
        team = crew(config, resources.get("CPU", 1.0), resources.get("GPU", 0.0), len(ordered))
        team = dataclasses.replace(team, workers=_room(ray, team))
        setup = dataclasses.replace(setup, threads=team.threads, device=team.device)
        log.info("%d workers, %g CPUs and %g GPUs each, on %s", team.workers, team.cpus, team.gpus, team.device)
        # max_restarts=0: a dead actor is replaced below, which is faster than Ray's own restarts and observable.
        actor = ray.remote(num_cpus=team.cpus, num_gpus=team.gpus, max_restarts=0)(Worker)
        shared = ray.put(setup)
        pending = deque(ordered)
        tries = _Tries(config)
        crew_now: list[Any] = [actor.remote(shared) for _ in range(team.workers)]
        free: deque[Any] = deque(crew_now)
        busy: dict[Any, tuple[Any, Task]] = {}
        try:
            while pending or busy:
                while free and pending:
                    worker, task = free.popleft(), pending.popleft()
                    busy[worker.do.remote(task)] = (worker, task)
                # An explicit timeout: the driver must hear a Ctrl-C and show that it lives.
                ready, _ = ray.wait(list(busy), num_returns=1, timeout=1.0)
                idle()
                for reference in ready:
                    worker, task = busy.pop(reference)
                    try:
                        done = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        cause = error.cause
                        if isinstance(cause, AtlasError):
                            raise cause from None
                        free.append(worker)
                        failure = tries.failed(task, f"{type(cause).__name__}: {cause}", str(error))
                    except ray.exceptions.RayError as error:  # the actor, its node or its memory is gone
                        with contextlib.suppress(Exception):
                            ray.kill(worker)
                        free.append(actor.remote(shared))
                        failure = tries.failed(task, f"worker lost: {first_line(error)}", str(error))
                    else:
                        free.append(worker)
                        tries.in_a_row = 0
                        finished(task, done)
                        continue
                    if failure is None:
                        pending.appendleft(task)
                    else:
                        finished(task, failure)
                        tries.check()
        finally:
            for worker in {w for w, _ in busy.values()} | set(free):
                with contextlib.suppress(Exception):
                    ray.kill(worker)


def local_resources() -> tuple[int, int]:
    """(CPU cores this process may use, GPUs) of this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus, torch.cuda.device_count() if torch.cuda.is_available() else 0
