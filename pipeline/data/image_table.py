"""The images of a dataset in columns: some 60 bytes for each, which processes of a machine share.

A tuple of objects takes 500 bytes for each image in every process. The columns are an Arrow record batch: it is read
from a file or from shared memory without a copy.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from pickle import PickleBuffer
from typing import Any, Union, overload

import numpy as np
import pyarrow as pa

from pipeline.core.hashing import hash64
from pipeline.data.readers.base import DatasetImage
from pipeline.data.readers.folder_scan import NOTHING_THERE

# So many images are objects of Python at a time.
CHUNK = 65_536

# Size of a file that was not looked up.
UNKNOWN_SIZE = -2

# Purpose of the hashes by which images are drawn.
_DRAW = "subset"


def encode(text: str) -> bytes:
    """Return text as bytes that sort as it does; names of files may be no valid UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def decode(data: bytes) -> str:
    """Return the text that `encode` made bytes of."""
    return data.decode("utf-8", "surrogatepass")


def draw_hashes(paths: Iterable[str]) -> np.ndarray:
    """Return the hashes by which images are drawn, (n,) uint64."""
    return np.fromiter((hash64(path, _DRAW) for path in paths), np.uint64)


def text_array(texts: Iterable[str]) -> pa.LargeBinaryArray:
    """Return encoded texts as an Arrow array."""
    return pa.array([encode(text) for text in texts], pa.large_binary())


