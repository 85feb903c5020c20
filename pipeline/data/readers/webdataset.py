"""Tar shards in the WebDataset format. The headers are read once; images are read later from their offsets."""

import dataclasses
import io
import itertools
import logging
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from pipeline.core.config_files import is_url
from pipeline.core.errors import AtlasError
from pipeline.data import image_formats, remote
from pipeline.data.config import DataConfig
from pipeline.data.image_table import file_size
from pipeline.data.readers.base import DatasetImage, Listing, list_files, report_skipped, starts_like_image
from pipeline.data.readers.folder_scan import NO_SUFFIX, suffix_of
from pipeline.data.storage_errors import is_storage_error

log = logging.getLogger(__name__)

# A text with braces stands for at most so many archives.
MAX_ARCHIVES = 1_000_000

# A `.cls` member of more bytes than this is not read as a label.
MAX_LABEL_BYTES = 4096


@dataclasses.dataclass
class _Shard:
    """Contents of one tar file: images as (name, offset, bytes), and labels by folder and key."""

    images: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def list_images(config: DataConfig) -> Listing:
    """List the images of all `.tar` files below `data.root`, or of those that a text with braces names.

    The member `<key>.cls` holds the label of the image `<key>.<suffix>`; without it, the label is the top-level
    folder inside the archive.

    Raises:
        AtlasError: If there is no `.tar` file, or no image in any.
    """
    root, files, skipped = _archives(config)
    if not files:
        raise AtlasError(f"data.root={config.root}: no .tar there (compressed archives must be unpacked to .tar).")
    photos: list[DatasetImage] = []
    for file, length in files.items():
        shard = _Shard()
        try:
            with _opened(root, file) as handle, tarfile.open(fileobj=handle, mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        _add_member(shard, archive, member, skipped)
        except Exception as error:
            if not isinstance(error, tarfile.TarError | OSError) and not is_url(root):
                raise
            if is_storage_error(error) or is_url(root):
                place = f"{root}/{file}"
                raise AtlasError(f"{place} can't be listed, so that images would be missing: {error}") from error
            log.warning("%s is damaged (%s): using the %d images before the damage", file, error, len(shard.images))
        for name, offset, size in shard.images:
            if offset + size > length:
                log.warning("%s ends before %s does, which is left out", file, name)
                continue
            folder, _, last = name.rpartition("/")
            label = shard.labels.get(f"{folder}/{last.partition('.')[0]}", folder.partition("/")[0])
            image = DatasetImage(f"{file}#{name}", label, len(photos), None, file, (offset, size), length)
            photos.append(image)
    report_skipped(config, bool(photos), skipped, image_formats.suffixes())
    return Listing(tuple(photos), {"": root})


def _archives(config: DataConfig) -> tuple[str, Mapping[str, int], Counter[str]]:
    """Return the folder of the archives, their sizes by relative path, and how many other files are there."""
    text = config.root or ""
    names = expand(text)
    if len(names) == 1 and not is_url(text):
        listed = list_files(config, frozenset({".tar"}))
        return str(listed.root), listed.sizes, listed.skipped
    if len(names) == 1 and not text.lower().endswith(".tar"):
        sizes, others = remote.sizes_below(text, lambda name: name.lower().endswith(".tar"))
        return text.rstrip("/"), sizes, Counter(suffix_of(name.rpartition("/")[2]) or NO_SUFFIX for name in others)
    if not is_url(text):
        names = [str(Path(name).expanduser().absolute()) for name in names]
    parts = zip(*(name.split("/")[:-1] for name in names), strict=False)
    folder = "/".join(same[0] for same in itertools.takewhile(lambda part: len(set(part)) == 1, parts))
    return folder, {name.removeprefix(f"{folder}/"): _size(name) for name in names}, Counter()


def _size(name: str) -> int:
    if is_url(name):
        return remote.size(name)
    size = file_size(name)
    if size < 0:
        raise AtlasError(f"data.root: there is no file {name}.")
    return size


def expand(text: str) -> list[str]:
    """Return the names that a text with braces stands for, as in a shell: `{000..012}` and `{train,val}`.

    Raises:
        AtlasError: If they are more than a million.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if found is None:
        return [text]
    if found[3] is not None:
        choices = found[3].split(",")
    else:
        first, last, width = int(found[1]), int(found[2]), len(found[1])
        if abs(last - first) >= MAX_ARCHIVES:
            raise AtlasError(f"data.root={text} stands for more than {MAX_ARCHIVES:,} files.")
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    ends = expand(text[found.end() :])
    if len(choices) * len(ends) > MAX_ARCHIVES:
        raise AtlasError(f"data.root={text} stands for more than {MAX_ARCHIVES:,} files.")
    return [text[: found.start()] + choice + end for choice in choices for end in ends]


def _opened(root: str, file: str) -> IO[bytes]:
    """Open an archive, on this machine or at a URL."""
    return remote.open_file(remote.join(root, file)) if is_url(root) else Path(root, file).open("rb")


def _add_member(shard: _Shard, archive: tarfile.TarFile, member: tarfile.TarInfo, skipped: Counter[str]) -> None:
    """Add a member to the images or labels of a shard, or count it as skipped."""
    folder, _, name = member.name.rpartition("/")
    key, _, extension = name.partition(".")
    suffix = Path(name).suffix.lower()
    if extension == "cls" and member.size < MAX_LABEL_BYTES:
        content = archive.extractfile(member)
        shard.labels[f"{folder}/{key}"] = content.read().decode("utf-8", "replace").strip() if content else ""
    elif suffix in image_formats.suffixes() or (not suffix and _member_is_image(archive, member)):
        shard.images.append((member.name, member.offset_data, member.size))
    else:
        skipped[suffix or NO_SUFFIX] += 1


def _member_is_image(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    content = archive.extractfile(member)
    return content is not None and starts_like_image(content.read(image_formats.HEAD))


def read_member(path: Path, offset: int, size: int) -> io.BytesIO:
    """Read the bytes of one member from an uncompressed archive."""
    with path.open("rb") as handle:
        handle.seek(offset)
        return io.BytesIO(handle.read(size))
