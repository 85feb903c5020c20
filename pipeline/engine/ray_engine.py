"""Ray: a private instance or somebody's cluster, workers as actors, and one driver loop over them.

The only room that knows Ray. Nodes and workers may come and go during a run: with `engine.workers=auto` the
crew follows the cluster, and a number asks for so many and takes what there is.
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
from pipeline.core.errors import AtlasError, first_line
from pipeline.engine.inline import LOSSES_A_FAILURE, FailureTracker, OnResult, ordered, size_pool
from pipeline.engine.progress import WorkerStats
from pipeline.engine.tasks import Done, Setup, Task
from pipeline.engine.worker import DeviceLost, Worker
from pipeline.models.loading import packed_weights
from pipeline.store.shards import place

log = logging.getLogger(__name__)

# How often the nodes of the cluster are counted, in seconds.
COUNT_EVERY = 2.0

# Where a node has room, a first worker may take so many times `engine.patience`: other work may hold the node for a
# while, and Python takes minutes to import torch from a busy disk or a network's.
SLOW_START = 5.0

# So many workers in a row that raise before they can say hello mean that none ever will.
UNBORN = 3


@contextlib.contextmanager
def connected(config: EngineConfig) -> Iterator[Any]:
    """Ray, connected: a private instance on this machine, or the cluster at `config.address`. Left on exit."""
    if config.address is None:
        # Ray of its own accord would write a token into the home folder; a private instance needs none on disk.
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray replaces a loopback address by the machine's own and listens on all interfaces, unless it
        # believes that no cluster can be made here.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # A "CPU" worker on a machine with GPUs must not see them; Ray leaves them visible otherwise.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        import ray
    except ImportError as error:
        raise AtlasError("Ray is not installed; use engine=inline.") from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.address is None:
        options |= {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        # Ray runs workers with niceness 15: beside two busy processes on two cores they would get 2 % of a core, while
        # the inline engine, and the passes that estimates are timed with, get a third.
        options["_system_config"] = {"worker_niceness": 0}
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


def _reachable(address: str) -> None:
    """Ray tries a dead address for many minutes; a person wants to know within seconds."""
    match = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address)
    if match:
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except OSError as error:
            raise AtlasError(f"No Ray cluster at engine.address={address}: {error}") from error


@dataclasses.dataclass
class _ActorHandle:
    """One actor, from being asked for to its end; `task` is what it is at, None while it starts or waits."""

    actor: Any
    post: WorkerStats
    task: Task | None = None
    began: float = 0.0


class OnRay:
    """Tasks on Ray actors; see `engine.Engine`."""

    def __init__(self, ray: Any, config: EngineConfig, kind: type = Worker) -> None:
        self.ray, self.config, self.kind = ray, config, kind
        self.posts: list[WorkerStats] = []
        self.counted = float("-inf")
        self.pool = size_pool(config, self._nodes())
        self.wanted = self.pool.workers
        room = self.pool.room(self._nodes())
        size = f"a worker of {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        if room < 1 and config.address is None:
            raise AtlasError(
                f"No node of the cluster has room for {size}: lower engine.cpus_per_worker or engine.gpus_per_worker."
            )
        if room < 1:
            log.warning("No node of the cluster has room for %s yet: waiting %g s for one", size, config.patience)
        elif room < self.wanted:
            log.warning("engine.workers=%d, but the cluster has room for %d: using those", self.wanted, room)
            if config.address is None:
                self.wanted = room
            self.pool = dataclasses.replace(self.pool, workers=room)

    def _nodes(self) -> list[tuple[float, float]]:
        found = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return [(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in found]

    def _count(self) -> None:
        """Follow the cluster: with `auto`, as many workers as its nodes have room for now."""
        now = time.monotonic()
        if isinstance(self.config.workers, str) and now - self.counted >= COUNT_EVERY:
            room = self.pool.room(self._nodes())
            if room != self.wanted:
                log.info("the cluster now has room for %d workers", room)
            self.wanted, self.counted = room, now

    def _patient(self, alone: float) -> None:
        """Raise `AtlasError` if there has been no worker for too long; `alone` in seconds."""
        patience, size = self.config.patience, f"one takes {self.pool.cpus:g} CPUs and {self.pool.gpus:g} GPUs"
        if alone <= patience:
            return
        if self.pool.room(self._nodes()) < 1:
            raise AtlasError(
                f"No node had room for a worker within {patience:g} s (engine.patience): {size}. "
                "Everything finished is kept: run again later."
            )
        if alone > SLOW_START * patience:
            raise AtlasError(
                f"No worker has started within {alone:.0f} s, though a node has room: other work may hold it ({size}), "
                "or its disk is slow. Everything finished is kept: run again later, or raise engine.patience."
            )

    def execute(self, tasks: Sequence[Task], setup: Setup, finished: OnResult, idle: Callable[[], None]) -> None:
        """See `engine.Engine.execute`."""
        ray, team = self.ray, self.pool
        setup = dataclasses.replace(setup, threads=team.threads, device=team.device)
        log.info("%d workers, %g CPUs and %g GPUs each, on %s", team.workers, team.cpus, team.gpus, team.device)
        # max_restarts=0: a dead actor is replaced here, which is faster than Ray's own restarts and observable.
        actor = ray.remote(num_cpus=team.cpus, num_gpus=team.gpus, max_restarts=0)(self.kind)
        far = self.config.address is not None or not self.config.shared_fs
        weights = packed_weights(setup.config.model) if far and self.kind is Worker else None
        given = (ray.put(setup), ray.put(weights) if weights is not None else None)
        pending = deque(ordered(tasks))
        tries, learnt = FailureTracker(self.config), {}
        hands: dict[Any, _ActorHandle] = {}  # by the reference that is waited for
        free: deque[_ActorHandle] = deque()
        unborn = 0  # workers in a row that died before they could say hello
        alone = time.monotonic()  # since when there has been no worker at all

        def hire() -> None:
            worker = actor.remote(given[0], weights=given[1])
            hands[worker.hello.remote()] = _ActorHandle(worker, WorkerStats("", time.monotonic()))

        def dismiss(hand: _ActorHandle, why: str) -> None:
            hand.post.left, hand.post.end = time.monotonic(), why
            with contextlib.suppress(Exception):
                ray.kill(hand.actor)

        try:
            while pending or any(hand.task for hand in hands.values()):
                self._count()
                left = len(pending) + sum(hand.task is not None for hand in hands.values())
                for _ in range(min(self.wanted, left) - len(hands) - len(free)):
                    hire()
                while free and pending:
                    hand, task = free.popleft(), pending.popleft()
                    try:
                        files = self._files(task, setup)
                        reference = hand.actor.do.remote(task, learnt.get(task.layer), files)
                    except ray.exceptions.RayError as error:  # it died while it was idle
                        pending.appendleft(task)
                        dismiss(hand, first_line(error))
                        continue
                    hand.task, hand.began = task, time.monotonic()
                    hands[reference] = hand
                # An explicit timeout: the driver must hear a Ctrl-C and show that it lives.
                ready, _ = ray.wait(list(hands), num_returns=1, timeout=1.0) if hands else ([], time.sleep(0.5))
                idle()
                if free or any(hand.post.name for hand in hands.values()):
                    alone = time.monotonic()
                else:
                    self._patient(time.monotonic() - alone)
                for reference in ready:
                    hand = hands.pop(reference)
                    task, hand.task = hand.task, None
                    try:
                        answer = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        cause = error.cause
                        if isinstance(cause, AtlasError):
                            raise cause from None
                        if task is None or isinstance(cause, DeviceLost):
                            dismiss(hand, first_line(cause))
                        else:
                            free.append(hand)
                        reason, detail, weight = f"{type(cause).__name__}: {cause}", str(error), 1.0
                    except ray.exceptions.RayError as error:  # the actor, its node or its memory is gone
                        dismiss(hand, first_line(error))
                        gone = getattr(error, "preempted", False) or "node has died" in str(error)
                        weight = 0.0 if gone else 1.0 / LOSSES_A_FAILURE
                        reason, detail = f"worker lost: {first_line(error)}", str(error)
                    else:
                        if isinstance(answer, str):
                            unborn, hand.post.name = 0, answer
                            self.posts.append(hand.post)
                            free.append(hand)
                            continue
                        assert task is not None
                        self._keep(task, answer)
                        hand.post.busy, hand.post.tasks = hand.post.busy + answer.seconds, hand.post.tasks + 1
                        if answer.batch:
                            learnt.setdefault(task.layer, {}).update([answer.batch])
                        if answer.worn:
                            log.warning("%s: %s; another takes its place", hand.post.name, answer.worn)
                            dismiss(hand, answer.worn)
                        else:
                            free.append(hand)
                        tries.in_a_row = 0
                        finished(task, dataclasses.replace(answer, data=b""))
                        continue
                    if task is None:
                        unborn += "creation task" in detail  # its own error; a node may die at any time
                        log.warning("a worker could not start: %s", reason)
                        if unborn >= UNBORN:
                            raise AtlasError(f"{unborn} workers in a row could not start; the last said:\n{detail}")
                        continue
                    failure = tries.failed(task, reason, detail, weight)
                    if failure is None:
                        pending.appendleft(task)
                    else:
                        finished(task, failure)
                        tries.check()
        finally:
            for hand in [*hands.values(), *free]:
                dismiss(hand, "")

    def _files(self, task: Task, setup: Setup) -> Any:
        """The photographs of a task as bytes in the object store, where workers can't see the driver's files."""
        if self.config.shared_fs or task.stage == "render":
            return None
        found = {}
        for photo in (setup.dataset.photos[i] for i in task.indices):
            # A file that can't be read is told by the worker, like any other broken photograph.
            with contextlib.suppress(OSError, ValueError):
                if photo.picture not in found:
                    found[photo.picture] = setup.dataset.content(photo)
        return self.ray.put(found)

    def _keep(self, task: Task, done: Done) -> None:
        """Write a shard that came back as bytes: under the driver's own path, whatever the worker says."""
        if done.data:
            place(Path(task.path), done.data)
