"""Files that a configuration names (vectors, pictures, spectra): found and read before any work starts.

A worker may stand on another machine, so a file travels as its content, and what a result depends on is the
content, never the path.
"""

import codecs
import dataclasses
import hashlib
import importlib.resources
import io
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.core.errors import AtlasError, first_line

T = TypeVar("T")

PACKAGED = "default"


def decoded(content: bytes, where: str) -> str:
    """The text of a user's file: UTF-8, or UTF-16 with a byte-order mark; such a mark is no part of the text.

    `where` is the setting and file that an error names.
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


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """A file by its path; `content` once it was read. The path `default` names what the package brings along."""

    path: str
    content: bytes | None = None

    def canonical(self) -> str:
        """What of it changes a result: the digest of its content (of its name, before it is read)."""
        return hashlib.sha256(self.path.encode() if self.content is None else self.content).hexdigest()

    def read(self, where: str, packaged: str | None = None) -> "ConfigFile":
        """The same with its content; `where` is the setting that an error names."""
        try:
            if self.path == PACKAGED and packaged is not None:
                content = importlib.resources.files("pipeline").joinpath(packaged).read_bytes()
            else:
                content = Path(self.path).read_bytes()
        except OSError as error:
            raise AtlasError(f"{where}={self.path!r} can't be read: {error.strerror or error}.") from None
        return dataclasses.replace(self, content=content)

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays of an .npz, or of an .npy under the name `array`; nothing pickled is ever loaded."""
        assert self.content is not None, f"{self.path} was not read"
        try:
            loaded = np.load(io.BytesIO(self.content), allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"array": loaded}
            with loaded:
                return {name: loaded[name] for name in loaded.files}
        except (ValueError, OSError, EOFError) as error:
            raise AtlasError(f"{self.path} is not an .npy or .npz of plain numbers: {first_line(error)}") from None


def loaded(config: T, where: str, packaged: str | None = None) -> T:
    """A frozen dataclass with every `ConfigFile` in it read, however deep; raises `AtlasError` for one that is missing.

    A dataclass may say in `wants(field name)` that it does without one of its files: it is left alone then, and
    no result depends on it. `packaged` is what the path `default` stands for.
    """
    if isinstance(config, ConfigFile):
        return config if config.content is not None else config.read(where, packaged)  # type: ignore[return-value]
    if isinstance(config, tuple):
        return tuple(loaded(v, f"{where}[{i}]", packaged) for i, v in enumerate(config))  # type: ignore[return-value]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    changed: dict[str, Any] = {}
    own = getattr(config, "packaged", packaged)
    wants = getattr(config, "wants", lambda _: True)
    for field in dataclasses.fields(config):
        if not wants(field.name):
            continue
        old = getattr(config, field.name)
        new = loaded(old, f"{where}.{field.name}", own)
        if new is not old:
            changed[field.name] = new
    return dataclasses.replace(config, **changed) if changed else config
