"""Hugging Face datasets on disk: Arrow files as `save_to_disk` writes them, Parquet files as the Hub stores them."""

import dataclasses
import functools
import json
import re
import threading
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.data.config import DataConfig
from pipeline.data.readers.base import DatasetImage, Listing, list_files


def list_images(config: DataConfig) -> Listing:
    """List one image per row of all `.parquet` and `.arrow` files below `data.root`.

    Raises:
        AtlasError: If there is no such file, a file is not a table, or a column is missing.
    """
    import pyarrow as pa

    if config.name and not config.root:
        config = dataclasses.replace(config, root=_snapshot(config))
    listed = list_files(config, frozenset({".parquet", ".arrow"}))
    root, files = listed.root, listed.sizes
    if config.split:
        files = {file: size for file, size in files.items() if _is_of_split(file, config.split)}
    if not files:
        raise AtlasError(f"data.root={config.root}: no .parquet or .arrow file there.")
    photos: list[DatasetImage] = []
    image_column = ""
    for file, size in files.items():
        path = str(root / file)
        try:
            schema, groups = _open_table(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise AtlasError(f"{root / file} can't be read as a table: {first_line(error)}") from error
        image_column = config.image or image_column or _find_image_column(schema, root / file)
        label_column = config.label or next((name for name in ("label", "labels") if name in schema.names), "")
        for name in (image_column, label_column):
            if name and name not in schema.names:
                raise AtlasError(f"{root / file} has no column {name!r}. {nearest_names(name, schema.names)}")
        classes = _class_names(schema, label_column)
        row = 0
        for group in range(groups):
            values = _read_column(path, group, label_column) if label_column else None
            for i in range(_row_count(path, group)):
                label = _label_text(values[i].as_py() if values is not None else None, classes)
                image = DatasetImage(f"{file}#{row}", label, len(photos), None, file, (group, i), size)
                photos.append(image)
                row += 1
    return Listing(tuple(photos), {"": str(root)}, image_column)


def _snapshot(config: DataConfig) -> str:
    """Return the folder of a dataset of the Hugging Face Hub, downloaded if `data.download`.

    Only tables are downloaded, from the branch in which the Hub keeps each dataset as Parquet: no code of a dataset
    runs.

    Raises:
        AtlasError: If the package is missing, or the dataset is not there.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise AtlasError("data.name needs a package: pip install huggingface_hub.") from error
    name = config.name or ""
    for revision in ("refs/convert/parquet", None):
        try:
            return huggingface_hub.snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=["*.parquet"],
                local_files_only=not config.download,
            )
        except Exception as error:  # the package raises errors of several libraries
            failure = error
    if not config.download:
        raise AtlasError(f"data.name={name} is not on this machine. With data.download=true it is downloaded.")
    raise AtlasError(f"data.name={name} can't be downloaded from the Hugging Face Hub: {first_line(failure)}.")


def _is_of_split(file: str, split: str) -> bool:
    """Return whether a table is part of a split, by its name: train-00000-of-00004.parquet, or a folder train."""
    *folders, name = file.split("/")
    return split in folders or re.match(rf"{re.escape(split)}[-.]", name) is not None


def _find_image_column(schema: Any, path: Path) -> str:
    """Return the first column of images: of a binary type, or a struct with `bytes` as in Hugging Face datasets."""
    import pyarrow.types as types

    for field in schema:
        kind = field.type
        is_image = types.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        if is_image or types.is_binary(kind) or types.is_large_binary(kind):
            return str(field.name)
    raise AtlasError(
        f"{path} has no image column: none is of a binary type. Set data.image to one of its columns: "
        f"{', '.join(schema.names)}."
    )


def _class_names(schema: Any, label_column: str) -> list[str]:
    """Return the names of a ClassLabel column, from the metadata of Hugging Face datasets in the schema."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])
        return list(info["info"]["features"][label_column]["names"])
    except (TypeError, KeyError, ValueError):
        return []


def _label_text(value: Any, classes: list[str]) -> str:
    """Return a cell of the label column as text; "" for no label (null, or a negative number)."""
    if isinstance(value, int) and 0 <= value < len(classes):
        value = classes[value]
    if value is None or (isinstance(value, int) and value < 0):
        return ""
    return str(value)


@functools.lru_cache(maxsize=16)
def _arrow(path: str) -> Any:
    """Return an Arrow file as a memory-mapped table: rows take memory only while they are in use."""
    import pyarrow as pa

    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


@functools.lru_cache(maxsize=16)
def _parquet(path: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, memory_map=True)


def _open_table(path: str) -> tuple[Any, int]:
    """Return (schema, number of row groups); an Arrow file is one group."""
    if path.endswith(".arrow"):
        return _arrow(path).schema, 1
    return _parquet(path).schema_arrow, _parquet(path).num_row_groups


def _row_count(path: str, group: int) -> int:
    return _arrow(path).num_rows if path.endswith(".arrow") else _parquet(path).metadata.row_group(group).num_rows


def _read_column(path: str, group: int, column: str) -> Any:
    if path.endswith(".arrow"):
        return _arrow(path).column(column)
    return _parquet(path).read_row_group(group, columns=[column]).column(column)


# Images are read in order, so that two row groups suffice; one may take a hundred megabytes.
_cached_column = functools.lru_cache(maxsize=2)(_read_column)
_locks = tuple(threading.Lock() for _ in range(16))


def image_cells(path: str, group: int, column: str) -> Any:
    """Return the image column of a row group, cached for the rows that follow.

    `lru_cache` alone would let several threads read the same group at once; with the lock they wait for the first.
    """
    with _locks[hash((path, group, column)) % len(_locks)]:
        return _cached_column(path, group, column)


def group_bytes(path: str, group: int, column: str) -> int:
    """Return the number of bytes that reading the column of a row group takes; 0 for Arrow files, which are mapped."""
    if path.endswith(".arrow"):
        return 0
    rows = _parquet(path).metadata.row_group(group)
    columns = (rows.column(i) for i in range(rows.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema.partition(".")[0] == column)
