"""Shards: write-once HDF5 files, each with the digest of everything that determines its content.

A task is done if and only if there is a readable shard with its digest; no other record is kept. Shards appear
atomically (`pipeline.core.atomic_io`), and no file is ever opened for appending, because a crash there could destroy
finished results.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.core.atomic_io import is_full_disk, write_atomic
from pipeline.data.storage_errors import is_storage_error
from pipeline.store import hdf5, structure

SHARD_VERSION = 2

# Attributes that mark a file as a finished shard; they do not describe its content.
FILE_ATTRIBUTES = ("shard_version", "complete")


def safe_name(name: str) -> str:
    """Return a file, group and page name for any layer name; reversible, and never a path out of a folder.

    Module paths stay as they are. Every other character, and a leading dot, becomes `~` and its UTF-8 bytes in
    hexadecimal.
    """
    text = re.sub(r"[^A-Za-z0-9_.-]", lambda m: "".join(f"~{b:02x}" for b in m[0].encode()), name)
    return "~2e" + text[1:] if text.startswith(".") else text or "~"


class DamagedShardError(Exception):
    """A shard, or the group of an atlas that replaces one, cannot be read completely."""

    def __init__(self, shard: "Shard", reason: str) -> None:
        super().__init__(f"{shard.path} is damaged: {reason}")
        self.shard = shard


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard, or a group of `atlas.h5` with the same content.

    Attributes:
        path: The file.
        attributes: Attributes that the shard was written with.
        group_path: Path of the group if the file is an atlas, "" for a shard's own file.
    """

    path: Path
    attributes: Mapping[str, Any]
    group_path: str = ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[h5py.Group]:
        """Yield the open group of this shard.

        Raises:
            Damaged: If the file, or anything that is read inside the context, cannot be read.
        """
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                yield hdf5.group(file, self.group_path) if self.group_path else file
        except (OSError, KeyError, RuntimeError) as error:
            if is_full_disk(error):
                raise
            raise DamagedShardError(self, str(error)) from error

    def get(self, *names: str) -> dict[str, np.ndarray]:
        """Return the named arrays. Raises `DamagedShardError`."""
        with self.opened() as opened:
            arrays = {name: hdf5.read_array(opened, name) for name in names if name != "channels"}
            if "channels" in names:
                # An atlas stores them in <layer>/channels, and this group is <layer>/render/<preset>.
                layer = hdf5.group(opened.file, self.group_path.rsplit("/", 2)[0]) if self.group_path else opened
                arrays["channels"] = hdf5.read_array(layer, "channels")
        return arrays

    def arrays(self, but: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Return all arrays except those in `but`, by path inside the file. Raises `DamagedShardError`."""
        with self.opened() as opened:
            return {name: hdf5.read_array(opened, name) for name in hdf5.dataset_names(opened) if name not in but}

    def names(self) -> list[str]:
        """Return the names of all arrays, by path inside the file. Raises `DamagedShardError`."""
        with self.opened() as opened:
            return list(hdf5.dataset_names(opened))

    def columns(self, name: str, start: int, end: int) -> np.ndarray:
        """Return the columns start … end - 1 of one array. Raises `DamagedShardError`."""
        with self.opened() as opened:
            return np.asarray(hdf5.dataset(opened, name)[:, start:end])

    def structural_fault(self) -> str:
        """Return why the file may not be read, because this program did not write it so; "" for any other file.

        A file of a stranger may link to others, or declare arrays that no memory holds.
        """
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                faults = structure.links(file) or structure.arrays(file)
        except (OSError, KeyError, RuntimeError, ValueError):
            return ""
        return f"{faults[0][0]} {faults[0][1]}" if faults else ""

    def damage(self) -> str:
        """Read everything and return what is wrong with the shard; "" if it is intact."""
        fault = self.structural_fault()
        if fault:
            return f"{self.path}: {fault}"
        try:
            arrays = self.arrays()
        except DamagedShardError as error:
            return str(error)
        for name, digests in arrays.items():
            if not name.endswith("_sha256"):
                continue
            if not np.array_equal(hdf5.image_digests(arrays[name.removesuffix("_sha256")]), digests):
                return f"{self.path} is damaged: the digest of an image does not match its pixels"
        return ""


def to_bytes(
    attributes: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    compression: str = "gzip",
    chunks: Mapping[str, Sequence[bytes]] = hdf5.NO_CHUNKS,
) -> bytes:
    """Serialize a shard to the bytes of its file; see `pipeline.store.hdf5.to_bytes`."""
    return hdf5.to_bytes({**attributes, "shard_version": SHARD_VERSION, "complete": True}, arrays, compression, chunks)


def write(path: Path, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a shard to `path` atomically."""
    write_atomic(path, to_bytes(attributes, arrays))


def read(path: Path) -> Shard | None:
    """Return the shard at `path`, or None if there is no file, or not a complete shard of this version."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = hdf5.all_attributes(file)
    except (OSError, KeyError, RuntimeError):
        return None
    if attributes.get("complete") is not True or attributes.get("shard_version") != SHARD_VERSION:
        return None
    return Shard(path, attributes)


def is_damaged(path: Path) -> bool:
    """Return whether a file can't be opened as HDF5; a shard of another version can, and is not damaged.

    Storage that fails says nothing about the file.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            hdf5.all_attributes(file)
    except (OSError, KeyError, RuntimeError) as error:
        return not (is_storage_error(error) or isinstance(error, FileNotFoundError))
    return False


def find(folder: Path, digest: str) -> list[Shard]:
    """Return all complete shards with `digest` below `folder`, sorted by path."""
    shards = (read(path) for path in sorted(folder.rglob("*.h5")))
    return [s for s in shards if s is not None and s.attributes.get("digest") == digest]
