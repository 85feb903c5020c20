"""HDF5 files: creation on disk and in memory, checksummed datasets, image stacks, typed access to groups."""

import contextlib
import functools
import hashlib
import io
import logging
import os
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.core.atomic_io import atomic_path

log = logging.getLogger(__name__)

# HDF5 1.10 is the newest format that MATLAB, HDFView and old versions of h5dump can all read.
LIBVER = ("earliest", "v110")

# Level of compression of images and masks.
GZIP_LEVEL = 4

NO_CHUNKS: Mapping[str, Sequence[bytes]] = types.MappingProxyType({})


class _FullDiskSink(io.RawIOBase):
    """A file that accepts every write, and records the first error in `failure` instead of raising it.

    HDF5 does not survive a full disk: it fails later, in another call, or takes the process down. Blocks that could
    not be written are therefore kept in memory, where HDF5 can read them back until it has closed its file.

    Attributes:
        failure: The first error of a write or truncation, or None.
    """

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._unwritten: dict[int, bytes] = {}  # blocks by offset, in the order of their writes
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence == os.SEEK_END:
            ends = (start + len(data) for start, data in self._unwritten.items())
            offset += max(os.fstat(self._handle).st_size, max(ends, default=0))
        elif whence == os.SEEK_CUR:
            offset += self._position
        self._position = offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        on_disk = os.pread(self._handle, len(view), self._position)
        view[:] = on_disk + bytes(len(view) - len(on_disk))
        for start, data in self._unwritten.items():
            low, high = max(start, self._position), min(start + len(data), self._position + len(view))
            if low < high:
                view[low - self._position : high - self._position] = data[low - start : high - start]
        self._position += len(view)
        return len(view)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self.failure is None:
                done += os.pwrite(self._handle, view[done:], self._position + done)
        except OSError as error:
            self.failure = error
        if done < len(view):
            # Reinserted at the end, because `readinto` must apply the latest write last.
            self._unwritten.pop(self._position, None)
            self._unwritten[self._position] = bytes(view)
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        size = self._position if size is None else size
        try:
            os.ftruncate(self._handle, size)
        except OSError as error:
            self.failure = self.failure or error
        return size

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


@contextlib.contextmanager
def create_file(path: Path) -> Iterator[h5py.File]:
    """Yield a new HDF5 file that appears at `path` once it is complete and synced.

    Raises:
        AtlasError: If the disk is full; see `pipeline.core.atomic_io.atomic_path`.
    """
    with atomic_path(path) as temporary, _FullDiskSink(temporary) as sink:
        try:
            with h5py.File(sink, "w", libver=LIBVER) as file:
                yield file
        except Exception:
            if sink.failure is not None:  # the cause; what HDF5 raised is a consequence
                raise sink.failure from None
            raise
        if sink.failure is not None:
            raise sink.failure


def to_bytes(
    attributes: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    compression: str = "gzip",
    chunks: Mapping[str, Sequence[bytes]] = NO_CHUNKS,
) -> bytes:
    """Serialize arrays to the bytes of an HDF5 file, in memory: a full disk cannot leave a truncated file.

    Args:
        attributes: Attributes of the root group.
        arrays: Arrays by path inside the file. A uint8 stack of images (N, V, H, W, C) is chunked by image and gets
            a second dataset `<name>_sha256`, (N, V, 32) uint8, the sha256 of the pixels of each image.
        compression: "gzip", or "lzf" (three times as fast) for files that only this program reads.
        chunks: `compressed_chunk` of each image or mask, by the name of the stack, where it is known already.
    """
    with h5py.File("memory", "w", driver="core", backing_store=False, libver=LIBVER) as file:
        for name, array in arrays.items():
            write_array(file, name, array, compression, chunks.get(name, ()))
            if array.dtype == np.uint8 and array.ndim == 5:
                write_array(file, f"{name}_sha256", image_digests(array))
        for key, value in attributes.items():
            file.attrs[key] = value
        file.flush()
        return file.id.get_file_image()


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """Return all arrays of a file that `to_bytes` made, by path inside the file."""
    with io.BytesIO(data) as buffer, h5py.File(buffer, "r") as file:
        return {name: read_array(file, name) for name in dataset_names(file)}


def dataset_names(parent: h5py.Group) -> list[str]:
    """Return the paths of all datasets below `parent`, relative to it."""
    paths: list[str] = []
    parent.visititems(lambda name, item: paths.append(name) if isinstance(item, h5py.Dataset) else None)
    return paths


def image_digests(images: np.ndarray) -> np.ndarray:
    """Return the sha256 of the pixels of each image: (N, V, H, W, C) uint8 → (N, V, 32) uint8."""
    digests = [hashlib.sha256(image.tobytes()).digest() for variants in images for image in variants]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(*images.shape[:2], 32)


