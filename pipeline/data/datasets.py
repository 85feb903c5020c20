"""Datasets: list the images of a source once, and open them later from plain records.

The number of an image in the list identifies it within a run. Its `path` identifies it permanently and does not
depend on where the dataset is stored. Listing decodes no image; workers do that later.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core import hashing, plugins
from pipeline.core.config_files import decode_text, is_url
from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.data import fingerprint as fingerprints
from pipeline.data import listing_cache, multiband, remote
from pipeline.data.config import MAX_BYTES, MAX_PIXELS, DataConfig
from pipeline.data.image_table import UNKNOWN_SIZE, ImageTable, file_size
from pipeline.data.readers import folder, huggingface, samples, torchvision, webdataset
from pipeline.data.readers.base import MISSING, DatasetImage, Listing
from pipeline.models.config import Preprocessing

# A row group of a table is read at once: so many times `data.max_bytes` is its limit.
GROUP_IMAGES = 16

# Readers by the name that `data.source` gives.
READERS: dict[str, Callable[[DataConfig], Listing]] = {
    "samples": samples.list_images,
    "folder": folder.list_images,
    "huggingface": huggingface.list_images,
    "webdataset": webdataset.list_images,
    "torchvision": torchvision.list_images,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A listed dataset.

    Attributes:
        images: All images, in order; an `ImageTable` where they were listed.
        roots: Folders on this machine, or URLs, by the first part of a path; "" for all other paths.
        column: Image column of a table; "" for other sources.
        copied: Whether the images were copied to this machine: each is then a file of its own below `roots[""]`, named
            by `DatasetImage.source_path`.
        max_pixels: Images with more pixels are not decoded; None sets no limit.
        max_bytes: Encoded images of more bytes are not read; None sets no limit.
        unreadable: Why images can't be read, by source path, as far as it is known without opening them.
    """

    images: Sequence[DatasetImage]
    roots: dict[str, str]
    column: str = ""
    copied: bool = False
    max_pixels: int | None = MAX_PIXELS
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_bytes: int | None = MAX_BYTES

    def locate(self, photo: DatasetImage) -> Path:
        """Return the file that contains an image."""
        if self.copied:
            return Path(self.roots[""], photo.source_path)
        name = photo.file or photo.source_path
        first, _, remainder = name.partition("/")
        return Path(self.roots[first], remainder) if first in self.roots else Path(self.roots[""], name)

    def open(self, photo: DatasetImage) -> Path | io.BytesIO:
        """Return the encoded image, as a path or as bytes that Pillow can open.

        Raises:
            OSError: If the file can't be read.
            ValueError: If a table has no image in this row, or a path outside the dataset.
        """
        if self.is_remote and not self.copied and not self.column:
            return self._open_remote(photo)
        path = self.locate(photo)
        if photo.position is None or self.copied:
            return path
        if not self.column:
            self.check_size(photo.position[1])
            return webdataset.read_member(path, *photo.position)
        group, row = photo.position
        # Cells are read together, so that their size is not known before.
        self.check_size(huggingface.group_bytes(str(path), group, self.column), GROUP_IMAGES)
        value = huggingface.image_cells(str(path), group, self.column)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None and isinstance(value, dict) and value.get("path"):
            return self._resolve_cell_path(path, str(value["path"]))
        if not isinstance(content, bytes):
            raise ValueError("an empty cell")
        self.check_size(len(content))
        return io.BytesIO(content)

    @property
    def is_remote(self) -> bool:
        """Whether the images are at a URL."""
        return is_url(self.roots.get("", ""))

    def _open_remote(self, photo: DatasetImage) -> io.BytesIO:
        """Return an encoded image at a URL. Raises `StorageError` if it can't be read."""
        url = remote.join(self.roots[""], photo.file or photo.source_path)
        offset, length = photo.position or (0, None)
        self.check_size(photo.size or 0 if length is None else length)
        return io.BytesIO(remote.read(url, offset, length))

    def check_size(self, size: int, images: int = 1) -> None:
        """Check the size of an encoded image, or of several that are read together.

        Raises:
            ValueError: If it is above `max_bytes` for each.
        """
        if self.max_bytes is not None and size > self.max_bytes * images:
            raise ValueError(f"too large: {size:,} bytes; data.max_bytes allows {self.max_bytes * images:,}")

    def _resolve_cell_path(self, table: Path, name: str) -> Path:
        """Return the file that a table cell names, relative to the table's folder or to the root.

        A table from an untrusted source must not be able to open any file of this machine, or to send it to workers.

        Raises:
            ValueError: If the path is absolute, leads out of the root, be it through a symbolic link, or if there is no
                such file.
        """
        root = Path(self.roots[""]).resolve()
        candidates = [(folder / name).resolve() for folder in (table.parent, root)]
        inside = [path for path in candidates if path.is_relative_to(root)]
        existing = [path for path in inside if path.exists()]
        if Path(name).is_absolute() or not (existing or inside == candidates):
            raise ValueError(f"outside the dataset: the path {name!r} must be relative and lie below data.root")
        if not existing:
            raise ValueError(MISSING)
        return existing[0]

    def content(self, photo: DatasetImage) -> bytes:
        """Return the bytes of an encoded image, to send to workers that can't read its file.

        Raises:
            OSError: As `open`.
            ValueError: As `open`.
        """
        file = self.open(photo)
        if isinstance(file, Path):
            self.check_size(file.stat().st_size)
        return file.read_bytes() if isinstance(file, Path) else file.getvalue()

    @functools.cached_property
    def table(self) -> ImageTable:
        """The images in columns."""
        return ImageTable.of(self.images)

    @functools.cached_property
    def sources(self) -> np.ndarray | None:
        """Source of each image, (n,) int32; None if no two images have the same source."""
        if self.table.own_sources:
            return None
        return self.source_numbers if len(np.unique(self.source_numbers)) < len(self.source_numbers) else None

    @property
    def source_numbers(self) -> np.ndarray:
        """Source of each image, (n,) int32."""
        return self.table.sources

    @property
    def labels(self) -> tuple[tuple[str, ...], np.ndarray]:
        """All labels in alphabetical order, and the label number of each image, (n,) int32; −1 for no label."""
        return self.table.labels

    def draw(self, count: int) -> np.ndarray:
        """Return the indices of at most `count` images, drawn by hashes of their paths, in the order of hashes; int32.

        Only paths matter, so that the draw is the same on every machine and for every order of the images.
        """
        return self.table.draw(count)


