"""Folders in an object store, such as s3://bucket/runs, through fsspec: listing, transfer of files, retries.

An object appears whole or not at all. Object stores promise this for one upload; for file systems with a protocol of
their own (sftp://, file://) a file is uploaded under a temporary name and moved.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import logging
import mimetypes
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.core.atomic_io import atomic_path
from pipeline.core.config_files import is_url
from pipeline.core.errors import AtlasError, TryAgainError, first_line
from pipeline.core.machine import user_cache
from pipeline.store.shards import safe_name

log = logging.getLogger(__name__)

T = TypeVar("T")

# Stores in which an interrupted upload leaves no object, with the name of the argument for the type of the content.
OBJECT_STORES = {"s3": "ContentType", "s3a": "ContentType", "gs": "content_type", "gcs": "content_type"}

# Seconds before each repetition of a request that failed.
WAITS = (0.5, 2.0, 5.0)

# Names of exceptions that no repetition helps against: credentials are missing or wrong.
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")

# Answers to a conditional write if there is an object: 412, or 409 while another conditional request is in progress.
REFUSED = re.compile(r"PreconditionFailed|pre-?conditions? .*(hold|met)|ConditionalRequest", re.IGNORECASE)

# Types that some systems do not know, or know otherwise.
TYPES = {".js": "text/javascript", ".webp": "image/webp", ".avif": "image/avif", ".json": "application/json"}


def local_root(root: str, scratch: str | None) -> Path:
    """Return the folder of all runs on this machine: `root`, or the working copy of a root that is a URL.

    Args:
        root: Folder of all runs.
        scratch: Folder for working copies; None for one in the cache of this user.

    Raises:
        AtlasError: If the URL is wrong, or this user has no cache.
    """
    if not is_url(root):
        return Path(root)
    try:
        folder = Path(scratch).expanduser() if scratch is not None else user_cache() / "runs"
    except (FileNotFoundError, RuntimeError) as error:
        raise AtlasError(f"{root} needs a folder for a working copy: run.scratch=FOLDER ({error}).") from error
    return folder.joinpath(*map(safe_name, parts_of(root)))


def split_url(url: str) -> tuple[str, str]:
    """Return the parent and the last part of a URL without a slash at its end."""
    parent, _, name = url.rstrip("/").rpartition("/")
    return parent, name


def parts_of(url: str) -> tuple[str, ...]:
    """Return the scheme and the parts of the path of a URL.

    Raises:
        AtlasError: If it contains a password, a query or parts that lead elsewhere.
    """
    scheme, _, rest = url.partition("://")
    parts = tuple(part for part in rest.split("/") if part)
    if "@" in (parts or ("",))[0] and ":" in parts[0].partition("@")[0]:
        raise AtlasError("A URL must not contain a password: credentials belong into the environment of the store.")
    if not parts or {".", ".."} & set(parts) or "::" in url:
        raise AtlasError(
            f"{url} is no folder in an object store: write SCHEME://BUCKET/FOLDER, as in s3://bucket/runs."
        )
    return (scheme.lower(), *parts)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object.

    Attributes:
        size: Number of bytes.
        version: Digest of what the store says about it; another one after every upload.
    """

    size: int
    version: str


