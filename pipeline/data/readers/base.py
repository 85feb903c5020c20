"""Records of listed images, and the search for files that all readers share."""

import dataclasses
import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.core.errors import AtlasError
from pipeline.data import image_formats
from pipeline.data.config import DataConfig
from pipeline.data.storage_errors import is_storage_error

log = logging.getLogger(__name__)

# Why an image can't be read if there is no file.
MISSING = "missing, or a broken link"

# Under this name files without a suffix are counted.
NO_SUFFIX = "(no suffix)"

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
    """

    path: str
    label: str
    source: int
    box: tuple[int, int, int, int] | None = None
    file: str = ""
    position: tuple[int, int] | None = None

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

    photos: tuple[DatasetImage, ...]
    roots: dict[str, str]
    column: str = ""
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files below a folder.

    Attributes:
        root: The folder.
        paths: Relative POSIX paths, sorted as text: the same order on every file system.
        skipped: Number of skipped files by suffix.
        broken: Paths that are links to nothing.
    """

    root: Path
    paths: list[str]
    skipped: Counter[str]
    broken: frozenset[str] = frozenset()


def list_files(config: DataConfig, suffixes: frozenset[str], detect_by_content: bool = False) -> Files:
    """List the files below `data.root` that have one of the given suffixes.

    Args:
        config: Configuration with the root.
        suffixes: Suffixes in lower case, with the dot.
        detect_by_content: Also list files without a suffix whose first bytes are those of an image.

    Raises:
        AtlasError: If `data.root` is not set or does not exist, or if a folder below it can't be listed.
    """
    if not config.root:
        raise AtlasError(f"data={config.source} needs data.root=<folder>.")

    def is_listed(path: Path) -> bool:
        suffix = path.suffix.lower()
        return suffix in suffixes or (detect_by_content and not suffix and _is_image_file(path))

    root = Path(config.root).expanduser().absolute()
    if root.is_file() and is_listed(root):
        return Files(root.parent, [root.name], Counter())
    if not root.is_dir():
        raise AtlasError(f"data.root={config.root}: there is no such folder.")
    files: list[Path] = []
    links: list[Path] = []
    skipped: Counter[str] = Counter()
    for path, is_link in _files_below(root):
        if is_listed(path):
            files.append(path.relative_to(root))
            if is_link:
                links.append(path)
        else:
            skipped[path.suffix.lower() or NO_SUFFIX] += 1
    broken = frozenset(path.relative_to(root).as_posix() for path in links if _is_broken(path))
    return Files(root, sorted(path.as_posix() for path in files), skipped, broken)


def _files_below(root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield all files below a folder, also those in linked folders, and whether they are symbolic links.

    Raises:
        AtlasError: If a folder can't be listed: a part of the dataset would be missing.
    """
    pending, visited = [str(root)], set[str]()
    while pending:
        folder = pending.pop()
        # A symbolic link may point to a parent folder: visit each real folder once.
        real = os.path.realpath(folder)
        if real in visited:
            continue
        visited.add(real)
        subfolders = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        subfolders.append(entry.path)
                    else:
                        yield Path(entry.path), entry.is_symlink()
        except PermissionError as error:
            log.warning("%s is left out: %s", folder, error.strerror)
        except OSError as error:
            raise AtlasError(f"{folder} can't be listed, so that images would be missing: {error}") from error
        pending += sorted(subfolders, reverse=True)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # for example a link that leads to itself
        if is_storage_error(error):
            raise
        return False


def _is_broken(link: Path) -> bool:
    """Return whether a link leads to nothing. Storage that fails says nothing about it."""
    try:
        link.stat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP
    return False


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
