"""Records of listed images, and the search for files that all readers share."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.core.errors import AtlasError
from pipeline.data import image_formats
from pipeline.data.config import DataConfig
from pipeline.data.readers.folder_scan import scan, suffix_of
from pipeline.data.storage_errors import is_storage_error

log = logging.getLogger(__name__)

# Why an image can't be read if there is no file.
MISSING = "missing, or a broken link"

# At most so many kinds of skipped files are listed in a message.
MAX_LISTED_KINDS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class DatasetImage:
    """One image of a dataset.

    Attributes:
        path: Identity of the image. It does not depend on where the dataset is stored.
        label: Label, or "" if the image has none.
        source: Number of the source image. Images with the same source (crops of one image) never appear together
            in one list of dataset examples.
        box: Region of the source image, (left, top, right, bottom) in its pixels; None for the whole image.
        file: File that contains the image, relative to the root; "" if `picture` is the file.
        position: Position in `file`: (offset, bytes) in an archive, (row group, row) in a table, None for a plain file.
        size: Bytes of the file that contains the image; −1 if it is missing, None if it was not looked up.
    """

    path: str
    label: str
    source: int
    box: tuple[int, int, int, int] | None = None
    file: str = ""
    position: tuple[int, int] | None = None
    size: int | None = None

    @property
    def source_path(self) -> str:
        """Identity of the whole source image, of which this image may be a crop."""
        return self.path if self.box is None else self.path.rpartition("#")[0]


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a reader returns.

    Attributes:
        photos: All images, in an order that is the same on every machine.
        roots: Absolute folders by the first part of a path; "" for all other paths.
        column: Image column of a table; "" for other sources.
        unreadable: Why images can't be read, by source path, as far as the listing knows.
    """

    photos: Sequence[DatasetImage]
    roots: dict[str, str]
    column: str = ""
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files below a folder.

    Attributes:
        root: The folder.
        sizes: Bytes of each file by relative POSIX path, sorted as text: the same order on every file system.
        skipped: Number of skipped files by suffix.
    """

    root: Path
    sizes: Mapping[str, int]
    skipped: Counter[str]


def root_of(config: DataConfig) -> Path:
    """Return `data.root` as an absolute path.

    Raises:
        AtlasError: If it is not set.
    """
    if not config.root:
        raise AtlasError(f"data={config.source} needs data.root=<folder>.")
    root = Path(config.root).expanduser().absolute()
    if not root.exists():
        raise AtlasError(f"data.root={config.root}: there is no such folder.")
    return root


def file_test(suffixes: frozenset[str], detect_by_content: bool = False) -> Callable[[str], bool]:
    """Return a function that says whether a file with a path has one of the given suffixes.

    Args:
        suffixes: Suffixes in lower case, with the dot.
        detect_by_content: Also accept files without a suffix whose first bytes are those of an image.
    """

    def is_listed(path: str) -> bool:
        suffix = suffix_of(path.rpartition("/")[2])
        return suffix in suffixes or (detect_by_content and not suffix and _is_image_file(Path(path)))

    return is_listed


def list_files(config: DataConfig, suffixes: frozenset[str]) -> Files:
    """List the files below `data.root` that have one of the given suffixes.

    Raises:
        AtlasError: If `data.root` is not set or does not exist, or if a folder below it can't be listed.
    """
    root, is_listed = root_of(config), file_test(suffixes)
    if root.is_file() and is_listed(str(root)):
        return Files(root.parent, {root.name: root.stat().st_size}, Counter())
    if not root.is_dir():
        raise AtlasError(f"data.root={config.root}: there is no such folder.")
    sizes: dict[str, int] = {}
    skipped: Counter[str] = Counter()
    for folder in scan(root, is_listed, {}):
        sizes |= {folder.prefix + name: size for name, size in zip(folder.names, folder.sizes, strict=True)}
        skipped.update(folder.skipped)
    return Files(root, dict(sorted(sizes.items())), skipped)


def _is_image_file(path: Path) -> bool:
    """Return whether the first bytes of a file are those of an image that this machine can decode."""
    try:
        if not path.is_file():  # opening a named pipe would block until another process writes to it
            return False
        with path.open("rb") as handle:
            return starts_like_image(handle.read(image_formats.HEAD))
    except OSError as error:
        if is_storage_error(error):
            raise AtlasError(f"{path} can't be read, so that an image might be missing: {error}") from error
        return False


def starts_like_image(head: bytes) -> bool:
    """Return whether a file with these first bytes is an image that this machine can decode."""
    image_format = image_formats.identify(head)
    return image_format is not None and image_formats.can_decode(image_format)


def report_skipped(config: DataConfig, any_image: bool, skipped: Counter[str], suffixes: frozenset[str]) -> None:
    """Log how many files were skipped, by suffix.

    Args:
        config: Configuration with the source and the root.
        any_image: Whether the source has at least one image.
        skipped: Number of skipped files by suffix.
        suffixes: Suffixes that were searched for.

    Raises:
        AtlasError: If the source has no image.
    """
    total = skipped.total()
    kinds = [f"{kind} {count}" for kind, count in sorted(skipped.items(), key=lambda item: (-item[1], item[0]))]
    counts = ", ".join(kinds[:MAX_LISTED_KINDS])
    if len(kinds) > MAX_LISTED_KINDS:
        counts += f", and {len(kinds) - MAX_LISTED_KINDS} more kinds"
    hints = image_formats.install_hints(skipped)
    if not any_image:
        contents = f"{total} files of other kinds: {counts}" if total else "no file"
        fixes = "".join(f" {hint[0].upper()}{hint[1:]}." for hint in hints)
        raise AtlasError(
            f"data={config.source}: no image at all. data.root={config.root} holds {contents}. "
            f"Suffixes read: {', '.join(sorted(suffixes))}.{fixes}"
        )
    if total:
        files = "1 file of another kind" if total == 1 else f"{total:,} files of other kinds"
        log.info("%s skipped: %s", files, "; ".join([counts, *hints]))