def compressed_chunk(pixels: np.ndarray) -> bytes:
    """Return the bytes that HDF5 stores of an image or mask of `create_images` or `create_masks`.

    They are a zlib stream with HDF5's checksum behind it (the filters `deflate` and `fletcher32`). Other threads run
    meanwhile, which they do not while HDF5 itself compresses.
    """
    stream = zlib.compress(pixels.tobytes(), GZIP_LEVEL)
    return stream + _fletcher32(stream).to_bytes(4, "little")


def _fletcher32(data: bytes) -> int:
    """Return the checksum of HDF5's filter `fletcher32`, of big-endian words of 16 bits, the last one padded."""
    words = np.frombuffer(data + bytes(len(data) % 2), ">u2").astype(np.int64)
    sums = int(words.sum()), int((words * np.arange(len(words), 0, -1)).sum())
    # HDF5 adds the carry back, which leaves 65535 where a remainder is 0.
    first, second = ((total - 1) % 0xFFFF + 1 if total else 0 for total in sums)
    return second << 16 | first


@functools.cache
def compresses_alike() -> bool:
    """Return whether `compressed_chunk` returns what the HDF5 library stores; a library may contain another zlib."""
    sample = np.random.default_rng(0).integers(0, 40, (1, 1, 32, 33, 3), np.uint8).cumsum(3, np.uint8)
    with h5py.File("memory", "w", driver="core", backing_store=False, libver=LIBVER) as file:
        stored = write_array(file, "images", sample).id.read_direct_chunk((0,) * sample.ndim)[1]
    if stored == compressed_chunk(sample[0, 0]):
        return True
    log.info("HDF5 compresses images itself: its zlib differs from Python's")
    return False


def write_array(
    group: h5py.Group, name: str, array: np.ndarray, compression: str = "gzip", chunks: Sequence[bytes] = ()
) -> h5py.Dataset:
    """Create a compressed, checksummed dataset from `array`.

    Text becomes variable-length UTF-8, and a uint8 stack of images (N, V, H, W, C) or masks (N, V, H, W) is chunked by
    image; `chunks` are the `compressed_chunk` of each, if known.
    """
    if array.dtype.kind in "OU":
        # A file name need not be valid UTF-8: undecodable bytes are written as escapes.
        flat = [str(v).encode("utf-8", "backslashreplace").decode() for v in array.ravel().tolist()]
        encoded = np.array(flat, object).reshape(array.shape)
        return group.create_dataset(name, data=encoded, dtype=h5py.string_dtype())
    if array.dtype == np.uint8 and array.ndim in (4, 5):
        create = create_images if array.ndim == 5 else create_masks
        images = create(group, name, array.shape)
        for number, (i, v) in enumerate(np.ndindex(*array.shape[:2])):
            if chunks:
                images.id.write_direct_chunk((i, v, *(0,) * (array.ndim - 2)), chunks[number])
            else:
                images[i, v] = array[i, v]
        return images
    if array.size == 0 or array.ndim == 0:
        return group.create_dataset(name, data=array)
    return group.create_dataset(name, data=array, chunks=True, compression=compression, fletcher32=True)


def write_jpegs(group: h5py.Group, offset: np.ndarray, pieces: Iterable[np.ndarray]) -> None:
    """Write the datasets `offset` and `jpeg` of a group of images.

    The JPEG bytes get a checksum, but no second compression. They are written in parts: those of a large dataset do not
    fit in memory.

    Args:
        group: The group.
        offset: Where each image begins, and where the last ends, (n + 1,).
        pieces: The bytes of all images, in parts.
    """
    write_array(group, "offset", offset)
    if not offset[-1]:
        write_array(group, "jpeg", np.zeros(0, np.uint8))
        return
    target = group.create_dataset("jpeg", (int(offset[-1]),), np.uint8, chunks=True, fletcher32=True)
    start = 0
    for piece in pieces:
        target[start : start + len(piece)] = piece
        start += len(piece)


