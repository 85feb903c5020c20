"""Listings of large folders in the user's cache, as Arrow files that are mapped into memory.

A listing is kept by the path of the folder and the files that are looked for, so that all runs on a dataset share it.
"""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.hashing import digest_of
from pipeline.core.machine import cache_folder, is_private
from pipeline.data.readers.folder_scan import Folder

log = logging.getLogger(__name__)

# Changes with the format: files of other versions are not read.
VERSION = 1

# Smaller datasets are listed anew by each command, which takes less than a second.
MIN_IMAGES = 50_000

# So many listings are kept, those that were written last.
KEPT = 8

_FOLDERS = b"folders"


@dataclasses.dataclass(frozen=True)
class CachedListing:
    """A listing of an earlier command.

    Attributes:
        batch: Columns of an `ImageTable`, and `folder`, the number of the folder of each image.
        folders: The folders; their files are rows of `batch`.
    """

    batch: pa.RecordBatch
    folders: tuple[Folder, ...]


def key_of(root: Path, *details: object) -> str:
    """Return the name of a listing: a digest of the folder and of what decides which files are listed."""
    return digest_of(["listing", VERSION, str(root), *details])[:32]


def load(key: str) -> CachedListing | None:
    """Return a listing of an earlier command; None if there is none, or if it can't be read."""
    try:
        path = cache_folder("listings") / f"{key}.arrow"
        if not path.is_file() or not is_private(path.lstat()):
            return None
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        # Reading a damaged file must not end the process.
        batch.validate(full=True)
        folders = tuple(_folder(entry) for entry in json.loads(batch.schema.metadata[_FOLDERS]))
        numbers = batch.column("folder").to_numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(folders):
            raise ValueError("a folder is missing")
        return CachedListing(batch, folders)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        log.info("the cached listing can't be read: %s", first_line(error))
        return None


def remembered(key: str, compute: Callable[[], str]) -> str:
    """Return a digest from the cache, or compute it and keep it there.

    Args:
        key: Digest of everything that determines the result.
        compute: Returns a sha256 as hexadecimal digits.
    """
    try:
        path = cache_folder("fingerprints") / key
        if path.is_file() and is_private(path.lstat()) and re.fullmatch(r"[0-9a-f]{64}", text := path.read_text()):
            return text
        result = compute()
        with atomic_path(path) as temporary:
            temporary.write_text(result)
            temporary.chmod(0o600)
        return result
    except (OSError, ValueError, AtlasError) as error:
        log.info("the cached fingerprint can't be used: %s", first_line(error))
        return compute()


def _folder(entry: dict[str, object]) -> Folder:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return Folder(**values)  # type: ignore[arg-type]


def save(key: str, batch: pa.RecordBatch, numbers: np.ndarray, folders: Sequence[Folder]) -> None:
    """Keep a listing for later commands, as far as the cache can be written to.

    Args:
        key: Name of the listing.
        batch: Columns of its `ImageTable`.
        numbers: Number of the folder of each image, (n,) int32.
        folders: The folders.
    """
    entries = [dataclasses.asdict(dataclasses.replace(folder, names=(), sizes=())) for folder in folders]
    whole = batch.append_column("folder", pa.array(numbers, pa.int32()))
    whole = whole.replace_schema_metadata({_FOLDERS: json.dumps(entries).encode()})
    try:
        folder = cache_folder("listings")
        with atomic_path(folder / f"{key}.arrow") as temporary:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
                writer.write_batch(whole)
            temporary.chmod(0o600)
        listings = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in listings[KEPT:]:
            with contextlib.suppress(OSError):
                old.unlink()
    except (OSError, AtlasError) as error:
        log.info("the listing can't be kept for later commands: %s", first_line(error))