class RemoteFolder:
    """A folder in an object store.

    Failed requests are repeated three times.

    Args:
        url: SCHEME://BUCKET/FOLDER.

    Raises:
        AtlasError: If the package for the scheme is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = parts_of(url)[0]
        self.files, self.path = _file_system(self.url, self.scheme)

    def listing(self, part: str = "") -> dict[str, Entry]:
        """Return all objects below this folder, or below its subfolder `part`, by path relative to this folder."""

        def find() -> Mapping[str, Mapping[str, Any]]:
            self.files.invalidate_cache()
            try:
                return self.files.find(f"{self.path}/{part}".rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}

        entries = self._try("listed", find)
        start = len(self.path.strip("/")) + 1
        named = {path.strip("/")[start:]: info for path, info in entries.items() if info.get("type") != "directory"}
        # The key of an object may be any text: one that leads out of a folder is none of a run.
        return {
            name: _entry(info)
            for name, info in named.items()
            if name and not {"", ".", ".."} & set(name.split("/")) and "\\" not in name and "\0" not in name
        }

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file, which appears when it is complete."""

        def get() -> None:
            with atomic_path(path) as temporary:
                self.files.get_file(self._place(name), str(temporary))

        self._try(f"read ({name})", get)

    def upload(self, path: Path, name: str) -> None:
        """Make an object of a file; it appears when it is complete."""

        def put() -> None:
            place = self._place(name)
            if self.scheme in OBJECT_STORES:
                self.files.put_file(str(path), place, **{OBJECT_STORES[self.scheme]: _type(path)})
                return
            temporary = f"{place}.tmp-{secrets.token_hex(4)}"
            self.files.makedirs(place.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(path), temporary)
            self.files.mv(temporary, place)

        self._try(f"written ({name})", put)

    def write(self, name: str, data: bytes, new: bool = False) -> bool:
        """Write a small object; return False if it exists and `new` is set."""

        def pipe() -> bool:
            try:
                if self.scheme not in OBJECT_STORES:
                    self.files.makedirs(self.path, exist_ok=True)
                self.files.pipe_file(self._place(name), data, mode="create" if new else "overwrite")
            except FileExistsError:
                return False
            except OSError as error:
                if new and REFUSED.search(repr(error)):
                    return False
                raise
            return True

        return self._try(f"written ({name})", pipe)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None if there is none."""

        def cat() -> bytes | None:
            try:
                self.files.invalidate_cache()
                return self.files.cat_file(self._place(name))
            except FileNotFoundError:
                return None

        return self._try(f"read ({name})", cat)

    def remove(self, name: str) -> None:
        """Remove an object, if there is one."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(self._place(name))

        self._try(f"removed ({name})", delete)

    def modified(self, name: str) -> datetime.datetime | None:
        """Return when an object was written, by the clock of the store; None if there is none or it is not known."""

        def ask() -> datetime.datetime | None:
            try:
                self.files.invalidate_cache()
                written = self.files.modified(self._place(name))
                return written if written.tzinfo is not None else written.replace(tzinfo=datetime.UTC)
            except (FileNotFoundError, NotImplementedError):
                return None

        return self._try(f"read ({name})", ask)

    def _place(self, name: str) -> str:
        return f"{self.path}/{name}"

    def _try(self, what: str, request: Callable[[], T]) -> T:
        """Return the result of a request, which is repeated if it fails.

        Raises:
            AtlasError: If there is no such bucket or object, or credentials are missing or do not suffice.
            TryAgainError: If it failed every time.
        """
        for wait in (*WAITS, None):
            try:
                return request()
            except AtlasError:
                raise
            except Exception as error:  # every file system has exceptions of its own
                if isinstance(error, PermissionError | FileNotFoundError) or type(error).__name__ in CREDENTIALS:
                    raise AtlasError(
                        f"{self.url} could not be {what}: {first_line(error)}. Check the bucket, the credentials and "
                        "the permissions."
                    ) from error
                if wait is None:
                    raise TryAgainError(
                        f"{self.url} could not be {what}: {type(error).__name__}: {first_line(error)}. Finished work "
                        "is kept: run the same command again when the store can be reached."
                    ) from error
                time.sleep(wait)
        raise AssertionError


def _file_system(url: str, scheme: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it.

    Raises:
        AtlasError: If its package is not installed, or the scheme is unknown.
    """
    try:
        import fsspec
    except ImportError as error:
        raise AtlasError(f"{url} needs fsspec: pip install 'neuron-atlas[remote]'.") from error
    try:
        # A listing that was kept would hide what other machines have written.
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = "pip install 'neuron-atlas[remote]'" if scheme in ("s3", "s3a") else first_line(error)
        raise AtlasError(f"{url} needs another package: {package}.") from error
    except ValueError as error:
        raise AtlasError(f"{url} can't be opened: {first_line(error)}.") from error
    return files, str(path).rstrip("/")


def _entry(info: Mapping[str, Any]) -> Entry:
    keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated", "last_modified", "mtime", "created")
    version = repr([str(info[key]) for key in keys if info.get(key) is not None])
    return Entry(int(info.get("size") or 0), hashlib.sha256(version.encode()).hexdigest()[:16])


def _type(path: Path) -> str:
    """Return the media type of a file, for web servers that show what the store holds."""
    return TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
