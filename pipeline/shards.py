"""Write-once HDF5 files: whole and durable, or not there at all.

A shard is written under a temporary name, flushed, synced and renamed. It carries the digest of everything
that changes its content: *done* means a readable shard with the right digest, never that somebody said so.
No file is ever opened for appending, for a crash there can destroy what was finished before.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.errors import AtlasError

# HDF5 1.10 is the newest format that MATLAB, HDFView and old h5dump read alike.
LIBVER = ("earliest", "v110")
SHARD_VERSION = 1


def digest_of(value: Any) -> str:
    """sha256 of plain data as canonical JSON: the same for the same content, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def safe(name: str) -> str:
    """A file, group and page name for any layer name; reversible, and never a way out of a folder.

    Module paths stay as they are; any other character, a leading dot included, becomes `~` and its code.
    """
    text = re.sub(r"[^A-Za-z0-9_.-]", lambda m: "".join(f"~{b:02x}" for b in m[0].encode()), name)
    return "~2e" + text[1:] if text.startswith(".") else text or "~"


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def creating(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that appears under `path` only when it is complete and on disk.

    On any error the temporary file is removed and what stood under `path` before still stands. A full disk
    becomes an `AtlasError`, for a user can mend it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        with h5py.File(temporary, "w", libver=LIBVER, locking=False) as file:
            yield file
            file.flush()
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno == 28 or "No space left" in str(error):
            raise AtlasError(
                f"The disk is full: {path.name} could not be written. Make space and run again."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """A shard of `arrays`, by path inside the file. Image stacks (N, V, H, W, C) get one chunk an image."""
    with creating(path) as file:
        for name, array in arrays.items():
            put(file, name, array)
        for key, value in attributes.items():
            file.attrs[key] = value
        file.attrs["shard_version"] = SHARD_VERSION
        file.attrs["complete"] = True


def put(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """One dataset in the project's own way: checksummed, text as variable-length UTF-8, images by image."""
    if array.dtype.kind in "OU":
        # A file name need not be UTF-8; what is not becomes an escape, as in every listing of such names.
        flat = [str(v).encode("utf-8", "backslashreplace").decode() for v in array.ravel().tolist()]
        encoded = np.array(flat, object).reshape(array.shape)
        return group.create_dataset(name, data=encoded, dtype=h5py.string_dtype())
    if array.dtype == np.uint8 and array.ndim == 5:
        dataset = create_images(group, name, array.shape)
        for i in range(array.shape[0]):
            for v in range(array.shape[1]):
                dataset[i, v] = array[i, v]
        return dataset
    if array.size == 0 or array.ndim == 0:
        return group.create_dataset(name, data=array)
    return group.create_dataset(name, data=array, chunks=True, compression="gzip", fletcher32=True)


def dataset(group: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset `name` of a group; KeyError if it is anything else."""
    item = group[name]
    if not isinstance(item, h5py.Dataset):
        raise KeyError(f"{name} is no dataset")
    return item


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """The group `name` of a group; KeyError if it is anything else."""
    item = parent[name]
    if not isinstance(item, h5py.Group):
        raise KeyError(f"{name} is no group")
    return item


def get(parent: h5py.Group, name: str) -> np.ndarray:
    """A dataset's whole content; text as an array of str."""
    item = dataset(parent, name)
    return np.asarray(item.asstr()[:] if h5py.check_string_dtype(item.dtype) else item[()])


def names(parent: h5py.Group) -> list[str]:
    """Names of what is in a group."""
    return [str(name) for name in parent]


def numbers(item: h5py.Group | h5py.Dataset, name: str) -> tuple[int, ...]:
    """An attribute of one or more whole numbers."""
    return tuple(int(v) for v in np.atleast_1d(np.asarray(item.attrs[name])))


def text(item: h5py.Group | h5py.Dataset, name: str) -> str:
    """An attribute of text."""
    value = item.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def plain(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """All attributes as Python's own types."""
    found: dict[str, Any] = {}
    for name, value in item.attrs.items():
        if isinstance(value, bytes):
            found[name] = value.decode()
        else:
            found[name] = value.item() if isinstance(value, np.generic) else value
    return found


def create_images(group: h5py.Group, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """An empty stack of pictures (N, V, H, W, C), browsable in H5Web and HDFView."""
    chunks = (1, 1, *shape[2:])
    dataset = group.create_dataset(
        name, shape=shape, dtype=np.uint8, chunks=chunks, compression="gzip", compression_opts=4, fletcher32=True
    )
    dataset.attrs["CLASS"] = np.bytes_("IMAGE")
    dataset.attrs["IMAGE_VERSION"] = np.bytes_("1.2")
    if shape[-1] == 3:
        dataset.attrs["IMAGE_SUBCLASS"] = np.bytes_("IMAGE_TRUECOLOR")
        dataset.attrs["INTERLACE_MODE"] = np.bytes_("INTERLACE_PIXEL")
    dataset.attrs["axes"] = "channel, variant, row, column, colour"
    return dataset


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: where it is, and the attributes it was written with."""

    path: Path
    attributes: Mapping[str, Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in the shard, by path inside the file, read into memory."""
        found: dict[str, np.ndarray] = {}
        with h5py.File(self.path, "r", locking=False) as file:

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    found[name] = get(file, name)

            file.visititems(visit)
        return found


def read(path: Path) -> Shard | None:
    """The shard at `path`, or None if there is none or it is not a whole one."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = plain(file)
    except (OSError, KeyError, RuntimeError):
        return None
    if attributes.get("complete") is not True or attributes.get("shard_version") != SHARD_VERSION:
        return None
    return Shard(path, attributes)


def find(folder: Path, digest: str) -> list[Shard]:
    """All whole shards below `folder` that carry `digest`, by path."""
    shards = (read(path) for path in sorted(folder.rglob("*.h5")))
    return [s for s in shards if s is not None and s.attributes.get("digest") == digest]


def sweep(folder: Path) -> int:
    """Remove temporary files that killed writers left behind. Only for a driver that holds the run's lock."""
    leftovers = list(folder.rglob("*.h5.tmp-*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
