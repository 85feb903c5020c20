"""Files named in a configuration (vectors, images, spectra), read before any work starts.

Workers may run on other machines, so a file is sent as its content. Digests depend on the content, never on the path.
"""

import codecs
import dataclasses
import hashlib
import importlib.resources
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic_core import CoreSchema, core_schema

from pipeline.core.errors import AtlasError, first_line

T = TypeVar("T")

# The start of a URL, as a regular expression.
URL_START = r"[A-Za-z][A-Za-z0-9+.-]*://"

# The path that stands for a file of the package.
PACKAGED = "default"


def decode_text(content: bytes, where: str) -> str:
    """Decode a user's text file as UTF-8, or as UTF-16 if it starts with a UTF-16 byte-order mark.

    Args:
        content: The bytes of the file. A byte-order mark is removed.
        where: Name of the setting and of the file, for the error message.

    Raises:
        AtlasError: If the file has another encoding.
    """
    try:
        return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise AtlasError(
            f"{where} is not UTF-8 text: line {line} holds the byte 0x{byte:02x}. Save it as UTF-8, in an editor or "
            "with iconv -f latin1 -t utf-8."
        ) from None


# A file of settings is refused if it is longer, or if its aliases stand for more values than this.
MAX_YAML_BYTES, MAX_YAML_VALUES = 8_000_000, 1_000_000


def load_yaml(text: str, where: str) -> Any:
    """Return the content of YAML text as plain data.

    Aliases let a kilobyte stand for more values than memory holds, so that their number is limited.

    Args:
        text: The text.
        where: File or setting, for the error message.

    Raises:
        AtlasError: If it is not valid, or too large.
    """
    if len(text) > MAX_YAML_BYTES:
        raise AtlasError(f"{where} is too large: {len(text):,} characters, {MAX_YAML_BYTES:,} at most.")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AtlasError(f"{where} is not valid YAML: {first_line(error)}") from None
    pending, values = [tree], 0
    while pending:
        item = pending.pop()
        values += 1
        if values + len(pending) > MAX_YAML_VALUES:
            raise AtlasError(f"{where} stands for more than {MAX_YAML_VALUES:,} values, by its aliases.")
        if isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
    return tree


def stored_settings(config: str) -> Mapping[str, Any]:
    """Return the settings of a stored configuration (YAML); empty if it is not a valid mapping."""
    try:
        tree = load_yaml(config, "provenance/config")
    except AtlasError:
        return {}
    return tree if isinstance(tree, Mapping) else {}


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A file that a setting names.

    Attributes:
        path: Its path; `default` stands for a file of the package.
        content: Its bytes; None before it is read.
    """

    path: str
    content: bytes | None = None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic: configurations name the file by its path."""
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())

    def canonical(self) -> str:
        """Return the sha256 of the content, or of the path if the file is not read yet."""
        return hashlib.sha256(self.path.encode() if self.content is None else self.content).hexdigest()

    def read(self, where: str, packaged: str | None = None) -> "ConfigFile":
        """Return this file with its content.

        Args:
            where: The setting, for the error message.
            packaged: File of the package that the path `default` stands for, relative to `pipeline/`.

        Raises:
            AtlasError: If the file cannot be read.
        """
        try:
            if self.path == PACKAGED and packaged is not None:
                content = importlib.resources.files("pipeline").joinpath(packaged).read_bytes()
            else:
                content = Path(self.path).read_bytes()
        except OSError as error:
            raise AtlasError(f"{where}={self.path!r} can't be read: {error.strerror or error}.") from None
        return dataclasses.replace(self, content=content)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of an .npz file by name, or that of an .npy file under the name `array`.

        Pickled objects are never loaded.

        Raises:
            AtlasError: If the file is neither, or contains Python objects.
        """
        assert self.content is not None, f"{self.path} was not read"
        try:
            archive = np.load(io.BytesIO(self.content), allow_pickle=False)
            if isinstance(archive, np.ndarray):
                return {"array": archive}
            with archive:
                return {name: archive[name] for name in archive.files}
        except (ValueError, OSError, EOFError) as error:
            raise AtlasError(f"{self.path} is not an .npy or .npz of plain numbers: {first_line(error)}") from None


def load_config_files(config: T, where: str, packaged: str | None = None) -> T:
    """Return a configuration with every `ConfigFile` in it read, at any depth.

    A dataclass may have a method `uses_file(field name)` that is False for a file that it does not use. Such a file
    is not read, and no result depends on it. An attribute `packaged` of a dataclass replaces the argument of that name.

    Args:
        config: A frozen dataclass, a tuple, a `ConfigFile` or any other value.
        where: The setting, for error messages.
        packaged: File of the package that the path `default` stands for, relative to `pipeline/`.

    Raises:
        AtlasError: If a file cannot be read.
    """
    if isinstance(config, ConfigFile):
        return config if config.content is not None else config.read(where, packaged)  # type: ignore[return-value]
    if isinstance(config, tuple):
        return tuple(load_config_files(v, f"{where}[{i}]", packaged) for i, v in enumerate(config))  # type: ignore[return-value]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed: dict[str, Any] = {}
    packaged = getattr(config, "packaged", packaged)
    uses_file = getattr(config, "uses_file", lambda _: True)
    for field in dataclasses.fields(config):
        if not uses_file(field.name):
            continue
        old = getattr(config, field.name)
        new = load_config_files(old, f"{where}.{field.name}", packaged)
        if new is not old:
            changed[field.name] = new
    return dataclasses.replace(config, **changed) if changed else config


def is_url(path: str) -> bool:
    """Return whether a path is a URL (scheme://…) and not a path of this machine."""
    return re.match(URL_START, path) is not None
