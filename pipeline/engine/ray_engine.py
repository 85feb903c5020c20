"""The engine on Ray: a private instance or an existing cluster, with workers as actors.

Nodes and workers may join and leave during a run. With `engine.workers=auto` the number of workers follows the
cluster; a number is an upper bound. With `engine.max_workers` more workers are created than there is room for: an
autoscaler sees them as demand.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pipeline
from pipeline.config.schema import EngineConfig
from pipeline.core import plugins
from pipeline.core.errors import AtlasError, TryAgainError, first_line
from pipeline.core.machine import COMPILER_LIMIT, SPIN_LIMIT
from pipeline.data import image_loading
from pipeline.engine import handshake
from pipeline.engine.base import (
    LOSSES_PER_FAILURE,
    NODE_LOSSES_PER_FAILURE,
    FailureTracker,
    OnResult,
    ordered,
)
from pipeline.engine.batch_sizes import BatchSizes
from pipeline.engine.connection import ConnectionWatch
from pipeline.engine.deadlines import Deadlines
from pipeline.engine.progress import WorkerStats
from pipeline.engine.resources import Node, size_pool
from pipeline.engine.tasks import CellsTask, Done, RenderTask, Setup, Task, write_result
from pipeline.engine.worker import DeviceLost, Worker
from pipeline.models.loading import serialize_weights

log = logging.getLogger(__name__)

# Seconds between two counts of the nodes of the cluster, and between two looks for tasks that take too long.
COUNT_EVERY = 2.0
LOOK_EVERY = 1.0

# If a node has room, the first worker may take this multiple of `engine.patience` to start: other work may occupy the
# node, and importing torch from a busy disk or a network file system takes minutes.
SLOW_START = 5.0

# Nodes that join start the patience anew, but a run without any worker ends after this multiple of it: nodes may join
# and fail for ever.
MAX_WAIT = 20.0

# Stop after this many consecutive workers whose constructor failed.
MAX_FAILED_STARTS = 3

# If the loop of the driver stood still for longer than this many seconds (a suspended process, a slow disk), the time
# does not count against tasks.
STANDSTILL = 10.0


@dataclasses.dataclass
class _ActorHandle:
    """One actor, from its creation to its end.

    Attributes:
        actor: The Ray actor.
        stats: Statistics of the worker.
        task: The task that it executes; None while it starts or waits.
        limit: Seconds that the task may take.
        deadline: Time at which they end.
    """

    actor: Any
    stats: WorkerStats
    task: Task | None = None
    limit: float = 0.0
    deadline: float = float("inf")


@dataclasses.dataclass(frozen=True)
class _Error:
    """An error that a call of an actor ended in.

    Attributes:
        reason: The error, in one line.
        detail: Its traceback.
        weight: How much it counts as a failure of the task.
        lost: Whether the worker is gone or must be replaced.
        in_constructor: Whether the constructor of the worker failed, if it was not yet at a task.
        batch: (device, number of images) that fit into memory, if the worker learnt it before.
    """

    reason: str
    detail: str
    weight: float
    lost: bool
    in_constructor: bool = False
    batch: tuple[str, int] | None = None


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
        self._known: set[str] = set()  # nodes that have ever been there
        self._joined = time.monotonic()  # when the last of them joined
        self._counted_at = self._turned_at = self._looked_at = float("-inf")
        self._calls: dict[Any, _ActorHandle] = {}  # by the reference to the result of the call in progress
        self._idle: deque[_ActorHandle] = deque()
        self._batches = BatchSizes()
        self._deadlines = Deadlines(config)
        self._failed_starts = 0
        self._start_error = ""
        self._setup: Setup | None = None  # of the workers that run now
        self._arguments: tuple[Any, Any] | None = None
        self._actor_class: Any = None
        self._versions = handshake.versions(pipeline.__name__)
        self._size()
        self._watch = ConnectionWatch(ray)  # last: it must be closed

    def _size(self) -> None:
        """Choose device, size and number of the workers from the nodes that there are now."""
        nodes = self._nodes()
        self.pool = size_pool(self.config, nodes)
        self.target, room = self.pool.workers, self.pool.room(nodes)
        size = f"a worker of {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        private = self.config.address is None
        if room < 1 and private:
            raise AtlasError(
                f"No node of the cluster has room for {size}: lower engine.cpus_per_worker or engine.gpus_per_worker."
            )
        if room < 1:
            log.warning("No node of the cluster has room for %s yet: waiting %g s for one", size, self.config.patience)
        if self._scalable is not None:
            self.target = self._scalable
            self.pool = dataclasses.replace(self.pool, workers=self._scalable)
        elif 1 <= room < self.target:
            log.warning("engine.workers=%d, but the cluster has room for %d: using those", self.target, room)
            if private:
                self.target = room
            self.pool = dataclasses.replace(self.pool, workers=room)

    @property
    def _scalable(self) -> int | None:
        """Number of workers that an autoscaler is asked for; None if none is."""
        asks = isinstance(self.config.workers, str) and self.config.address is not None
        return self.config.max_workers if asks else None

    def await_nodes(self, on_idle: Callable[[], None]) -> None:
        """See `engine.base.Engine.await_nodes`."""
        began = time.monotonic()
        if self.pool.room(self._nodes()) >= 1:
            return
        # The task that waits is the demand that an autoscaler sees.
        probe = self.ray.remote(num_cpus=self.pool.cpus, num_gpus=self.pool.gpus, max_retries=0)(handshake.nothing)
        waiting = probe.remote()
        try:
            while self.pool.room(self._nodes()) < 1:
                self._watch.check()
                on_idle()
                self._check_patience(began)
                time.sleep(0.5)
        finally:
            if not self._watch.reason:
                self.ray.cancel(waiting, force=True)
        self._size()

    def execute(self, tasks: Sequence[Task], setup: Setup, on_result: OnResult, on_idle: Callable[[], None]) -> None:
        """See `engine.base.Engine.execute`."""
        self._prepare(setup)
        work = _Round(deque(ordered(tasks)), FailureTracker(self.config), on_result)
        last_alive = self._turned_at = time.monotonic()
        try:
            while work.pending or self._busy:
                self._watch.check()
                self._follow_cluster()
                self._start_workers(len(work.pending) + self._busy)
                self._assign(work)
                ready = self._wait()
                on_idle()
                if self._idle or any(handle.stats.name for handle in self._calls.values()):
                    last_alive = time.monotonic()
                else:
                    self._check_patience(last_alive)
                for reference in ready:
                    self._collect(reference, work)
                self._end_late_tasks(work)
        except BaseException:
            self._stop_workers()
            raise

    def close(self) -> None:
        """See `engine.base.Engine.close`."""
        self._watch.close()
        self._stop_workers()

    def _stop_workers(self) -> None:
        for handle in [*self._calls.values(), *self._idle]:
            self._stop(handle, "")
        self._calls.clear()
        self._idle.clear()

    @property
    def _busy(self) -> int:
        """Number of workers that execute a task."""
        return sum(handle.task is not None for handle in self._calls.values())

    def _nodes(self) -> list[Node]:
        """Return (CPUs, GPUs) of the nodes that are alive, and note when one has joined."""
        alive = {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}
        if alive.keys() - self._known:
            self._joined = time.monotonic()
            self._known |= alive.keys()
        return [(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in alive.values()]

    def _prepare(self, setup: Setup) -> None:
        """Put the setup into the object store, unless the workers already have it."""
        if self._setup is setup:
            return
        self._stop_workers()
        self._setup, pool = setup, self.pool
        log.info("%d workers, %g CPUs and %g GPUs each, on %s", pool.workers, pool.cpus, pool.gpus, pool.device)
        for module in plugins.modules():
            # Workers on other machines may not have the user's files.
            self.ray.cloudpickle.register_pickle_by_value(module)
        # The project of another machine may be another one: what compares them cannot be imported there.
        self.ray.cloudpickle.register_pickle_by_value(handshake)
        # max_restarts=0: replacing a dead actor here is faster than the restarts of Ray, and observable.
        options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "max_restarts": 0}
        self._actor_class = self.ray.remote(**options)(handshake.VersionedActor)
        remote = self.config.address is not None or not self.config.shared_fs
        weights = serialize_weights(setup.config.model) if remote and self.worker_class is Worker else None
        sized = dataclasses.replace(setup, threads=pool.threads, device=pool.device)
        self._arguments = (
            self.ray.put((self.worker_class, sized)),
            self.ray.put(weights) if weights is not None else None,
        )

    def _follow_cluster(self) -> None:
        """With `engine.workers=auto`, set the number of workers to what the nodes have room for now."""
        now = time.monotonic()
        follows = isinstance(self.config.workers, str) and self._scalable is None
        if follows and now - self._counted_at >= COUNT_EVERY:
            room = self.pool.room(self._nodes())
            if room != self.target:
                log.info("the cluster now has room for %d workers", room)
            self.target, self._counted_at = room, now

    def _check_patience(self, since: float) -> None:
        """Raise `TryAgainError` if there has been no worker for too long.

        Args:
            since: When the last worker was alive, or the waiting for one began.
        """
        now, patience = time.monotonic(), self.config.patience
        size = f"one takes {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        if now - since <= patience:
            return
        room = self.pool.room(self._nodes())
        waited, settled = now - since, now - max(since, self._joined)
        if room < 1 and (settled > patience or waited > MAX_WAIT * patience):
            raise TryAgainError(
                f"No node had room for a worker within {waited:.0f} s (engine.patience={patience:g}): {size}. "
                "Finished work is kept: run again later, or raise engine.patience if nodes take longer to start."
            )
        if settled > SLOW_START * patience or waited > MAX_WAIT * patience:
            last = f" The last one that tried ended with: {self._start_error}" if self._start_error else ""
            raise TryAgainError(
                f"No worker has started within {waited:.0f} s, though a node has room: other work may occupy it "
                f"({size}), or its disk is slow. Finished work is kept: run again later, or raise engine.patience."
                f"{last}"
            )

    def _start_workers(self, tasks: int) -> None:
        """Create the actors that are missing for `tasks` unfinished tasks."""
        assert self._arguments is not None
        arguments, weights = self._arguments
        # The variable of OpenMP replaces the limit, as on this machine.
        environment = COMPILER_LIMIT | ({} if "OMP_WAIT_POLICY" in os.environ else SPIN_LIMIT)
        expected = None if self.config.mixed_versions else self._versions
        for _ in range(min(self.target, tasks) - len(self._calls) - len(self._idle)):
            actor = self._actor_class.remote(pipeline.__name__, [arguments], weights, environment)
            self._calls[actor.hello.remote(expected)] = _ActorHandle(actor, WorkerStats("", time.monotonic()))

    def _stop(self, handle: _ActorHandle, reason: str) -> None:
        handle.stats.left, handle.stats.end = time.monotonic(), reason
        if self._watch.reason:
            return  # without its own processes Ray would end this one
        with contextlib.suppress(Exception):
            self.ray.kill(handle.actor)

    def _assign(self, work: _Round) -> None:
        """Give pending tasks to idle workers."""
        while self._idle and work.pending:
            handle, task = self._idle.popleft(), work.pending.popleft()
            try:
                reference = handle.actor.do.remote(task, self._batches.of(task), self._files(task))
            except self.ray.exceptions.RayError as error:  # the worker died while it was idle
                work.pending.appendleft(task)
                self._stop(handle, first_line(error))
                continue
            handle.task, handle.limit = task, self._deadlines.limit(task)
            handle.deadline = time.monotonic() + handle.limit
            self._calls[reference] = handle

    def _wait(self) -> list[Any]:
        """Return references that are ready after at most a second, so that the driver can react to Ctrl-C."""
        if not self._calls:
            time.sleep(0.5)
            return []
        return self.ray.wait(list(self._calls), num_returns=1, timeout=1.0)[0]

    def _end_late_tasks(self, work: _Round) -> None:
        """Replace workers whose task has taken too long: they hang in a dead mount or in a call of the GPU."""
        now = time.monotonic()
        standstill, self._turned_at = now - self._turned_at, now
        if standstill > STANDSTILL:
            for handle in self._calls.values():
                handle.deadline += standstill
        if now - self._looked_at < LOOK_EVERY:
            return
        self._looked_at = now
        for reference, handle in list(self._calls.items()):
            task = handle.task
            if task is None or now <= handle.deadline or self.ray.wait([reference], timeout=0)[0]:
                continue
            del self._calls[reference]
            handle.task = None
            self._deadlines.expired(task)
            reason = (
                f"did not end within {handle.limit:.0f} s, at an estimate of {max(task.cost, 0.0):.3g} s "
                f"(engine.timeout, engine.timeout_seconds); its worker {handle.stats.name} hangs and is replaced"
            )
            self._failed(handle, task, _Error(reason, reason, 1.0, lost=True), work)

    def _collect(self, reference: Any, work: _Round) -> None:
        """Take the result of a finished call."""
        handle = self._calls.pop(reference)
        task, handle.task = handle.task, None
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._failed(handle, task, self._explained(error), work)
            return
        if task is None:
            self._greeted(handle, result)
        else:
            self._finished(handle, task, result, work)

    def _greeted(self, handle: _ActorHandle, answer: Mapping[str, str]) -> None:
        """Accept a worker that has started.

        Raises:
            AtlasError: If its versions differ from those of the driver, unless `engine.mixed_versions` is set.
        """
        versions = {name: value for name, value in answer.items() if name != "name"}
        differing = handshake.differences(self._versions, versions)
        if differing:
            message = f"The worker {answer['name']} has other versions than this driver: {', '.join(differing)}."
            if not self.config.mixed_versions:
                fix = (
                    "Install the same versions everywhere (the same commit of the project, and constraints.txt)"
                    if self.config.address is not None
                    else "Its files have changed since this command started: run it again"
                )
                raise AtlasError(f"{message} {fix}, or accept other results with engine.mixed_versions=true.")
            log.warning("%s Its results may differ", message)
        self._failed_starts = 0
        handle.stats.name, handle.stats.versions = answer["name"], versions
        self.stats.append(handle.stats)
        self._idle.append(handle)

    def _finished(self, handle: _ActorHandle, task: Task, done: Done, work: _Round) -> None:
        write_result(task, done)
        handle.stats.add(done.seconds)
        self._deadlines.finished(task, done.seconds)
        self._batches.note(task, done.batch)
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
            lost, batch = (True, cause.batch) if isinstance(cause, DeviceLost) else (False, None)
            return _Error(reason, str(error), 1.0, lost, in_constructor=True, batch=batch)
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
            self._start_error = error.reason
            self._failed_starts += error.in_constructor  # a node may be lost at any time, which says nothing
            log.warning("a worker could not start: %s", error.reason)
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise AtlasError(
                    f"{self._failed_starts} workers in a row could not start; the last error:\n{error.detail}"
                )
            return
        self._batches.note(task, error.batch)
        failure = work.tracker.failed(task, error.reason, error.detail, error.weight)
        if failure is None:
            work.pending.appendleft(task)
        else:
            work.on_result(task, failure)
            work.tracker.check()

    def _files(self, task: Task) -> Any:
        """Return the dataset images of a task in the object store, if workers cannot read the files of the driver."""
        if self.config.shared_fs or isinstance(task, RenderTask | CellsTask):
            return None
        assert self._setup is not None
        files = image_loading.encoded_images(self._setup.dataset, task.images)
        return self.ray.put(files)
