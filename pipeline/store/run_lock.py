"""The lock of a run folder: two commands that write to one folder would undo each other's work.

It is taken with `flock`, which the kernel releases when a process ends, however it ends. Some file systems lack it
(Lustre mounted without the option flock, some FUSE systems): there the lock is a second file that must not exist
before, whose holder renews its time as long as it lives. Both name their holder.
"""

import contextlib
import datetime
import errno
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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

# Errors that mean that another process holds the lock, and those of file systems without `flock`.
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

# Seconds between two signs of life of the holder, and without one until the lock of a lost host may be taken over.
BEAT, PATIENCE = 10.0, 120.0


class LockedError(Exception):
    """Another process holds the lock; the message says which one, as far as it is known.

    Attributes:
        since: When it took the lock, in ISO format; empty if it is not known.
    """

    def __init__(self, holder: Mapping[str, Any]) -> None:
        super().__init__(_described(holder))
        self.since = str(holder.get("since", ""))


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock of the file `path` in the block.

    Raises:
        LockedError: If another process holds it.
        OSError: If it can be neither opened nor made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with _locked(path, descriptor):
            yield
    finally:
        os.close(descriptor)  # releases flock


def _locked(path: Path, descriptor: int) -> contextlib.AbstractContextManager[None]:
    """Lock the open file `path`, or return the context manager that holds its lock by a marker."""
    try:
        has_flock = _flock(descriptor, exclusive=True)
    except BlockingIOError as error:
        raise LockedError(_read(path)) from error
    if not has_flock:
        log.warning("This file system has no flock: %s names the command at work", _marker(path).name)
        return _held_by_marker(_marker(path))
    marker = _marker(path)
    if marker.exists() and _is_alive(marker, _file_system_time(marker)):  # of a host whose mount has no flock
        raise LockedError(_read(marker))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(holder()).encode(), 0)
    return contextlib.nullcontext()


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock of `path`; needs permission to read only."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if _flock(descriptor, exclusive=False):
                return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return _is_alive(_marker(path), time.time())
    return False


def _flock(descriptor: int, exclusive: bool) -> bool:
    """Lock an open file; return False if the file system cannot.

    Raises:
        BlockingIOError: If another process holds the lock.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def holder() -> dict[str, Any]:
    """Return what a lock says about its holder, this process; the token is another one with each call."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": _host(), "process": os.getpid(), "since": now, "token": secrets.token_hex(8)}


def _host() -> str:
    return os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")


def _read(path: Path) -> dict[str, Any]:
    """Return the holder that a file names; empty if it names none."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if isinstance(holder, dict) else {}
    return {}


def _described(holder: Mapping[str, Any]) -> str:
    if not holder:
        return ""
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"


def _is_alive(marker: Path, now: float) -> bool:
    """Return whether the holder that a marker names is at work; `now` is the time of its file system."""
    holder = _read(marker)
    try:
        age = now - marker.stat().st_mtime
    except OSError:
        return False
    if holder.get("host") == _host() and isinstance(holder.get("process"), int):
        return psutil.pid_exists(holder["process"])
    return age < PATIENCE


@contextlib.contextmanager
def _held_by_marker(marker: Path) -> Iterator[None]:
    """Hold a lock by a file that only one process can make, and renew its time as a sign of life."""
    content = json.dumps(holder())
    _make(marker, content)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(marker)

    thread = threading.Thread(target=beat, daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if marker.exists() and marker.read_text(encoding="utf-8") == content:
            marker.unlink()


def _make(marker: Path, content: str) -> None:
    """Make a marker; that of a holder that is lost is taken over.

    Raises:
        LockedError: If another process is at work.
    """
    for _ in range(2):
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                os.write(descriptor, content.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            return
        lost = _read(marker)
        if _is_alive(marker, _file_system_time(marker)):
            break
        _take_away(marker, lost)
    raise LockedError(_read(marker))


def _file_system_time(marker: Path) -> float:
    """Return the present time by the clock that sets times of files beside `marker`, which may be a server's."""
    probe = marker.with_name(f"{marker.name}.tmp-{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _take_away(marker: Path, lost: dict[str, Any]) -> None:
    """Remove the marker of a lost holder, unless another process has done so and made its own."""
    aside = marker.with_name(f"{marker.name}.tmp-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        marker.rename(aside)
        if _read(aside) != lost:
            with contextlib.suppress(FileExistsError):
                os.link(aside, marker)
        else:
            log.warning("the lock of %s was left behind and is taken over", _described(lost) or "an unknown process")
        aside.unlink()
