"""Write-once HDF5 files: whole and durable, or not there at all.

A shard is written under a temporary name, flushed, synced and renamed. It carries the digest of everything
that changes its content: *done* means a readable shard with the right digest, never that somebody said so.
No file is ever opened for appending, for a crash there can destroy what was finished before.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.core.errors import AtlasError

# HDF5 1.10 is the newest format that MATLAB, HDFView and old h5dump read alike.
LIBVER = ("earliest", "v110")
SHARD_VERSION = 2

# Attributes that say that a file is a finished shard, and nothing of what is in it.
OF_FILES = ("shard_version", "complete")

# What a system says when there is no more room: for all, for this user, in this file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def digest_of(value: Any) -> str:
    """sha256 of plain data as canonical JSON: the same for the same content, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def content(arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of what arrays hold, by their names."""
    return digest_of([[name, array.tobytes().hex()] for name, array in sorted(arrays.items())])


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


class Damaged(Exception):
    """A shard, or the part of an atlas that stands for one, can't be read to the last byte."""

    def __init__(self, shard: "Shard", what: str) -> None:
        super().__init__(f"{shard.path} is damaged: {what}")
        self.shard = shard


def full_disk(error: BaseException) -> bool:
    """Whether an error, also one of HDF5's, means that there is no more room."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(f"errno = {code}," in str(error) or os.strerror(code) in str(error) for code in FULL)


@contextlib.contextmanager
def making(path: Path) -> Iterator[Path]:
    """A name to write a new file under, which then appears under `path` only when it is complete and on disk.

    On any error the temporary file is removed and what stood under `path` before still stands. A full disk
    becomes an `AtlasError`, for a user can mend it.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # HDF5 tells of a full disk in either
        if full_disk(error):
            raise AtlasError(
                f"The disk is full: {path.name} could not be written. Make space and run again; everything finished "
                "is kept."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


class _Sink(io.RawIOBase):
    """A file that takes all that is written to it, and tells at the end if that went wrong.

    HDF5 does not survive a disk that fills up: it ends with an error in another place, or with the process. So
    what a full disk refuses stays in memory, where HDF5 finds it again until it has closed its file.
    """

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.failure: OSError | None = None
        self.refused: dict[int, bytes] = {}
        self.at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        ends = (start + len(data) for start, data in self.refused.items())
        end = max(os.fstat(self.handle).st_size, max(ends, default=0)) if whence == os.SEEK_END else 0
        self.at = offset + (end if whence == os.SEEK_END else self.at if whence == os.SEEK_CUR else 0)
        return self.at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        own = os.pread(self.handle, len(view), self.at)
        view[:] = own + bytes(len(view) - len(own))
        for start, data in self.refused.items():
            low, high = max(start, self.at), min(start + len(data), self.at + len(view))
            if low < high:
                view[low - self.at : high - self.at] = data[low - start : high - start]
        self.at += len(view)
        return len(view)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self.failure is None:
                done += os.pwrite(self.handle, view[done:], self.at + done)
        except OSError as error:
            self.failure = error
        if done < len(view):
            self.refused.pop(self.at, None)  # the last to be written is the last to be laid over
            self.refused[self.at] = bytes(view)
        self.at += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        size = self.at if size is None else size
        try:
            os.ftruncate(self.handle, size)
        except OSError as error:
            self.failure = self.failure or error
        return size

    def close(self) -> None:
        if not self.closed:
            os.close(self.handle)
        super().close()


@contextlib.contextmanager
def creating(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file that appears under `path` only when it is complete and on disk; see `making`."""
    with making(path) as temporary, _Sink(temporary) as sink:
        try:
            with h5py.File(sink, "w", libver=LIBVER) as file:
                yield file
        except Exception:
            if sink.failure is not None:  # whatever HDF5 made of it
                raise sink.failure from None
            raise
        if sink.failure is not None:
            raise sink.failure


def image(attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray], compression: str = "gzip") -> bytes:
    """A shard of `arrays`, by path inside the file, as the bytes of its file.

    Image stacks (N, V, H, W, C) get one chunk an image, and beside them `<name>_sha256`, (N, V, 32) uint8: what
    each picture must be to the last pixel, wherever it is copied to. Made in memory, so that no disk that fills
    up under HDF5's hands can harm anything. `compression` "lzf" is three times as fast, for what only we read.
    """
    with h5py.File("shard", "w", driver="core", backing_store=False, libver=LIBVER) as file:
        for name, array in arrays.items():
            put(file, name, array, compression)
            if array.dtype == np.uint8 and array.ndim == 5:
                put(file, f"{name}_sha256", picture_digests(array))
        for key, value in attributes.items():
            file.attrs[key] = value
        file.attrs["shard_version"] = SHARD_VERSION
        file.attrs["complete"] = True
        file.flush()
        return file.id.get_file_image()


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an `image`."""
    with io.BytesIO(data) as buffer, h5py.File(buffer, "r") as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
        return {name: get(file, name) for name in found}


def place(path: Path, data: bytes) -> None:
    """Write a finished shard's bytes under `path`, whole and durable or not at all."""
    with making(path) as temporary:
        temporary.write_bytes(data)


def write(path: Path, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """A shard of `arrays` on disk; see `image`."""
    place(path, image(attributes, arrays))


def picture_digests(images: np.ndarray) -> np.ndarray:
    """(N, V, H, W, C) uint8 → sha256 of each picture's pixels, (N, V, 32) uint8."""
    found = [hashlib.sha256(picture.tobytes()).digest() for stack in images for picture in stack]
    return np.frombuffer(b"".join(found), np.uint8).reshape(*images.shape[:2], 32)


def put(group: h5py.Group, name: str, array: np.ndarray, compression: str = "gzip") -> h5py.Dataset:
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
    return group.create_dataset(name, data=array, chunks=True, compression=compression, fletcher32=True)


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


def add_stored(digest: "hashlib._Hash", item: Any, instead: tuple[str, str]) -> None:
    """Feed a group or dataset to `digest` as it is stored: names, attributes, and bytes that nobody unpacks.

    Where a group has both, the dataset `instead[0]` stands for `instead[1]`.
    """
    attributes = {name: np.asarray(value).tolist() for name, value in item.attrs.items()}
    digest.update(repr((item.name, attributes)).encode())
    if isinstance(item, h5py.Group):
        for name in names(item):
            if name != instead[1] or instead[0] not in item:
                add_stored(digest, item[name], instead)
        return
    digest.update(repr((item.shape, str(item.dtype))).encode())
    if item.chunks is None or item.dtype.kind == "O":  # text lies elsewhere in the file: what is here says only where
        digest.update(repr(item[()].tolist()).encode() if item.dtype.kind == "O" else np.asarray(item[()]).tobytes())
        return
    for i in range(item.id.get_num_chunks()):
        at = item.id.get_chunk_info(i).chunk_offset
        digest.update(repr(at).encode() + item.id.read_direct_chunk(at)[1])


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard: where it is, and the attributes it was written with.

    What an atlas holds of a layer can take a shard's place: `inside` is its group in that file then, "" else.
    """

    path: Path
    attributes: Mapping[str, Any]
    inside: str = ""

    @contextlib.contextmanager
    def opened(self) -> Iterator[h5py.Group]:
        """The open group of this shard; `Damaged` for anything in it that can't be read."""
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                yield group(file, self.inside) if self.inside else file
        except (OSError, KeyError, RuntimeError) as error:
            if full_disk(error):
                raise
            raise Damaged(self, str(error)) from error

    def get(self, *wanted: str) -> dict[str, np.ndarray]:
        """Some arrays of the shard. Raises `Damaged`."""
        with self.opened() as opened:
            found = {name: get(opened, name) for name in wanted if name != "channels"}
            if "channels" in wanted:
                # An atlas keeps them in <layer>/channels, beside <layer>/render/<objective>.
                above = group(opened.file, self.inside.rsplit("/", 2)[0]) if self.inside else opened
                found["channels"] = get(above, "channels")
        return found

    def arrays(self, but: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Everything in the shard but `but`, by path inside the file, read into memory. Raises `Damaged`."""
        found: dict[str, np.ndarray] = {}
        with self.opened() as opened:

            def visit(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset) and name not in but:
                    found[name] = get(opened, name)

            opened.visititems(visit)
        return found

    def columns(self, name: str, start: int, end: int) -> np.ndarray:
        """Columns start … end - 1 of one array of the shard. Raises `Damaged`."""
        with self.opened() as opened:
            return np.asarray(dataset(opened, name)[:, start:end])

    def damage(self) -> str:
        """What is wrong with the shard when all of it is read, "" if nothing is."""
        try:
            arrays = self.arrays()
        except Damaged as error:
            return str(error)
        for name, digests in arrays.items():
            if name.endswith("_sha256") and not np.array_equal(
                picture_digests(arrays[name.removesuffix("_sha256")]), digests
            ):
                return f"{self.path} is damaged: a picture does not have its digest"
        return ""


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
    leftovers = list(folder.rglob("*.tmp-*"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
