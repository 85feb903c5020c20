"""The engine on Ray: a private instance or an existing cluster, with workers as actors.

Nodes and workers may join and leave during a run. With `engine.workers=auto` the number of workers follows the
cluster; a number is an upper bound.
"""

import contextlib
import dataclasses
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import EngineConfig
from pipeline.core import plugins
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError, first_line
from pipeline.data import image_loading
from pipeline.engine.base import (
    LOSSES_PER_FAILURE,
    NODE_LOSSES_PER_FAILURE,
    FailureTracker,
    OnResult,
    ordered,
)
from pipeline.engine.progress import WorkerStats
from pipeline.engine.resources import Node, size_pool
from pipeline.engine.tasks import Done, RenderTask, Setup, Task, layer_of
from pipeline.engine.worker import DeviceLost, Worker
from pipeline.models.loading import serialize_weights

log = logging.getLogger(__name__)

# Seconds between two counts of the nodes of the cluster.
COUNT_EVERY = 2.0

# If a node has room, the first worker may take this multiple of `engine.patience` to start: other work may occupy the
# node, and importing torch from a busy disk or a network file system takes minutes.
SLOW_START = 5.0

# Stop after this many consecutive workers whose constructor failed.
MAX_FAILED_STARTS = 3


@contextlib.contextmanager
def connected(config: EngineConfig) -> Iterator[Any]:
    """Yield the module `ray`, connected to a private instance or to the cluster at `config.address`.

    Raises:
        AtlasError: If Ray is not installed or there is no cluster at the address.
    """
    if config.address is None:
        # By default Ray writes a token to the home folder; a private instance needs none on disk.
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray replaces a loopback address by the address of the machine and listens on all interfaces, unless this
        # variable says that no cluster can be formed.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Hide GPUs from workers that were given none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise AtlasError("Ray is not installed; use engine=inline.") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Ray runs workers with niceness 15: beside two busy processes on two cores they get 2 % of a core, whereas the
        # inline engine, and the passes that the cost model times, get a third.
        options["_system_config"] = {"worker_niceness": 0}
    else:
        _reachable(config.address)
        options["address"] = config.address
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
        # Restore the handlers that end a run in order: that of Ray for SIGTERM aborts.
        for kind, handler in handlers.items():
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(kind, handler)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AtlasError(f"No Ray cluster at engine.address={config.address}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reachable(address: str) -> None:
    """Raise `AtlasError` within seconds if nothing listens at `address`: Ray tries for many minutes."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise AtlasError(f"No Ray cluster at engine.address={address}: {error}") from error


@dataclasses.dataclass
class _ActorHandle:
    """One actor, from its creation to its end.

    Attributes:
        actor: The Ray actor.
        stats: Statistics of the worker.
        task: The task that it executes; None while it starts or waits.
    """

    actor: Any
    stats: WorkerStats
    task: Task | None = None


@dataclasses.dataclass(frozen=True)
class _Error:
    """An error that a call of an actor ended in.

    Attributes:
        reason: The error, in one line.
        detail: Its traceback.
        weight: How much it counts as a failure of the task.
        lost: Whether the worker is gone or must be replaced.
        in_constructor: Whether the constructor of the worker failed.
    """

    reason: str
    detail: str
    weight: float
    lost: bool
    in_constructor: bool = False


@dataclasses.dataclass
class _Round:
    """The state of one call of `execute`."""

    pending: deque[Task]
    tracker: FailureTracker
    on_result: OnResult


class RayEngine:
    """Executes tasks on Ray actors; see `engine.base.Engine`.

    Args:
        ray: The connected module `ray`.
        config: Settings of the engine.
        worker_class: Class of the workers.

    Raises:
        AtlasError: If a worker is larger than this machine.
    """

    def __init__(self, ray: Any, config: EngineConfig, worker_class: type = Worker) -> None:
        self.ray, self.config, self.worker_class = ray, config, worker_class
        self.stats: list[WorkerStats] = []
        self.pool = size_pool(config, self._nodes())
        self.target = self.pool.workers
        self._counted_at = float("-inf")
        self._calls: dict[Any, _ActorHandle] = {}  # by the reference to the result of the call in progress
        self._idle: deque[_ActorHandle] = deque()
        self._batches: dict[str, dict[str, int]] = {}  # batch sizes that fit, by layer and device
        self._failed_starts = 0
        self._setup: Setup | None = None  # of the workers that run now
        self._arguments: tuple[Any, Any] | None = None
        self._actor_class: Any = None
        self._check_room()

    def _check_room(self) -> None:
        room = self.pool.room(self._nodes())
        size = f"a worker of {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        private = self.config.address is None
        if room < 1 and private:
            raise AtlasError(
                f"No node of the cluster has room for {size}: lower engine.cpus_per_worker or engine.gpus_per_worker."
            )
        if room < 1:
            log.warning("No node of the cluster has room for %s yet: waiting %g s for one", size, self.config.patience)
        elif room < self.target:
            log.warning("engine.workers=%d, but the cluster has room for %d: using those", self.target, room)
            if private:
                self.target = room
            self.pool = dataclasses.replace(self.pool, workers=room)

    def execute(self, tasks: Sequence[Task], setup: Setup, on_result: OnResult, on_idle: Callable[[], None]) -> None:
        """See `engine.base.Engine.execute`."""
        self._prepare(setup)
        work = _Round(deque(ordered(tasks)), FailureTracker(self.config), on_result)
        last_alive = time.monotonic()
        try:
            while work.pending or self._busy:
                self._follow_cluster()
                self._start_workers(len(work.pending) + self._busy)
                self._assign(work)
                ready = self._wait()
                on_idle()
                if self._idle or any(handle.stats.name for handle in self._calls.values()):
                    last_alive = time.monotonic()
                else:
                    self._check_patience(time.monotonic() - last_alive)
                for reference in ready:
                    self._collect(reference, work)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `engine.base.Engine.close`."""
        for handle in [*self._calls.values(), *self._idle]:
            self._stop(handle, "")
        self._calls.clear()
        self._idle.clear()

    @property
    def _busy(self) -> int:
        """Number of workers that execute a task."""
        return sum(handle.task is not None for handle in self._calls.values())

    def _nodes(self) -> list[Node]:
        resources = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in resources]

    def _prepare(self, setup: Setup) -> None:
        """Put the setup into the object store, unless the workers already have it."""
        if self._setup is setup:
            return
        self.close()
        self._setup, pool = setup, self.pool
        log.info("%d workers, %g CPUs and %g GPUs each, on %s", pool.workers, pool.cpus, pool.gpus, pool.device)
        for module in plugins.modules():
            # Workers on other machines may not have the user's files.
            self.ray.cloudpickle.register_pickle_by_value(module)
        # max_restarts=0: replacing a dead actor here is faster than the restarts of Ray, and observable.
        options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0}
        self._actor_class = self.ray.remote(**options)(self.worker_class)
        remote = self.config.address is not None or not self.config.shared_fs
        weights = serialize_weights(setup.config.model) if remote and self.worker_class is Worker else None
        sized = dataclasses.replace(setup, threads=pool.threads, device=pool.device)
        self._arguments = (self.ray.put(sized), self.ray.put(weights) if weights is not None else None)

    def _follow_cluster(self) -> None:
        """With `engine.workers=auto`, set the number of workers to what the nodes have room for now."""
        now = time.monotonic()
        if isinstance(self.config.workers, str) and now - self._counted_at >= COUNT_EVERY:
            room = self.pool.room(self._nodes())
            if room != self.target:
                log.info("the cluster now has room for %d workers", room)
            self.target, self._counted_at = room, now

    def _check_patience(self, seconds: float) -> None:
        """Raise `AtlasError` if there has been no worker for too long; `seconds` is since the last one."""
        patience, size = self.config.patience, f"one takes {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        if seconds <= patience:
            return
        if self.pool.room(self._nodes()) < 1:
            raise AtlasError(
                f"No node had room for a worker within {patience:g} s (engine.patience): {size}. "
                "Finished work is kept: run again later."
            )
        if seconds > SLOW_START * patience:
            raise AtlasError(
                f"No worker has started within {seconds:.0f} s, though a node has room: other work may occupy it "
                f"({size}), or its disk is slow. Finished work is kept: run again later, or raise engine.patience."
            )

    def _start_workers(self, tasks: int) -> None:
        """Create the actors that are missing for `tasks` unfinished tasks."""
        assert self._arguments is not None
        setup, weights = self._arguments
        for _ in range(min(self.target, tasks) - len(self._calls) - len(self._idle)):
            actor = self._actor_class.remote(setup, weights=weights)
            self._calls[actor.hello.remote()] = _ActorHandle(actor, WorkerStats("", time.monotonic()))

    def _stop(self, handle: _ActorHandle, reason: str) -> None:
        handle.stats.left, handle.stats.end = time.monotonic(), reason
        with contextlib.suppress(Exception):
            self.ray.kill(handle.actor)

    def _assign(self, work: _Round) -> None:
        """Give pending tasks to idle workers."""
        while self._idle and work.pending:
            handle, task = self._idle.popleft(), work.pending.popleft()
            try:
                reference = handle.actor.do.remote(task, self._batches.get(layer_of(task)), self._files(task))
            except self.ray.exceptions.RayError as error:  # the worker died while it was idle
                work.pending.appendleft(task)
                self._stop(handle, first_line(error))
                continue
            handle.task = task
            self._calls[reference] = handle

    def _wait(self) -> list[Any]:
        """Return references that are ready after at most a second, so that the driver can react to Ctrl-C."""
        if not self._calls:
            time.sleep(0.5)
            return []
        return self.ray.wait(list(self._calls), num_returns=1, timeout=1.0)[0]

    def _collect(self, reference: Any, work: _Round) -> None:
        """Take the result of a finished call."""
        handle = self._calls.pop(reference)
        task, handle.task = handle.task, None
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._failed(handle, task, self._explained(error), work)
            return
        if isinstance(result, str):
            self._failed_starts, handle.stats.name = 0, result
            self.stats.append(handle.stats)
            self._idle.append(handle)
            return
        assert task is not None
        self._finished(handle, task, result, work)

    def _finished(self, handle: _ActorHandle, task: Task, done: Done, work: _Round) -> None:
        write_result(task, done)
        handle.stats.add(done.seconds)
        if done.batch:
            self._batches.setdefault(layer_of(task), {}).update([done.batch])
        if done.restart_reason:
            log.warning("%s: %s; another worker replaces it", handle.stats.name, done.restart_reason)
            self._stop(handle, done.restart_reason)
        else:
            self._idle.append(handle)
        work.tracker.succeeded()
        work.on_result(task, dataclasses.replace(done, data=b""))

    def _explained(self, error: Exception) -> _Error:
        """Classify an error of Ray.

        Raises:
            AtlasError: If the task raised one: it concerns the input, and repeating the task cannot help.
        """
        if isinstance(error, self.ray.exceptions.RayTaskError):
            cause: Any = error.cause  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(cause, AtlasError):
                raise cause from None
            reason = f"{type(cause).__name__}: {cause}"
            return _Error(reason, str(error), 1.0, lost=isinstance(cause, DeviceLost))
        # The actor, its node or its memory is gone. Ray has no type for the first two cases, only words.
        text = str(error)
        node_lost = getattr(error, "preempted", False) or "node has died" in text
        weight = 1.0 / (NODE_LOSSES_PER_FAILURE if node_lost else LOSSES_PER_FAILURE)
        return _Error(f"worker lost: {first_line(error)}", text, weight, True, "creation task" in text)

    def _failed(self, handle: _ActorHandle, task: Task | None, error: _Error, work: _Round) -> None:
        """Repeat or set aside the task of a call that ended in an error, and replace its worker if needed."""
        if task is None or error.lost:
            self._stop(handle, error.reason.removeprefix("worker lost: ").partition("\n")[0])
        else:
            self._idle.append(handle)
        if task is None:
            self._failed_starts += error.in_constructor  # a node may be lost at any time, which says nothing
            log.warning("a worker could not start: %s", error.reason)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise AtlasError(
                    f"{self._failed_starts} workers in a row could not start; the last error:\n{error.detail}"
                )
            return
        failure = work.tracker.failed(task, error.reason, error.detail, error.weight)
        if failure is None:
            work.pending.appendleft(task)
        else:
            work.on_result(task, failure)
            work.tracker.check()

    def _files(self, task: Task) -> Any:
        """Return the dataset images of a task in the object store, if workers cannot read the files of the driver."""
        if self.config.shared_fs or isinstance(task, RenderTask):
            return None
        assert self._setup is not None
        files = image_loading.encoded_images(self._setup.dataset, task.images)
        return self.ray.put(files)


def write_result(task: Task, done: Done) -> None:
    """Write a shard that came back as bytes, to the path of the task, whatever path the worker reports."""
    if done.data:
        write_atomic(Path(task.path), done.data)
