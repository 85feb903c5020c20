"""Atomic and durable file writes: after a crash, a file is either complete or absent."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import AtlasError

# No space left on the device, over the user's quota, over the size limit of a file.
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full_disk(error: BaseException) -> bool:
    """Return whether `error` means that no space is left; HDF5 reports it only in the text of its errors."""
    if isinstance(error, OSError) and error.errno in FULL_DISK_ERRNOS:
        return True
    return any(f"errno = {code}," in str(error) or os.strerror(code) in str(error) for code in FULL_DISK_ERRNOS)


def sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` to disk, so that renames in it survive a crash."""
    _sync(folder)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a new file to, and move the file to `path` once it is complete and synced.

    On any error the temporary file is removed and an existing file at `path` remains unchanged.

    Raises:
        AtlasError: If the disk is full.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # HDF5 reports a full disk as either
        if is_full_disk(error):
            raise AtlasError(
                f"The disk is full: {path.name} could not be written. Make space and run again; everything finished "
                "is kept."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_once(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically unless a file is there: of several writers of one result the first counts.

    A file that is there is only synced, because its writer may have been killed before it could do so.
    """
    if path.is_file():
        _sync(path)
        sync_folder(path.parent)
    else:
        write_atomic(path, data)


def remove_temporary_files(folder: Path) -> int:
    """Remove the temporary files of killed writers below `folder` and return their number.

    Only for a process that holds the lock of the run: others may still be writing.
    """
    leftovers = list(folder.rglob("*.tmp-*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