def list_dataset(config: DataConfig, channels: int = 3) -> Dataset:
    """List the images of a source, in an order that is the same on every machine.

    Args:
        config: Configuration of the dataset.
        channels: Input channels of the network. For numbers other than 1 and 3, only folders of multi-band files
            can be listed.

    Raises:
        AtlasError: If the source is unknown or has no image.
    """
    if plugins.is_reference(config.source):
        return _limited(plugins.load_object(config.source, "data.source")(config), config)
    if config.source not in READERS:
        raise AtlasError(f"data.source={config.source!r} is unknown. {nearest_names(config.source, READERS)}")
    if channels in (1, 3):
        listed = READERS[config.source](config)
    elif config.source == "folder":
        listed = folder.list_images(config, multiband.SUFFIXES)
    else:
        raise AtlasError(
            f"The network takes {channels} channels, but the images of data={config.source} have 1 or 3. Use "
            f"data=folder data.root=DIR with files of {channels} bands ({', '.join(sorted(multiband.SUFFIXES))})."
        )
    return _limited(listed, config)


def _limited(listed: Listing, config: DataConfig) -> Dataset:
    """Return the dataset of a listing, with the limit and the labels of the configuration."""
    if not isinstance(listed, Listing):
        raise AtlasError(f"data.source={config.source} must return a pipeline.data.readers.base.Listing.")
    dataset = Dataset(
        ImageTable.of(listed.photos[: config.limit]),
        listed.roots,
        listed.column,
        max_pixels=config.max_pixels,
        unreadable=listed.unreadable,
        max_bytes=config.max_bytes,
    )
    if not dataset.images:
        raise AtlasError(f"data={config.source}: no image at all.")
    return _with_labels(dataset, Path(config.labels).expanduser()) if config.labels else dataset


