"""The folder of a site, which is replaced as a whole or not at all."""

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
# What the next build asks about this one. A leading dot: hosts do not serve it.
BUILT = ".build.json"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new, empty folder beside `folder` that takes its place when the block ends without an error.

    On any error the new folder is removed and what stood under `folder` still stands. One builder at a time
    for a folder: leftovers of a killed one are swept away first.

    Raises `AtlasError` if `folder` is there, is not empty and was not written by this function.
    """
    folder = folder.absolute()
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    # A builder that died between the two renames below leaves the finished old site under its other name.
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    if folder.exists() and not ours(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise AtlasError(f"{folder} holds something that is no site of Neuron Atlas. Name another folder or move it.")
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
            raise AtlasError("The disk is full: the site could not be written. Make space and build again.") from error
        raise
    finally:
        if new.exists():
            shutil.rmtree(new)


def ours(folder: Path) -> bool:
    """Whether `folder` is a site that `replacing` wrote."""
    return (folder / MARK).is_file()


def built(folder: Path) -> dict[str, Any]:
    """What the build that wrote `folder` said of itself; empty if there is none, or none that can be read."""
    try:
        return json.loads((folder / BUILT).read_text(encoding="utf-8")) if ours(folder) else {}
    except (OSError, ValueError):
        return {}


def adopt(old: Path, new: Path, part: str) -> bool:
    """Take the folder `part` of one site over into another, by hard links where the disk allows; False if not there."""
    if not (old / part).is_dir():
        return False
    shutil.copytree(old / part, new / part, copy_function=_link, dirs_exist_ok=True)
    return True


def write(root: Path, to: str, content: str | bytes) -> None:
    """A file below `root`, with its folders. A link to a file of the former site is broken, never written through."""
    path = root / to
    held = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.unlink(missing_ok=True)
        path.write_bytes(held)
    except FileNotFoundError:  # no such folder yet, which is rare
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
