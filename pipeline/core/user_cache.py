"""The user's cache folder."""

import os
import stat
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return a folder of the user's cache, which only this user can read and write; it is created if needed.

    Args:
        name: Name of the folder below `neuron-atlas` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Raises:
        OSError: If it cannot be created, or others can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of this variable says that relative paths are to be ignored.
    root = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    folder = root / "neuron-atlas" / name
    if not folder.is_absolute():
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(folder.lstat()):
        raise PermissionError(f"{folder} belongs to another user, or others can write to it")
    return folder


def is_private(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and nobody else can write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
