"""The fingerprint of a dataset: a digest of what identifies the inputs of a network.

It is the sha256 of one JSON text, as `hashing.digest_of` would make it of a list, which for a million images would take
ten seconds and a gigabyte. The text is made by columns, a part of the images at a time.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.image_table import CHUNK, UNKNOWN_SIZE, ImageTable

# Image files with these suffixes have 8 bits per channel, so that no version has ever scaled their pixel values.
EIGHT_BIT_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"})


def digest(table: ImageTable, *details: object) -> str:
    """Return the sha256 of images and details as canonical JSON.

    Args:
        table: The images: path, label, source, box, position and size of the file are part of the digest.
        details: What else identifies the inputs of the network, as plain data.
    """
    state = hashlib.sha256(b"[[")
    for start in range(0, len(table), CHUNK):
        state.update((b"," if start else b"") + _rows(table, start, min(start + CHUNK, len(table))))
    state.update(b"]")
    for detail in details:
        state.update(b"," + _json(detail))
    state.update(b"]")
    return state.hexdigest()


def _json(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return text.encode()


def _rows(table: ImageTable, start: int, end: int) -> bytes:
    """Return the images `start` … `end` - 1 as JSON, separated by commas."""
    paths = _slice(table.column("path"), start, end)
    label = _slice(table.column("label"), start, end)
    if table.column("box") is not None or not (_is_plain(paths) and _is_plain(label.dictionary)):
        images = (table[i] for i in range(start, end))
        rows = [[p.path, p.label, p.source, p.box, p.position, -1 if p.size is None else p.size] for p in images]
        return _json(rows)[1:-1]
    sources = pa.array(table.sources[start:end])
    positions: Any = pa.scalar(b"null", pa.large_binary())
    if table.positions is not None:
        offsets, lengths = (pa.array(part[start:end]) for part in table.positions)
        inside = _joined(b"[", _text(offsets), b",", _text(lengths), b"]")
        positions = pc.call_function(
            "if_else", [pc.call_function("less", [offsets, pa.scalar(0, pa.int64())]), positions, inside]
        )
    sizes = pa.array(np.where(table.sizes[start:end] == UNKNOWN_SIZE, -1, table.sizes[start:end]))
    labels = label.dictionary.take(label.indices)
    rows = _joined(b'["', paths, b'","', labels, b'",', _text(sources), b",null,", positions, b",", _text(sizes), b"]")
    return b",".join(rows.to_pylist())


def _slice(column: Any, start: int, end: int) -> Any:
    assert column is not None
    return column.slice(start, end - start)


def _text(numbers: pa.Array) -> pa.Array:
    return numbers.cast(pa.large_string()).cast(pa.large_binary())


def _joined(*parts: Any) -> pa.Array:
    """Return the concatenation of arrays and constants, element by element."""
    kind = pa.large_binary()
    values = [pa.scalar(part, kind) if isinstance(part, bytes) else part for part in parts]
    return pc.call_function("binary_join_element_wise", [*values, pa.scalar(b"", kind)])


def _is_plain(texts: Any) -> bool:
    """Return whether JSON writes these texts as they are: printable ASCII without quotes and backslashes."""
    first, last = texts.offset, texts.offset + len(texts)
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return True
    bounds = np.frombuffer(offsets, np.int64)[[first, last]]
    characters = np.frombuffer(data, np.uint8)[bounds[0] : bounds[1]]
    allowed = np.zeros(256, bool)
    allowed[0x20:0x7F] = True
    allowed[[0x22, 0x5C]] = False
    return bool(allowed[characters].all())


def has_deep_files(paths: Iterator[str] | Sequence[str]) -> bool:
    """Return whether an image may have more than 8 bits per channel, as far as the suffixes of the files tell."""
    return any(not (_ends_8_bit(path) or _suffix(path) in EIGHT_BIT_SUFFIXES) for path in paths)


def _ends_8_bit(path: str) -> bool:
    """Return whether a path certainly has one of `EIGHT_BIT_SUFFIXES`; faster than `Path.suffix`."""
    return any(path[-n:].lower() in EIGHT_BIT_SUFFIXES and path[-n - 1 : -n] not in ("", "/") for n in (4, 5))


def _suffix(path: str) -> str:
    return Path(path).suffix.lower()
