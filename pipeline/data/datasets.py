"""Where photographs come from: folders, tables and archives, listed once, in an order that is everyone's.

A photograph's number in the list is its identity in the run; its `path` is its identity for ever, and does not
depend on where the dataset lies. Listing opens no picture. Reading happens later, in workers, from plain records.
"""

import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.core.config_files import decoded
from pipeline.core.errors import AtlasError, first_line, nearest
from pipeline.data import image_formats, multiband
from pipeline.models.config import Preprocessing

log = logging.getLogger(__name__)

# A picture of more pixels than this is refused before it is decoded, unless `data.max_pixels` says otherwise: a small
# file can unpack to gigabytes.
MAX_PIXELS = 64_000_000

# Files of these suffixes have 8 bits a channel: their pixel values have never been scaled.
EIGHT_BITS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"})

# How files without a suffix are counted, and how many kinds of files a message lists.
NO_SUFFIX = "(no suffix)"
KINDS = 12

# Photographs in the wheels of scikit-image and scikit-learn (all free to use; see the packages' own notes).
# Left out: drawings, test charts, thumbnails, and the right half of the motorcycle stereo pair.
SAMPLES = {
    "skimage/data": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
        "coins.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
        "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}  # fmt: skip

# Crops of a sample: (share of the shorter side, rows, columns). One whole view, then closer and closer.
GRID = ((1.0, 1, 2), (0.6, 2, 3), (0.35, 3, 4))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which photographs: a source of `LISTINGS`, the folder `root` that it lists, and where the labels are.

    `labels` is a table of paths and labels (CSV, TSV or a JSON object) that replaces the source's own labels;
    `image` and `label` are columns of a table, found by type and name where they are null. Images of more than
    `max_pixels` are refused before they are decoded; null sets no limit.
    """

    source: str = "samples"
    root: str | None = None
    limit: int | None = None
    labels: str | None = None
    image: str | None = None
    label: str | None = None
    max_pixels: int | None = MAX_PIXELS


@dataclasses.dataclass(frozen=True, slots=True)
class Photo:
    """One photograph: what it is called, its label, the picture it comes from, and where to read it.

    `box` is the part meant, (left, top, right, bottom) in pixels of the picture. Photographs of one `source` never
    share a list of examples. `file` holds it, below the dataset's root; `at` says where in the file: (offset, bytes)
    in an archive, (row group, row) in a table, nothing if it is the file.
    """

    path: str
    label: str
    source: int
    box: tuple[int, int, int, int] | None = None
    file: str = ""
    at: tuple[int, int] | None = None

    @property
    def picture(self) -> str:
        """Identity of the whole picture that this is, or is a part of."""
        return self.path if self.box is None else self.path.rpartition("#")[0]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A listed dataset: its photographs in order, where they lie on this machine, and the column with pictures.

    Pictures of more than `max_pixels` are not decoded.
    """

    photos: tuple[Photo, ...]
    roots: dict[str, str]
    column: str = ""
    sent: bool = False  # whether every picture lies by itself below the one root, under what it is called
    max_pixels: int | None = MAX_PIXELS

    def locate(self, photo: Photo) -> Path:
        """The file that holds a photograph."""
        if self.sent:
            return Path(self.roots[""], photo.picture)
        name = photo.file or photo.picture
        first, _, rest = name.partition("/")
        return Path(self.roots[first], rest) if first in self.roots else Path(self.roots[""], name)

    def open(self, photo: Photo) -> Path | io.BytesIO:
        """What Pillow can open. Raises OSError or ValueError where there is nothing."""
        path = self.locate(photo)
        if photo.at is None or self.sent:
            return path
        if not self.column:
            offset, size = photo.at
            with path.open("rb") as handle:
                handle.seek(offset)
                return io.BytesIO(handle.read(size))
        group, row = photo.at
        value = _pictures(str(path), group, self.column)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return self._beside(path, str(value["path"]))
        if not isinstance(content, bytes):
            raise ValueError("an empty cell")
        return io.BytesIO(content)

    def _beside(self, table: Path, name: str) -> Path:
        """The file that a row of a table names, relative to the table's folder or to the root.

        Raises ValueError where it is outside the root, by its name or by a link: a table that somebody else made must
        not be able to open any file of this machine, or to send it to workers.
        """
        root = Path(self.roots[""]).resolve()
        places = [(folder / name).resolve() for folder in (table.parent, root)]
        inside = [place for place in places if place.is_relative_to(root)]
        there = [place for place in inside if place.exists()]
        if Path(name).is_absolute() or not (there or inside == places):
            raise ValueError(f"outside the dataset: the path {name!r} must be relative and lie below data.root")
        return [*there, *inside][0]

    def content(self, photo: Photo) -> bytes:
        """The bytes of a picture, to be sent to where its file can't be seen. Raises OSError or ValueError."""
        file = self.open(photo)
        return file.read_bytes() if isinstance(file, Path) else file.getvalue()

    @functools.cached_property
    def sources(self) -> np.ndarray | None:
        """(photographs,) int32: the source of each; None if every one is its own."""
        found = np.array([p.source for p in self.photos], np.int32)
        return found if len(np.unique(found)) < len(found) else None

    @functools.cached_property
    def labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        """All labels in order, and the number of each photograph's among them, (photographs,) int32; −1 for none."""
        names = tuple(sorted({p.label for p in self.photos} - {""}))
        number = {name: i for i, name in enumerate(names)} | {"": -1}
        return names, np.array([number[p.label] for p in self.photos], np.int32)


def listing(config: DataConfig, channels: int = 3) -> Dataset:
    """The photographs of a source, in an order that is the same on every machine, for a network of `channels`.

    Raises `AtlasError` where there is no folder or no image in it.
    """
    if config.source not in LISTINGS:
        raise AtlasError(f"data.source={config.source!r} is unknown. {nearest(config.source, LISTINGS)}")
    if channels in (1, 3):
        dataset = LISTINGS[config.source](config)
    elif config.source == "folder":
        dataset = _folder(config, multiband.SUFFIXES)
    else:
        raise AtlasError(
            f"The network takes {channels} channels, and photographs have 1 or 3. Give data=folder data.root=DIR with "
            f"files of {channels} bands ({', '.join(sorted(multiband.SUFFIXES))})."
        )
    dataset = dataclasses.replace(dataset, photos=dataset.photos[: config.limit], max_pixels=config.max_pixels)
    if not dataset.photos:
        raise AtlasError(f"data={config.source}: no image at all.")
    return _labelled(dataset, Path(config.labels).expanduser()) if config.labels else dataset


def fingerprint(dataset: Dataset, recipe: Preprocessing) -> list[object]:
    """What identifies the pixels that a network sees: paths, labels, crops, file sizes and the input recipe.

    The limit of pixels counts wherever it is not the usual one, since it decides which photographs are read.
    """
    sizes = {}
    for photo in dataset.photos:
        name = photo.file or photo.picture
        if name not in sizes:
            path = dataset.locate(photo)
            sizes[name] = path.stat().st_size if path.exists() else -1
    photos = [[p.path, p.label, p.source, p.box, p.at, sizes[p.file or p.picture]] for p in dataset.photos]
    more: list[object] = []
    # The packaged samples have 8 bits, though they are PNG.
    if "" in dataset.roots and any(Path(p.picture).suffix.lower() not in EIGHT_BITS for p in dataset.photos):
        more.append("levels by type")  # former versions scaled them by their values
    if dataset.max_pixels != MAX_PIXELS:
        more.append(["max_pixels", dataset.max_pixels])
    return [photos, dataset.column, dataclasses.asdict(recipe), *more]


def _labelled(dataset: Dataset, path: Path) -> Dataset:
    """The dataset with labels from a file: JSON {path: label}, or a table of which they are the first two columns."""
    if not path.is_file():
        raise AtlasError(f"data.labels={path}: there is no such file.")
    try:
        text = decoded(path.read_bytes(), f"data.labels={path}")
        if path.suffix == ".json":
            found = {str(k): str(v) for k, v in json.loads(text).items()}
        else:
            separator = "\t" if path.suffix in (".tsv", ".tab") else ","
            table = pd.read_csv(
                io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False, usecols=[0, 1]
            )
            found = dict(zip(table[0], table[1], strict=True))
    except (ValueError, AttributeError, OSError) as error:
        raise AtlasError(
            f"data.labels={path} can't be read ({first_line(error)}): use rows of path,label or a JSON object."
        ) from error
    known = {photo.picture for photo in dataset.photos}
    if not known & set(found):
        raise AtlasError(
            f"data.labels={path} names none of the photographs: its paths must be those below data.root, "
            f"as {dataset.photos[0].picture!r}."
        )
    photos = tuple(dataclasses.replace(p, label=found.get(p.picture, "")) for p in dataset.photos)
    return dataclasses.replace(dataset, photos=photos)


def _samples(config: DataConfig) -> Dataset:
    photos, roots = [], {}
    for source, (folder, name) in enumerate((f, n) for f, names in SAMPLES.items() for n in names):
        package, _, inside = folder.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise AtlasError(f"data=samples needs the package {package}; install the project with scripts/atlas.")
        roots[package] = str(Path(spec.submodule_search_locations[0], inside))
        with Image.open(Path(roots[package], name)) as image:
            width, height = image.size
        for box in grid_boxes(width, height):
            path = f"{package}/{name}#{','.join(map(str, box))}"
            photos.append(Photo(path, Path(name).stem, source, box))
    return Dataset(tuple(photos), roots)


def grid_boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Square crops of a picture in a fixed grid at several scales, (left, top, right, bottom)."""
    seen = set()
    for share, rows, columns in GRID:
        side = round(share * min(width, height))
        if height > width:
            rows, columns = columns, rows
        for row in range(rows):
            for column in range(columns):
                top = round((height - side) * (row / (rows - 1) if rows > 1 else 0.5))
                left = round((width - side) * (column / (columns - 1) if columns > 1 else 0.5))
                box = (left, top, left + side, top + side)
                if box not in seen:
                    seen.add(box)
                    yield box


def _files(
    config: DataConfig, suffixes: frozenset[str], contents: bool = False
) -> tuple[Path, list[str], Counter[str]]:
    """The root and the relative posix paths of all files below it, sorted as text: the same on every file system.

    With `contents`, files without a suffix are listed as well if they begin like an image. The third result counts the
    files that are passed over, by suffix.
    """
    if not config.root:
        raise AtlasError(f"data={config.source} needs data.root=<folder>.")

    def listed(path: Path) -> bool:
        kind = path.suffix.lower()
        return kind in suffixes or (contents and not kind and _is_image(path))

    root = Path(config.root).expanduser().absolute()
    if root.is_file() and listed(root):
        return root.parent, [root.name], Counter()
    if not root.is_dir():
        raise AtlasError(f"data.root={config.root}: there is no such folder.")
    files = []
    passed: Counter[str] = Counter()
    walked: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link may lead back up: every real folder is walked once.
        real = os.path.realpath(folder)
        if real in walked:
            folders.clear()
            continue
        walked.add(real)
        folders.sort()
        for path in (Path(folder, name) for name in names):
            if listed(path):
                files.append(path.relative_to(root))
            else:
                passed[path.suffix.lower() or NO_SUFFIX] += 1
    return root, sorted(path.as_posix() for path in files), passed


def _is_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image that this machine can decode."""
    try:
        if not path.is_file():  # opening a pipe would wait for somebody to write
            return False
        with path.open("rb") as handle:
            return _begins_as_image(handle.read(image_formats.HEAD))
    except OSError:
        return False


def _begins_as_image(head: bytes) -> bool:
    found = image_formats.identified(head)
    return found is not None and image_formats.readable(found)


def _report(config: DataConfig, found: bool, passed: Counter[str], suffixes: frozenset[str]) -> None:
    """Log what was passed over, by kind. Raises `AtlasError` where nothing was `found`."""
    total = passed.total()
    kinds = [f"{kind} {count}" for kind, count in sorted(passed.items(), key=lambda item: (-item[1], item[0]))]
    rest = f", and {len(kinds) - KINDS} more kinds" if len(kinds) > KINDS else ""
    counted = ", ".join(kinds[:KINDS]) + rest
    remedies = image_formats.remedies(passed)
    if not found:
        there = f"{total} files of other kinds: {counted}" if total else "no file"
        fixes = "".join(f" {remedy[0].upper()}{remedy[1:]}." for remedy in remedies)
        raise AtlasError(
            f"data={config.source}: no image at all. data.root={config.root} holds {there}. "
            f"Suffixes read: {', '.join(sorted(suffixes))}.{fixes}"
        )
    if total:
        files = "1 file of another kind" if total == 1 else f"{total:,} files of other kinds"
        log.info("%s passed over: %s", files, "; ".join([counted, *remedies]))


def _folder(config: DataConfig, suffixes: frozenset[str] | None = None) -> Dataset:
    """All image files below the root: of the given suffixes, or of all formats that this machine can decode."""
    read = image_formats.suffixes() if suffixes is None else suffixes
    root, files, passed = _files(config, read, contents=suffixes is None)
    _report(config, bool(files), passed, read)
    photos = [Photo(path, path.partition("/")[0] if "/" in path else "", i) for i, path in enumerate(files)]
    return Dataset(tuple(photos), {"": str(root)})


def _webdataset(config: DataConfig) -> Dataset:
    """Tar shards: the headers are read once, the pictures later from their offsets. `<key>.cls` holds a label."""
    root, files, passed = _files(config, frozenset({".tar"}))
    if not files:
        raise AtlasError(f"data.root={config.root}: no .tar there (compressed archives must be unpacked to .tar).")
    photos: list[Photo] = []
    for file in files:
        members: list[tuple[str, int, int]] = []
        labels: dict[str, str] = {}
        try:
            with tarfile.open(root / file, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        _take(archive, member, members, labels, passed)
        except (tarfile.TarError, OSError) as error:
            log.warning("%s is damaged (%s): the %d pictures before that are used", file, error, len(members))
        for name, offset, size in members:
            folder, _, last = name.rpartition("/")
            label = labels.get(f"{folder}/{last.partition('.')[0]}", folder.partition("/")[0])
            photos.append(Photo(f"{file}#{name}", label, len(photos), file=file, at=(offset, size)))
    _report(config, bool(photos), passed, image_formats.suffixes())
    return Dataset(tuple(photos), {"": str(root)})


def _take(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    members: list[tuple[str, int, int]],
    labels: dict[str, str],
    passed: Counter[str],
) -> None:
    """Add a member of a tar shard to the pictures, the labels, or the count of what is passed over."""
    folder, _, name = member.name.rpartition("/")
    key, _, ending = name.partition(".")
    kind = Path(name).suffix.lower()
    if ending == "cls" and member.size < 4096:
        content = archive.extractfile(member)
        labels[f"{folder}/{key}"] = content.read().decode("utf-8", "replace").strip() if content else ""
    elif kind in image_formats.suffixes() or (not kind and _member_is_image(archive, member)):
        members.append((member.name, member.offset_data, member.size))
    else:
        passed[kind or NO_SUFFIX] += 1


def _member_is_image(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    content = archive.extractfile(member)
    return content is not None and _begins_as_image(content.read(image_formats.HEAD))


def _huggingface(config: DataConfig) -> Dataset:
    """A dataset on disk, as `save_to_disk` writes it (Arrow) or as a hub holds it (Parquet)."""
    import pyarrow as pa

    root, files, _ = _files(config, frozenset({".parquet", ".arrow"}))
    if not files:
        raise AtlasError(f"data.root={config.root}: no .parquet or .arrow file there.")
    photos: list[Photo] = []
    image = ""
    for file in files:
        try:
            schema, groups = _table(str(root / file))
        except (pa.ArrowInvalid, OSError) as error:
            raise AtlasError(f"{root / file} can't be read as a table: {first_line(error)}") from error
        image = config.image or image or _image_column(schema, root / file)
        label = config.label or ("label" if "label" in schema.names else "labels" if "labels" in schema.names else "")
        for name in (image, label):
            if name and name not in schema.names:
                raise AtlasError(f"{root / file} has no column {name!r}. {nearest(name, schema.names)}")
        classes = _class_names(schema, label)
        row = 0
        for group in range(groups):
            values = _columns(str(root / file), group, label) if label else None
            count = _rows(str(root / file), group)
            for i in range(count):
                value = values[i].as_py() if values is not None else None
                named = classes[value] if isinstance(value, int) and 0 <= value < len(classes) else value
                text = "" if named is None or (isinstance(named, int) and named < 0) else str(named)
                photos.append(Photo(f"{file}#{row}", text, len(photos), file=file, at=(group, i)))
                row += 1
    return Dataset(tuple(photos), {"": str(root)}, image)


def _image_column(schema: Any, path: Path) -> str:
    """The first column of pictures: binary, or a struct with `bytes`, as Hugging Face datasets has it."""
    import pyarrow.types as types

    for field in schema:
        kind = field.type
        struct = types.is_struct(kind) and any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        if struct or types.is_binary(kind) or types.is_large_binary(kind):
            return str(field.name)
    raise AtlasError(f"{path} has no column of pictures; data.image=… names one. Columns: {', '.join(schema.names)}.")


def _class_names(schema: Any, label: str) -> list[str]:
    """Names of a ClassLabel column, from the metadata that Hugging Face datasets keeps in the schema."""
    try:
        info = json.loads(schema.metadata[b"huggingface"])
        return list(info["info"]["features"][label]["names"])
    except (TypeError, KeyError, ValueError):
        return []


@functools.lru_cache(maxsize=16)
def _arrow(path: str) -> Any:
    """An Arrow file as a table; memory-mapped, so that rows cost memory only while they are used."""
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


def _table(path: str) -> tuple[Any, int]:
    """(schema, number of row groups); an Arrow file is one group."""
    if path.endswith(".arrow"):
        return _arrow(path).schema, 1
    return _parquet(path).schema_arrow, _parquet(path).num_row_groups


def _rows(path: str, group: int) -> int:
    return _arrow(path).num_rows if path.endswith(".arrow") else _parquet(path).metadata.row_group(group).num_rows


def _columns(path: str, group: int, column: str) -> Any:
    if path.endswith(".arrow"):
        return _arrow(path).column(column)
    return _parquet(path).read_row_group(group, columns=[column]).column(column)


# Photographs are read in order: a few row groups are enough, and each may be a hundred megabytes.
_kept_columns = functools.lru_cache(maxsize=2)(_columns)
_reading = tuple(threading.Lock() for _ in range(16))


def _pictures(path: str, group: int, column: str) -> Any:
    """A column of a row group, kept for the rows that follow.

    `lru_cache` lets every thread that asks meanwhile read the same group again; the lock makes them wait for the first.
    """
    with _reading[hash((path, group, column)) % len(_reading)]:
        return _kept_columns(path, group, column)


LISTINGS: dict[str, Callable[[DataConfig], Dataset]] = {
    "samples": _samples,
    "folder": _folder,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
}
