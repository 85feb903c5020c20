"""The lock of a run folder in an object store: an object that must not exist before, and that its holder renews.

Stores with conditional writes (Amazon S3, Google Cloud Storage, MinIO and others) refuse the second of two commands at
once. A store that ignores the condition lets both begin; the one that finds the other's name in the object at its next
sign of life then no longer publishes anything but shards. No result can be damaged by that: shards are written once,
and every object appears whole.
"""

import contextlib
import datetime
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.errors import AtlasError
from pipeline.store import run_lock
from pipeline.store.remote import RemoteFolder
from pipeline.store.run_lock import LockedError

log = logging.getLogger(__name__)

NAME = ".lock"

# Seconds between two signs of life of the holder, without one until the lock may be taken over, and from a takeover
# until it counts: two commands may find the same lost lock.
BEAT, PATIENCE, SETTLE = 15.0, 120.0, 2.0


class RemoteLock:
    """A lock that this process holds.

    Attributes:
        lost: Whether another process has taken it over, while the store could not be reached.
    """

    def __init__(self, remote: RemoteFolder) -> None:
        self.lost = False
        self._remote = remote
        self._holder = {**run_lock.holder(), "machine": _machine()}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="remote lock")

    @property
    def _content(self) -> bytes:
        return json.dumps({**self._holder, "alive": time.time()}).encode()

    def take(self) -> None:
        """Take the lock; that of a holder that is lost is taken over.

        Raises:
            LockedError: If another process is at work.
        """
        taken_over = False
        for _ in range(2):
            present = _read(self._remote)
            if present is None and self._remote.write(NAME, self._content, new=True):
                break
            present = _read(self._remote)
            if present is None or self._is_own(present):
                break  # the answer to the write was lost
            if _is_alive(self._remote, present):
                raise LockedError(present)
            if (_read(self._remote) or {}).get("token") == present.get("token"):
                self._remote.remove(NAME)
                log.warning("the lock of %s was left behind and is taken over", LockedError(present))
                taken_over = True
        if taken_over:
            time.sleep(SETTLE)
        present = _read(self._remote)
        if present is None or not self._is_own(present):
            raise LockedError(present or {})
        self._thread.start()

    def release(self) -> None:
        """Release the lock."""
        self._done.set()
        self._thread.join()
        with contextlib.suppress(AtlasError):  # a store that is lost: the lock is taken over later
            present = _read(self._remote)
            if present is not None and self._is_own(present):
                self._remote.remove(NAME)

    def _is_own(self, present: Mapping[str, Any]) -> bool:
        return present.get("token") == self._holder["token"]

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with contextlib.suppress(AtlasError):
                present = _read(self._remote)
                if present is not None and not self._is_own(present):
                    self.lost = True
                    return
                self._remote.write(NAME, self._content)


@contextlib.contextmanager
def held(remote: RemoteFolder) -> Iterator[RemoteLock]:
    """Hold the lock of a folder in the block.

    Raises:
        LockedError: If another process holds it.
    """
    lock = RemoteLock(remote)
    lock.take()
    try:
        yield lock
    finally:
        lock.release()


def is_held(remote: RemoteFolder) -> bool:
    """Return whether a process holds the lock of a folder; needs permission to read only."""
    present = _read(remote)
    if present is None:
        return False
    alive = present.get("alive")
    return isinstance(alive, float) and time.time() - alive < PATIENCE


def _read(remote: RemoteFolder) -> dict[str, Any] | None:
    """Return what the lock says about its holder; None if there is no lock, empty if it says nothing."""
    content = remote.read(NAME)
    if content is None:
        return None
    with contextlib.suppress(ValueError):
        present = json.loads(content)
        return present if isinstance(present, dict) else {}
    return {}


def _is_alive(remote: RemoteFolder, present: Mapping[str, Any]) -> bool:
    """Return whether the holder of a lock is at work."""
    if present.get("machine") == _machine() and isinstance(present.get("process"), int):
        return psutil.pid_exists(present["process"])
    written = remote.modified(NAME)
    return written is None or (_store_time(remote) - written).total_seconds() < PATIENCE


def _store_time(remote: RemoteFolder) -> datetime.datetime:
    """Return the present time by the clock of the store, which may not be that of this machine."""
    probe = f"{NAME}-{secrets.token_hex(4)}"
    remote.write(probe, b"")
    try:
        return remote.modified(probe) or datetime.datetime.now(datetime.UTC)
    finally:
        remote.remove(probe)


def _machine() -> str:
    """Return a name of this machine under which process numbers mean the same; containers have numbers of their own."""
    texts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        texts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        texts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(texts)
