"""Datasets at URLs, read through fsspec: `https://`, `s3://`, `memory://` and whatever else is installed."""

import functools
from collections.abc import Callable
from typing import IO, Any

from pipeline.core.errors import AtlasError, first_line
from pipeline.data.storage_errors import StorageError

# So many bytes are read at once where the headers of an archive are listed.
BLOCK = 2**20


@functools.lru_cache(maxsize=64)
def _filesystem(scheme: str) -> Any:
    """Return the file system of the URLs that begin with `scheme`.

    Raises:
        AtlasError: If a package is not installed, or the scheme is unknown.
    """
    try:
        import fsspec

        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise AtlasError(
            f"data.root={scheme}://… needs more packages: pip install 'neuron-atlas[remote]' ({first_line(error)})."
        ) from error
    except ValueError as error:
        raise AtlasError(f"data.root={scheme}://…: {first_line(error)}.") from error


def _split(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and its path there."""
    files = _filesystem(url.partition("://")[0].lower())
    return files, files._strip_protocol(url)


def join(root: str, name: str) -> str:
    """Return the URL of a file below another URL."""
    return f"{root.rstrip('/')}/{name}" if name else root


def sizes_below(url: str, is_listed: Callable[[str], bool]) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of the listed files below a URL by relative path, sorted, and the names of all other files.

    Raises:
        AtlasError: If the URL can't be listed.
    """
    files, base = _split(url)
    try:
        found: dict[str, dict[str, Any]] = files.find(base, detail=True)
    except Exception as error:
        raise AtlasError(f"data.root={url} can't be listed: {type(error).__name__}: {first_line(error)}.") from error
    sizes, others = dict[str, int](), list[str]()
    for path, details in found.items():
        name = path.removeprefix(base).lstrip("/")
        if name and is_listed(name):
            sizes[name] = size_of(details, url)
        elif name:
            others.append(name)
    return dict(sorted(sizes.items())), others


def size(url: str) -> int:
    """Return the bytes of a file.

    Raises:
        AtlasError: If there is no such file, or the server does not tell its size.
    """
    files, path = _split(url)
    try:
        return size_of(files.info(path), url)
    except AtlasError:
        raise
    except Exception as error:
        raise AtlasError(f"{url} can't be opened: {type(error).__name__}: {first_line(error)}.") from error


def size_of(details: dict[str, Any], url: str) -> int:
    """Return the bytes of a file by what a file system says about it."""
    if details.get("size") is None:
        raise AtlasError(f"{url}: the server does not tell the size of the file, so that no part of it can be read.")
    return int(details["size"])


def open_file(url: str) -> IO[bytes]:
    """Open a file of which any part can be read.

    Raises:
        AtlasError: If it can't be opened.
    """
    files, path = _split(url)
    try:
        return files.open(path, "rb", block_size=BLOCK)
    except Exception as error:
        raise AtlasError(f"{url} can't be opened: {type(error).__name__}: {first_line(error)}.") from error


def read(url: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read a file, or a part of it.

    Raises:
        StorageError: If it can't be read, or only in part.
    """
    files, path = _split(url)
    try:
        data = files.cat_file(path) if length is None else files.cat_file(path, start=offset, end=offset + length)
    except Exception as error:  # each file system has errors of its own, and none is a property of the image
        raise StorageError(f"{url}: {type(error).__name__}: {first_line(error)}") from error
    if length is not None and len(data) != length:
        raise StorageError(f"{url}: {len(data)} of {length} bytes; the server must support requests of ranges")
    return data