def create_images(group: h5py.Group, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """Create an empty uint8 stack of images (N, V, H, W, C), one chunk per image; H5Web and HDFView display it."""
    chunks = (1, 1, *shape[2:])
    images = group.create_dataset(
        name,
        shape=shape,
        dtype=np.uint8,
        chunks=chunks,
        compression="gzip",
        compression_opts=GZIP_LEVEL,
        fletcher32=True,
    )
    images.attrs["CLASS"] = np.bytes_("IMAGE")
    images.attrs["IMAGE_VERSION"] = np.bytes_("1.2")
    if shape[-1] == 3:
        images.attrs["IMAGE_SUBCLASS"] = np.bytes_("IMAGE_TRUECOLOR")
        images.attrs["INTERLACE_MODE"] = np.bytes_("INTERLACE_PIXEL")
    images.attrs["axes"] = "channel, variant, row, column, colour"
    return images


def create_masks(group: h5py.Group, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    """Create a uint8 stack of masks (N, V, H, W), one chunk per mask; 255 (opaque) where none is written."""
    masks = group.create_dataset(
        name,
        shape=shape,
        dtype=np.uint8,
        chunks=(1, 1, *shape[2:]),
        compression="gzip",
        compression_opts=GZIP_LEVEL,
        fletcher32=True,
        fillvalue=255,
    )
    masks.attrs["axes"] = "channel, variant, row, column"
    return masks


def dataset(parent: h5py.Group, name: str) -> h5py.Dataset:
    """Return the dataset `name` of a group.

    Raises:
        KeyError: If there is none, or the item is not a dataset.
    """
    item = parent[name]
    if not isinstance(item, h5py.Dataset):
        raise KeyError(f"{name} is not a dataset")
    return item


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """Return the subgroup `name` of a group.

    Raises:
        KeyError: If there is none, or the item is not a group.
    """
    item = parent[name]
    if not isinstance(item, h5py.Group):
        raise KeyError(f"{name} is not a group")
    return item


def read_array(parent: h5py.Group, name: str) -> np.ndarray:
    """Read a whole dataset; text is returned as an object array of str."""
    item = dataset(parent, name)
    return np.asarray(item.asstr()[:] if h5py.check_string_dtype(item.dtype) else item[()])


def faults_of_images(
    group: h5py.Group, what: str, images: np.ndarray, limits: Iterable[tuple[str, np.ndarray, int]]
) -> Iterator[str]:
    """Yield what is wrong with the images of a group and with numbers that point elsewhere.

    Args:
        group: The group, with the digests `images_sha256`.
        what: What the images are of, for the messages.
        images: The images, (n, H, W, C).
        limits: Of each kind of numbers its name, the numbers, and the limit that they must be below.
    """
    wrong = int((image_digests(images[:, None]) != read_array(group, "images_sha256")).any(-1).sum())
    if wrong:
        yield (
            f"{wrong} images of {what} can't be used: they do not have their digests; `atlas repair` sets the file "
            "aside, and `atlas run` writes it again"
        )
    for name, values, limit in limits:
        if values.size and int(values.max()) >= limit:
            yield f"the number of a {name} of {what} is beyond the end"


def member_names(parent: h5py.Group) -> list[str]:
    """Return the names of the direct members of a group."""
    return [str(name) for name in parent]


def integer_attribute(item: h5py.Group | h5py.Dataset, name: str) -> tuple[int, ...]:
    """Return an attribute that holds one or more integers."""
    return tuple(int(v) for v in np.atleast_1d(np.asarray(item.attrs[name])))


def text_attribute(item: h5py.Group | h5py.Dataset, name: str) -> str:
    """Return an attribute that holds text."""
    value = item.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def all_attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """Return all attributes of a group or dataset as Python types; arrays remain NumPy arrays."""
    values: dict[str, Any] = {}
    for name, value in item.attrs.items():
        if isinstance(value, bytes):
            values[name] = value.decode()
        else:
            values[name] = value.item() if isinstance(value, np.generic) else value
    return values


def hash_stored(digest: "hashlib._Hash", item: Any, replaced: str, replacement: str) -> None:
    """Update `digest` with a group or dataset as stored: names, attributes and undecoded chunks.

    Args:
        digest: The hash object to update.
        item: An h5py group or dataset.
        replaced: Name of a dataset that is skipped in groups that also have `replacement`.
        replacement: Name of a dataset of digests that covers the content of `replaced`.
    """
    attributes = {name: np.asarray(value).tolist() for name, value in item.attrs.items()}
    digest.update(repr((item.name, attributes)).encode())
    if isinstance(item, h5py.Group):
        for name in member_names(item):
            if name != replaced or replacement not in item:
                hash_stored(digest, item[name], replaced, replacement)
        return
    digest.update(repr((item.shape, str(item.dtype))).encode())
    if item.dtype.kind == "O":  # variable-length text: the chunks hold only references to it
        digest.update(repr(item[()].tolist()).encode())
    elif item.chunks is None:
        digest.update(np.asarray(item[()]).tobytes())
    else:
        for i in range(item.id.get_num_chunks()):
            offset = item.id.get_chunk_info(i).chunk_offset
            digest.update(repr(offset).encode() + item.id.read_direct_chunk(offset)[1])
