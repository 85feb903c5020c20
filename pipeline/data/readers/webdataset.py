"""Tar shards in the WebDataset format. The headers are read once; images are read later from their offsets."""

import dataclasses
import io
import logging
import tarfile
from collections import Counter
from pathlib import Path

from pipeline.core.errors import AtlasError
from pipeline.data import image_formats
from pipeline.data.config import DataConfig
from pipeline.data.readers.base import DatasetImage, Listing, list_files, report_skipped, starts_like_image
from pipeline.data.readers.folder_scan import NO_SUFFIX
from pipeline.data.storage_errors import is_storage_error

log = logging.getLogger(__name__)

# A `.cls` member of more bytes than this is not read as a label.
MAX_LABEL_BYTES = 4096


@dataclasses.dataclass
class _Shard:
    """Contents of one tar file: images as (name, offset, bytes), and labels by folder and key."""

    images: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    labels: dict[str, str] = dataclasses.field(default_factory=dict)


def list_images(config: DataConfig) -> Listing:
    """List the images of all `.tar` files below `data.root`.

    The member `<key>.cls` holds the label of the image `<key>.<suffix>`; without it, the label is the top-level
    folder inside the archive.

    Raises:
        AtlasError: If there is no `.tar` file, or no image in any.
    """
    listed = list_files(config, frozenset({".tar"}))
    root, files, skipped = listed.root, listed.sizes, listed.skipped
    if not files:
        raise AtlasError(f"data.root={config.root}: no .tar there (compressed archives must be unpacked to .tar).")
    photos: list[DatasetImage] = []
    for file, length in files.items():
        shard = _Shard()
        try:
            with tarfile.open(root / file, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        _add_member(shard, archive, member, skipped)
        except (tarfile.TarError, OSError) as error:
            if is_storage_error(error):
                raise AtlasError(f"{root / file} can't be listed, so that images would be missing: {error}") from error
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
    return Listing(tuple(photos), {"": str(root)})


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
