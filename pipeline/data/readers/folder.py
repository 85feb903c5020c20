"""Folders of image files, in the layout of torchvision's `ImageFolder`."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.config_files import is_url
from pipeline.data import image_formats, listing_cache, remote
from pipeline.data.config import DataConfig
from pipeline.data.image_table import ImageTable, draw_hashes, text_array
from pipeline.data.listing_cache import CachedListing
from pipeline.data.readers.base import MISSING, DatasetImage, Listing, file_test, report_skipped, root_of
from pipeline.data.readers.folder_scan import NO_SUFFIX, Folder, scan, suffix_of


def list_images(config: DataConfig, suffixes: frozenset[str] | None = None) -> Listing:
    """List all image files below `data.root`; the label of an image is its top-level folder.

    Folders that are as a listing in the user's cache has them are not listed again, unless `data.relist`; see
    `pipeline.data.listing_cache`.

    Args:
        config: Configuration with the root.
        suffixes: Suffixes to list. None: those of all formats that this machine can decode, and files without a
            suffix whose content is an image.
    """
    listed_suffixes = image_formats.suffixes() if suffixes is None else suffixes
    detect_by_content = suffixes is None
    is_listed = file_test(listed_suffixes, detect_by_content)
    if is_url(config.root or ""):
        return _remote(config, is_listed, listed_suffixes)
    root = root_of(config)
    if root.is_file() and is_listed(str(root)):
        file = Folder("", None, names=(root.name,), sizes=(root.stat().st_size,))
        return Listing(ImageTable(_table([file], None)[0]), {"": str(root.parent)})
    key = listing_cache.key_of(root, sorted(listed_suffixes), detect_by_content)
    cached = None if config.relist else listing_cache.load(key)
    folders = scan(root, is_listed, {folder.path: folder for folder in cached.folders} if cached else {})
    if cached is not None and len(folders) == len(cached.folders) and all(folder.reused for folder in folders):
        images = cached.batch
    else:
        images, numbers = _table(folders, cached)
        if len(images) > listing_cache.MIN_IMAGES:
            listing_cache.save(key, images, numbers, folders)
    skipped = Counter[str]()
    for folder in folders:
        skipped.update(folder.skipped)
    report_skipped(config, bool(len(images)), skipped, listed_suffixes)
    broken = sorted(path for folder in folders for path in folder.broken)
    return Listing(ImageTable(images), {"": str(root)}, unreadable=dict.fromkeys(broken, MISSING))


def _remote(config: DataConfig, is_listed: Callable[[str], bool], suffixes: frozenset[str]) -> Listing:
    """List the files below a URL; files without a suffix are skipped, since each would have to be read."""
    root = (config.root or "").rstrip("/")
    sizes, others = remote.sizes_below(root, lambda name: bool(suffix_of(name.rpartition("/")[2])) and is_listed(name))
    skipped = Counter(suffix_of(name.rpartition("/")[2]) or NO_SUFFIX for name in others)
    report_skipped(config, bool(sizes), skipped, suffixes)
    images = (
        DatasetImage(name, name.partition("/")[0] if "/" in name else "", i, size=size)
        for i, (name, size) in enumerate(sizes.items())
    )
    return Listing(ImageTable.of(images), {"": root})


def _table(folders: Sequence[Folder], cached: CachedListing | None) -> tuple[pa.RecordBatch, np.ndarray]:
    """Return the files of folders in the order of their paths, and the number of the folder of each."""
    paths, sizes, hashes, numbers = _reused(folders, cached)
    for number, folder in enumerate(folders):
        if folder.reused or not folder.names:
            continue
        own = [folder.prefix + name for name in folder.names]
        paths.append(text_array(own))
        sizes.append(np.array(folder.sizes, np.int64))
        hashes.append(draw_hashes(own))
        numbers.append(np.full(len(own), number, np.int32))
    names = [folder.path.partition("/")[0] for folder in folders]
    labels = {name: i for i, name in enumerate(sorted(set(names)))}
    label_of_folder = np.array([labels[name] for name in names], np.int32)
    path = pa.concat_arrays([pa.array([], pa.large_binary()), *paths])
    # As text, by code points: the same order on every file system.
    order = pc.call_function("array_sort_indices", [path]).to_numpy()
    number = np.concatenate([np.zeros(0, np.int32), *numbers])[order]
    columns = {
        "path": path.take(pa.array(order)),
        "size": np.concatenate([np.zeros(0, np.int64), *sizes])[order],
        "hash": np.concatenate([np.zeros(0, np.uint64), *hashes])[order],
    }
    return ImageTable.of_columns(columns, label_of_folder[number], list(labels)).batch, number


def _reused(
    folders: Sequence[Folder], cached: CachedListing | None
) -> tuple[list[pa.Array], list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Return paths, sizes, hashes and new numbers of the folder, of the images in folders that have not changed."""
    reused = {folder.path: number for number, folder in enumerate(folders) if folder.reused}
    if cached is None or not reused:
        return [], [], [], []
    new_number = np.array([reused.get(folder.path, -1) for folder in cached.folders], np.int32)
    numbers = new_number[cached.batch.column("folder").to_numpy()]
    rows = np.flatnonzero(numbers >= 0)
    path = cached.batch.column("path").take(pa.array(rows))
    size, drawn = (cached.batch.column(name).to_numpy()[rows] for name in ("size", "hash"))
    return [path], [size], [drawn], [numbers[rows]]