class ImageTable(Sequence[DatasetImage]):
    """Images in columns; a sequence of `DatasetImage` objects, which are made as they are asked for.

    Args:
        batch: Columns in any order: `path`, `label`, `size` and `hash`; `source` unless each image is its own source;
            `file`, `offset` and `length` unless each image is a file; `box` if any image is a part of another.
    """

    COLUMNS = ("path", "label", "size", "hash", "source", "file", "offset", "length", "box")

    def __init__(self, batch: pa.RecordBatch) -> None:
        columns = batch.select([name for name in self.COLUMNS if name in batch.schema.names])
        self.batch = columns.replace_schema_metadata(None)

    @classmethod
    def of(cls, images: Iterable[DatasetImage]) -> "ImageTable":
        """Create from objects, a part of them at a time."""
        if isinstance(images, ImageTable):
            return images
        columns = _Columns()
        remaining = iter(images)
        while part := list(itertools.islice(remaining, CHUNK)):
            columns.add(part)
        return cls(columns.batch())

    @classmethod
    def of_columns(cls, columns: Mapping[str, Any], labels: np.ndarray, names: Sequence[str]) -> "ImageTable":
        """Create from arrays.

        Args:
            columns: Arrays by the name of the column, all but `label`.
            labels: Number of the label of each image in `names`, (n,).
            names: Labels, each once, in any order; "" for no label.
        """
        return cls(pa.record_batch({**columns, "label": _categories(labels, names)}))

    @classmethod
    def from_buffer(cls, content: Any) -> "ImageTable":
        """Open what `buffer` returned, without a copy."""
        return cls(pa.ipc.open_file(pa.py_buffer(content)).get_batch(0))

    def buffer(self) -> pa.Buffer:
        """Return the columns as an Arrow file."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.batch.schema) as writer:
            writer.write_batch(self.batch)
        return sink.getvalue()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Return how to create a copy; Ray keeps the buffer in shared memory, once for all workers of a machine."""
        content = self.buffer()
        return ImageTable.from_buffer, (PickleBuffer(content) if protocol >= 5 else content.to_pybytes(),)

    def __len__(self) -> int:
        return self.batch.num_rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and self.batch.equals(other.batch)

    def __hash__(self) -> int:
        return hash(len(self))

    @overload
    def __getitem__(self, key: int) -> DatasetImage: ...

    @overload
    def __getitem__(self, key: slice) -> "ImageTable": ...

    def __getitem__(self, key: int | slice) -> Union[DatasetImage, "ImageTable"]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if (start, step) == (0, 1):
                return ImageTable(self.batch.slice(0, stop))
            return ImageTable.of(self[i] for i in range(start, stop, step))
        index = range(len(self))[key]
        size = int(self.sizes[index])
        file, position = "", None
        if self._files is not None:
            numbers, names = self._files
            file = names[numbers[index]]
        if self.positions is not None and (offset := int(self.positions[0][index])) >= 0:
            position = offset, int(self.positions[1][index])
        box = self.batch.column("box")[index].as_py() if "box" in self.batch.schema.names else None
        return DatasetImage(
            path=decode(self.batch.column("path")[index].as_py()),
            label=self._label_names[self.label_numbers[index]],
            source=int(self.sources[index]),
            box=None if box is None else tuple(box),
            file=file,
            position=position,
            size=None if size == UNKNOWN_SIZE else size,
        )

    def __iter__(self) -> Iterator[DatasetImage]:
        return (self[i] for i in range(len(self)))

    def paths(self) -> Iterator[str]:
        """Yield the identities of all images."""
        for start in range(0, len(self), CHUNK):
            yield from map(decode, self.batch.column("path").slice(start, CHUNK).to_pylist())

    def column(self, name: str) -> pa.Array | None:
        """Return a column; None if all its values are trivial."""
        return self.batch.column(name) if name in self.batch.schema.names else None

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """Source of each image, (n,) int32."""
        found = self.column("source")
        return np.arange(len(self), dtype=np.int32) if found is None else found.to_numpy()

    @property
    def own_sources(self) -> bool:
        """Whether each image is known to be its own source."""
        return self.column("source") is None

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Bytes of the file of each image, (n,) int64; −1 if it is missing, `UNKNOWN_SIZE` if it was not looked up."""
        return self.batch.column("size").to_numpy()

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """Hash of the path of each image, (n,) uint64."""
        return self.batch.column("hash").to_numpy()

    @functools.cached_property
    def positions(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions in files, two (n,) int64 with −1 for images that are files; None if all are files."""
        if self.column("offset") is None:
            return None
        return self.batch.column("offset").to_numpy(), self.batch.column("length").to_numpy()

    @functools.cached_property
    def label_numbers(self) -> np.ndarray:
        """Number of the label of each image in a list that may have unused labels, (n,) int32."""
        return self.batch.column("label").indices.to_numpy()

    @functools.cached_property
    def _label_names(self) -> list[str]:
        return [decode(name) for name in self.batch.column("label").dictionary.to_pylist()]

    @functools.cached_property
    def _files(self) -> tuple[np.ndarray, list[str]] | None:
        column = self.column("file")
        if column is None:
            return None
        return column.indices.to_numpy(), [decode(name) for name in column.dictionary.to_pylist()]

    @functools.cached_property
    def labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        """All labels in alphabetical order, and the label number of each image, (n,) int32; −1 for no label."""
        used = np.flatnonzero(np.bincount(self.label_numbers, minlength=len(self._label_names)))
        names = [self._label_names[i] for i in used.tolist()]
        numbers = np.full(len(self._label_names), -1, np.int32)
        numbers[[i for i, name in zip(used.tolist(), names, strict=True) if name]] = np.arange(
            sum(map(bool, names)), dtype=np.int32
        )
        return tuple(name for name in names if name), numbers[self.label_numbers]

    def draw(self, count: int) -> np.ndarray:
        """Return the indices of at most `count` images, those with the lowest hashes, in the order of hashes; int32."""
        chosen = np.arange(len(self))
        if 0 < count < len(self):
            chosen = np.flatnonzero(self.hashes <= np.partition(self.hashes, count - 1)[count - 1])
        return chosen[np.lexsort((chosen, self.hashes[chosen]))][:count].astype(np.int32)

    def with_labels(self, labels: Iterable[str]) -> "ImageTable":
        """Return the table with other labels, one for each image."""
        numbers: dict[str, int] = {}
        coded = np.fromiter((numbers.setdefault(label, len(numbers)) for label in labels), np.int32)
        return self._replaced("label", _categories(coded, list(numbers)))

    def renamed_labels(self, rename: Callable[[str], str]) -> "ImageTable":
        """Return the table with each label replaced."""
        names = [rename(name) for name in self._label_names]
        distinct = {name: i for i, name in enumerate(dict.fromkeys(names))}
        numbers = np.array([distinct[name] for name in names], np.int32)
        return self._replaced("label", _categories(numbers[self.label_numbers], list(distinct)))

    def with_sizes(self, sizes: np.ndarray) -> "ImageTable":
        """Return the table with the sizes of files, (n,)."""
        return self._replaced("size", pa.array(sizes, pa.int64()))

    def _replaced(self, name: str, column: pa.Array) -> "ImageTable":
        index = self.batch.schema.get_field_index(name)
        return ImageTable(self.batch.set_column(index, name, column))


