"""The folder of a site, which is replaced atomically."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtlasError

MARK = "neuron-atlas-site.txt"
MARK_TEXT = "Written by Neuron Atlas. The next build replaces this folder: keep nothing of your own here.\n"
# State for the next build. Web hosts do not serve files with a leading dot.
BUILT = ".build.json"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder that replaces `folder` when the block ends without an error.

    On an error the new folder is removed and `folder` is unchanged. Remains of a killed build are removed first, so
    only one process may build a folder at a time.

    Raises:
        AtlasError: If `folder` exists, is not empty and was not written by this function, or if the disk is full.
    """
    folder = folder.absolute()
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    # A build that was killed between the two renames below leaves the complete old site in `old`.
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    if folder.exists() and not ours(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise AtlasError(
            f"{folder} contains files but is not a site of Neuron Atlas. Move them, or choose another folder."
        )
    new.mkdir(parents=True)
    try:
        (new / MARK).write_text(MARK_TEXT)
        yield new
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        if old.exists():
            shutil.rmtree(old)
    except OSError as error:
        if error.errno == 28:
            raise AtlasError("The disk is full. Free some space and build the site again.") from error
        raise
    finally:
        if new.exists():
            shutil.rmtree(new)


def ours(folder: Path) -> bool:
    """Return whether `folder` is a site that `replacing` wrote."""
    return (folder / MARK).is_file()


def built(folder: Path) -> dict[str, Any]:
    """Return the state that the build of `folder` recorded; empty if there is none or it cannot be read."""
    try:
        return json.loads((folder / BUILT).read_text(encoding="utf-8")) if ours(folder) else {}
    except (OSError, ValueError):
        return {}


def adopt(old: Path, new: Path, part: str) -> bool:
    """Copy the folder `part` of one site to another, by hard links if possible; return False if it does not exist.

    Nor is a folder copied that holds a link: this program makes none, and it may lead to any file of this machine.
    """
    folder = old / part
    if not folder.is_dir() or any(path.is_symlink() for path in (folder, *folder.rglob("*"))):
        return False
    shutil.copytree(old / part, new / part, copy_function=link, dirs_exist_ok=True)
    return True


def write(root: Path, to: str, content: str | bytes) -> None:
    """Write a file below `root` and create its folders.

    An existing file is unlinked first, because it may be a hard link to a file of the previous site.
    """
    path = root / to
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    except FileNotFoundError:  # the folder does not exist yet, which is rare
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def link(source: str | Path, target: str | Path) -> None:
    """Make the file `target` of the content of `source`, by a hard link if possible."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
