"""The working copy of a run folder in an object store: what is fetched at the start of a command and published by it.

The store is the truth. A command fetches what the store has and the copy lacks, works in the copy, and publishes what
is new in it: shards while it works, everything else in the end. Shards that could not be published stay in the copy,
and the next command publishes them. Only files that a command has replaced are removed from the store.
"""

import contextlib
import hashlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.store import remote_lock
from pipeline.store.remote import Entry, RemoteFolder
from pipeline.store.remote_lock import RemoteLock

log = logging.getLogger(__name__)

# What was last fetched or published, by file; in the working copy only.
RECORD = ".remote.json"

# A random number that the store and its working copies share: another run may have had this URL.
IDENTITY = ".run-id"

# Files that concern one machine only, by the start of their path.
OWN = (".lock", RECORD, ".site.new/", ".site.old/")

# Names in the folder of a run. Without a configuration there is no run, and nothing is published.
CONFIG, SHARDS, ATLAS, SITE, SITE_STATE, STATUS = "config.yaml", "shards", "atlas.h5", "site", ".site", "status.json"

# Seconds between two looks for new shards, and the number of files that are transferred at a time.
PUBLISH_EVERY = 5.0
TRANSFERS = 8


class Mirror:
    """A folder in an object store and its working copy on this machine.

    Args:
        url: URL of the folder in the store.
        folder: The working copy.

    Raises:
        AtlasError: If the package for the URL is not installed.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.remote, self.folder = RemoteFolder(url), folder
        self._record: dict[str, dict[str, Any]] = {}
        self._removed: set[str] = set()
        self._publishing = threading.Lock()

    def fetch(self, parts: Sequence[str] | None = None) -> None:
        """Fetch what the store has and the working copy lacks, or has in an earlier version.

        Args:
            parts: Files and folders to fetch beside the small files of the run; None for all.

        Raises:
            AtlasError: If the working copy belongs to another run.
            TryAgainError: If the store can't be read.
        """
        self._record = _read_record(self.folder)
        listing = {name: entry for name, entry in self.remote.listing().items() if _is_mirrored(name)}
        if not listing and not self.folder.exists():
            return
        self._check_identity(IDENTITY in listing)
        wanted = {name for name in listing if parts is None or _belongs(name, parts)}
        missing = sorted(name for name in wanted if not self._has(name, listing[name]))
        if missing:
            size = sum(listing[name].size for name in missing)
            log.info("fetching %d files (%.1f MB) of %s", len(missing), size / 1e6, self.remote.url)

        def get(name: str) -> None:
            self.remote.download(name, self.folder / name)
            self._note(name, listing[name].version)

        try:
            _each(get, missing)
            self._forget(listing)
        finally:
            self._save()

    def publish(self, everything: bool = True) -> None:
        """Publish what is new in the working copy: all of it, or only shards and the small files of the run.

        What refers to other files is published after them.

        Raises:
            TryAgainError: If the store can't be written to. What is missing there is published by the next call.
        """
        if not (self.folder / CONFIG).is_file():
            return
        with self._publishing:
            files = [name for name in self._files(everything) if _is_mirrored(name)]
            changed = [name for name in files if self._is_changed(name)]
            try:
                for rank in sorted(set(map(_rank, changed))):
                    _each(self._put, [name for name in changed if _rank(name) == rank])
                if everything:
                    self._tidy()
            finally:
                if changed or everything:
                    self._save()

    def removed(self, paths: Collection[Path]) -> None:
        """Note files that were removed on purpose: `publish` removes them from the store, too."""
        self._removed |= {path.relative_to(self.folder).as_posix() for path in paths}

    def _forget(self, listing: Collection[str]) -> None:
        """Handle files that were in the store before and are no longer."""
        if IDENTITY not in listing:  # the whole run was removed: all of it is published again
            self._record.clear()
            return
        for name in [name for name in self._record if name not in listing and not name.startswith(f"{SHARDS}/")]:
            # Shards were compacted on another machine, and stay here; of a site only the present files may remain.
            if name.startswith(f"{SITE}/"):
                (self.folder / name).unlink(missing_ok=True)
            del self._record[name]

    def _check_identity(self, in_store: bool) -> None:
        """Compare the identity of the run in the store with that of the working copy."""
        path = self.folder / IDENTITY
        here = path.read_bytes() if path.is_file() else None
        there = self.remote.read(IDENTITY) if in_store else None
        if None not in (here, there) and here != there:
            raise AtlasError(
                f"{self.folder} is the working copy of another run that was at {self.remote.url}. Move it away, or "
                "choose another folder for working copies: run.scratch=…"
            )

    def identify(self) -> None:
        """Give a new run an identity."""
        if not (self.folder / IDENTITY).is_file():
            write_atomic(self.folder / IDENTITY, secrets.token_hex(16).encode())

    def _has(self, name: str, entry: Entry) -> bool:
        """Return whether the working copy has an object, perhaps with changes that are not published yet."""
        path, known = self.folder / name, self._record.get(name)
        if not path.is_file():
            return False
        if known is not None and known["version"] == entry.version:
            return True
        if name.startswith(f"{SHARDS}/") and path.stat().st_size == entry.size:
            self._note(name, entry.version)
            return True
        return False

    def _files(self, everything: bool) -> Iterator[str]:
        """Yield the files of the working copy that the store shall have."""
        if not everything:
            later = (ATLAS, SITE_STATE)
            yield from (path.name for path in self.folder.iterdir() if path.is_file() and path.name not in later)
            yield from (path.relative_to(self.folder).as_posix() for path in (self.folder / SHARDS).rglob("*.h5"))
            return
        if not (self.folder / IDENTITY).is_file():
            raise AtlasError(f"{self.folder} was removed while a command was at work in it: run it again.")
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not path.is_symlink():
                yield name

    def _is_changed(self, name: str) -> bool:
        known = self._record.get(name)
        try:
            state = _state(self.folder / name)
        except OSError:
            return False
        if known is None:
            return True
        if known["local"] == state:
            return False
        if known["md5"] and known["md5"] == _md5(self.folder / name):
            known["local"] = state
            return False
        return True

    def _put(self, name: str) -> None:
        path = self.folder / name
        try:
            before = _state(path)
            self.remote.upload(path, name)
        except (AtlasError, OSError):
            if not path.is_file():  # set aside or replaced meanwhile
                return
            raise
        self._record[name] = {"version": "", "local": before, "md5": _md5(path)}

    def _note(self, name: str, version: str) -> None:
        """Record that the working copy has a file of the store."""
        path = self.folder / name
        self._record[name] = {"version": version, "local": _state(path), "md5": _md5(path)}

    def _remove_replaced(self) -> None:
        """Remove objects whose file was removed on purpose, set aside as damaged, or is of an earlier site."""
        built = (self.folder / SITE / "index.html").is_file()

        def is_replaced(name: str) -> bool:
            path = self.folder / name
            if path.exists():
                return False
            set_aside = any(path.parent.glob(f"{path.name}.damaged*"))
            return name in self._removed or set_aside or (built and name.startswith(f"{SITE}/"))

        replaced = [name for name in self._record if is_replaced(name)]
        _each(self.remote.remove, replaced)
        for name in replaced:
            del self._record[name]

    def _tidy(self) -> None:
        """Remove what was replaced from the store, and record the versions of what is there."""
        self._remove_replaced()
        listing = self.remote.listing()
        for name in [name for name in listing if _is_unfinished(name)]:
            self.remote.remove(name)  # of a command that was killed
        for name, entry in self._record.items():
            entry["version"] = listing[name].version if name in listing else ""

    def _save(self) -> None:
        text = json.dumps(self._record, indent=0)
        write_atomic(self.folder / RECORD, text.encode())


@contextlib.contextmanager
def at_work(mirror: Mirror) -> Iterator[None]:
    """Hold the lock of a run in an object store, with a working copy that is fetched before and published after.

    New shards are published while the block is at work.

    Raises:
        LockedError: If another process holds the lock.
        AtlasError: If this process has lost the lock to another one.
        TryAgainError: If the store can't be reached.
    """
    with remote_lock.held(mirror.remote) as lock:
        mirror.fetch()
        mirror.identify()
        publisher = _Publisher(mirror)
        try:
            yield
        except BaseException:
            publisher.stop()
            try:
                _publish(mirror, lock)
            except AtlasError as error:
                log.warning("%s", error)
            raise
        publisher.stop()
        _publish(mirror, lock)


def _publish(mirror: Mirror, lock: RemoteLock) -> None:
    """Publish everything, or only shards if the lock was lost."""
    try:
        mirror.publish(everything=not lock.lost)
    except TryAgainError as error:
        raise TryAgainError(f"{error} What is not there yet is in {mirror.folder}.") from error
    if lock.lost:
        raise AtlasError(
            f"Another command has taken over {mirror.remote.url}, because this one could not reach it for minutes. The "
            "shards of this one are published; the same command writes the rest."
        )


class _Publisher:
    """Publishes new shards every few seconds, in a thread of its own."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="publisher")
        self._thread.start()

    def stop(self) -> None:
        """Stop after the transfers in progress."""
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        warned = False
        while not self._done.wait(PUBLISH_EVERY):
            try:
                self._mirror.publish(everything=False)
                warned = False
            except Exception as error:  # the last call, in the main thread, raises it
                if not warned:
                    log.warning("%s Trying again while the work goes on.", error)
                warned = True