def _categories(numbers: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Return the text of each image as a number in a sorted list of texts."""
    order = sorted(range(len(names)), key=lambda i: encode(names[i]))
    position = np.empty(len(names), np.int32)
    position[order] = np.arange(len(names), dtype=np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(position[numbers]), text_array(names[i] for i in order))


class _Columns:
    """Columns that grow by parts of a dataset."""

    def __init__(self) -> None:
        self._paths: list[pa.Array] = [pa.array([], pa.large_binary())]
        self._labels: dict[str, int] = {}
        self._files: dict[str, int] = {}
        self._numbers: dict[str, list[np.ndarray]] = {}
        self._boxes: list[pa.Array] = []

    def add(self, images: Sequence[DatasetImage]) -> None:
        """Add images."""
        self._paths.append(text_array(image.path for image in images))
        self._boxes.append(pa.array([image.box for image in images], pa.list_(pa.int32(), 4)))
        for name, kind, values in (
            ("hash", np.uint64, (hash64(image.path, _DRAW) for image in images)),
            ("label", np.int32, (self._labels.setdefault(image.label, len(self._labels)) for image in images)),
            ("file", np.int32, (self._files.setdefault(image.file, len(self._files)) for image in images)),
            ("source", np.int32, (image.source for image in images)),
            ("size", np.int64, (UNKNOWN_SIZE if image.size is None else image.size for image in images)),
            ("offset", np.int64, (image.position[0] if image.position else -1 for image in images)),
            ("length", np.int64, (image.position[1] if image.position else -1 for image in images)),
        ):
            self._numbers.setdefault(name, []).append(np.fromiter(values, kind, len(images)))

    def batch(self) -> pa.RecordBatch:
        """Return the columns, without those whose values are trivial."""
        kinds = {"hash": np.uint64, "size": np.int64, "offset": np.int64, "length": np.int64}
        found = {
            name: np.concatenate([np.zeros(0, kinds.get(name, np.int32)), *self._numbers.get(name, ())])
            for name in ("hash", "label", "file", "source", "size", "offset", "length")
        }
        columns: dict[str, Any] = {"path": pa.concat_arrays(self._paths), "hash": found["hash"], "size": found["size"]}
        columns["label"] = _categories(found["label"], list(self._labels))
        if self._files.keys() - {""}:
            columns["file"] = _categories(found["file"], list(self._files))
        if (found["offset"] >= 0).any():
            columns |= {name: found[name] for name in ("offset", "length")}
        if (found["source"] != np.arange(len(found["source"]))).any():
            columns["source"] = found["source"]
        if any(part.null_count < len(part) for part in self._boxes):
            columns["box"] = pa.concat_arrays(self._boxes)
        return pa.record_batch(columns)


def file_size(path: str | Path) -> int:
    """Return the bytes of a file; −1 if there is none, or a broken link.

    Raises:
        OSError: If the storage fails, or permission is missing.
    """
    try:
        return Path(path).stat().st_size
    except OSError as error:
        if error.errno in NOTHING_THERE:
            return -1
        raise