def fingerprint(dataset: Dataset, recipe: Preprocessing) -> str:
    """Return the digest of what identifies the network inputs: paths, labels, crops, file sizes and the preprocessing.

    The limits of pixels and bytes are included where they are not the defaults: they determine which images are read.
    That of a large dataset is kept in the user's cache, under a digest of its columns, which takes a tenth of the time.
    """
    table = _with_sizes(dataset)
    if len(table) <= listing_cache.MIN_IMAGES:
        return _fingerprint(dataset, table, recipe)
    settings = [dataclasses.asdict(recipe), dataset.column, dataset.max_pixels, dataset.max_bytes, "" in dataset.roots]
    key = hashing.digest_of([hashlib.blake2b(table.buffer()).hexdigest(), settings])
    return listing_cache.remembered(key, lambda: _fingerprint(dataset, table, recipe))


def _fingerprint(dataset: Dataset, table: ImageTable, recipe: Preprocessing) -> str:
    options: list[object] = []
    # The sample images have 8 bits, although some are PNG files: their roots are named by package, never by "".
    if "" in dataset.roots and fingerprints.has_deep_files(
        table.paths() if table.column("box") is None else (photo.source_path for photo in table)
    ):
        options.append("levels by type")  # earlier versions scaled pixels by the values of each image
    if dataset.max_pixels != MAX_PIXELS:
        options.append(["max_pixels", dataset.max_pixels])
    if dataset.max_bytes != MAX_BYTES:
        options.append(["max_bytes", dataset.max_bytes])
    return fingerprints.digest(table, dataset.column, dataclasses.asdict(recipe), *options)


def _with_sizes(dataset: Dataset) -> ImageTable:
    """Return the images with the sizes of those files that the reader did not look up."""
    table = dataset.table
    unknown = np.flatnonzero(table.sizes == UNKNOWN_SIZE).tolist()
    if not unknown:
        return table
    sizes, known = table.sizes.copy(), dict[Path, int]()
    for i in unknown:
        path = dataset.locate(table[i])
        if path not in known:
            known[path] = file_size(path)
        sizes[i] = known[path]
    return table.with_sizes(sizes)


def _with_labels(dataset: Dataset, path: Path) -> Dataset:
    """Return the dataset with labels from a file: JSON {path: label}, or the first two columns of a CSV or TSV."""
    if not path.is_file():
        raise AtlasError(f"data.labels={path}: there is no such file.")
    try:
        text = decode_text(path.read_bytes(), f"data.labels={path}")
        if path.suffix == ".json":
            labels = {str(k): str(v) for k, v in json.loads(text).items()}
        else:
            separator = "\t" if path.suffix in (".tsv", ".tab") else ","
            table = pd.read_csv(
                io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False, usecols=[0, 1]
            )
            labels = dict(zip(table[0], table[1], strict=True))
    except (ValueError, AttributeError, OSError) as error:
        raise AtlasError(
            f"data.labels={path} can't be read ({first_line(error)}): use rows of path,label or a JSON object."
        ) from error
    if not any(photo.source_path in labels for photo in dataset.images):
        raise AtlasError(
            f"data.labels={path} contains no path of a dataset image: its paths must be relative to data.root, "
            f"such as {dataset.images[0].source_path!r}."
        )
    labeled = dataset.table.with_labels(labels.get(photo.source_path, "") for photo in dataset.images)
    return dataclasses.replace(dataset, images=labeled)