def _is_mirrored(name: str) -> bool:
    """Return whether a file belongs into the store: not if it is unfinished, or concerns one machine only."""
    return not name.startswith(OWN) and not _is_unfinished(name)


def _is_unfinished(name: str) -> bool:
    return ".tmp-" in name.rpartition("/")[2]


def _belongs(name: str, parts: Sequence[str]) -> bool:
    small = "/" not in name and name != ATLAS and ".damaged" not in name
    return small or any(name == part or name.startswith(f"{part}/") for part in parts)


def _rank(name: str) -> int:
    """Return the place of a file in the order of publication."""
    if name.startswith(f"{SITE}/"):
        return 3 if name.endswith(".html") else 2
    return {IDENTITY: -1, ATLAS: 1, SITE_STATE: 4, STATUS: 5}.get(name, 0)


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _md5(path: Path) -> str:
    """Return the digest of a small file, to find those that were written again with the same content."""
    if path.suffix == ".h5":
        return ""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _each(work: Callable[[str], None], names: Sequence[str]) -> None:
    """Call `work` for each name, several at a time; stop at the first error."""
    if not names:
        return
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="transfer") as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was last fetched or published; empty if it can't be read, which costs a comparison only."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if isinstance(record, dict) and all(
            isinstance(entry, dict) and {"version", "local", "md5"} <= entry.keys() for entry in record.values()
        ):
            return record
    return {}
