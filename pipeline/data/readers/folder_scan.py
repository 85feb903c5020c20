"""The files below a folder: listed with their sizes, and listed again only where a folder has changed."""

import dataclasses
import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.core.errors import AtlasError
from pipeline.data.storage_errors import is_storage_error

log = logging.getLogger(__name__)

# Under this name files without a suffix are counted.
NO_SUFFIX = "(no suffix)"

# A folder that changed less than so many seconds ago may change again within the resolution of its times.
SETTLED = 2.0

# Errors of the status of a path that leads to nothing.
NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

# Device-independent number of a folder, and the times of its last change: nobody can set the second of them.
Stamp = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Folder:
    """One listed folder.

    Attributes:
        path: POSIX path relative to the root; "" for the root.
        stamp: State of the folder when it was listed; None if it may have changed since, unnoticed.
        subfolders: Paths of its subfolders, relative to the root.
        skipped: Number of files that are not listed, by suffix.
        broken: Paths of listed links to nothing, relative to the root.
        names: Names of the listed files; empty if `reused`.
        sizes: Bytes of each; −1 for links to nothing.
        reused: Whether the folder is as it was in an earlier listing, which has its files.
    """

    path: str
    stamp: Stamp | None
    subfolders: tuple[str, ...] = ()
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    broken: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    reused: bool = False

    @property
    def prefix(self) -> str:
        """What comes before the name of a file in its path."""
        return f"{self.path}/" if self.path else ""


def suffix_of(name: str) -> str:
    """Return the suffix of a file name in lower case, with the dot; "" if it has none."""
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def scan(root: Path, is_listed: Callable[[str], bool], known: Mapping[str, Folder]) -> list[Folder]:
    """List a folder and all folders below it, also linked ones, each once.

    Args:
        root: Absolute path of the folder.
        is_listed: Whether a file is part of the dataset, by its path.
        known: Folders of an earlier listing by path: those with the same stamp are not listed again.

    Raises:
        AtlasError: If a folder can't be listed: a part of the dataset would be missing.
    """
    found: list[Folder] = []
    pending, visited = [""], set[str]()
    while pending:
        path = pending.pop()
        place = str(root / path)
        # A symbolic link may point to a parent folder: visit each real folder once.
        real = os.path.realpath(place)
        if real in visited:
            continue
        visited.add(real)
        try:
            folder = _listed(place, path, is_listed, known.get(path))
        except PermissionError as error:
            log.warning("%s is left out: %s", place, error.strerror)
            continue
        except OSError as error:
            raise AtlasError(f"{place} can't be listed, so that images would be missing: {error}") from error
        found.append(folder)
        pending += sorted(folder.subfolders, reverse=True)
    return found


def _listed(place: str, path: str, is_listed: Callable[[str], bool], known: Folder | None) -> Folder:
    """List one folder, or return it as it is known."""
    # Before its files: what is added in the meantime then changes the stamp.
    stamp = _stamp(place)
    if known is not None and known.stamp is not None and known.stamp == stamp:
        return dataclasses.replace(known, reused=True)
    prefix = f"{path}/" if path else ""
    subfolders, names, sizes, broken = list[str](), list[str](), list[int](), list[str]()
    skipped: Counter[str] = Counter()
    with os.scandir(place) as entries:
        for entry in entries:
            if _is_folder(entry):
                subfolders.append(prefix + entry.name)
            elif is_listed(entry.path):
                size, is_broken = _size(entry)
                names.append(entry.name)
                sizes.append(size)
                if is_broken:
                    broken.append(prefix + entry.name)
            else:
                skipped[suffix_of(entry.name) or NO_SUFFIX] += 1
    settled = stamp if _is_settled(stamp) else None
    return Folder(path, settled, tuple(subfolders), dict(skipped), tuple(broken), tuple(names), tuple(sizes))


def _stamp(place: str) -> Stamp:
    status = Path(place).stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _is_settled(stamp: Stamp) -> bool:
    """Return whether a folder changed long enough ago that another change would have another time."""
    return max(stamp[1:]) / 1e9 < time.time() - SETTLED


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # for example a link that leads to itself
        if is_storage_error(error):
            raise
        return False


def _size(entry: "os.DirEntry[str]") -> tuple[int, bool]:
    """Return the bytes of a file, −1 if they can't be looked up, and whether it is a link to nothing."""
    try:
        return entry.stat().st_size, False
    except OSError as error:
        if error.errno in NOTHING_THERE:
            return -1, True
        if isinstance(error, PermissionError):
            return -1, False
        raise
