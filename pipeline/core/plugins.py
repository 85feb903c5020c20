"""Members of a registry from the user's own Python file or module, and from installed packages.

Wherever a setting names a member, such as `render.objective.name`, it may name a class as `my_file.py:Class` or
`my_package.module:Class`. The class must be a frozen dataclass derived from the base class of the group. Digests
contain the name without folders, and a digest of the code: the file and all files of the user that it imports.

Installed packages add members by an entry point of the group `neuron_atlas.members`. It names a module that registers
its classes when it is imported.
"""

import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core import user_code
from pipeline.core.errors import AtlasError, first_line, nearest_names

log = logging.getLogger(__name__)

ENTRY_POINTS = "neuron_atlas.members"

# Attributes of a loaded class: its name in digests, and the digest of its code. They travel with the class to workers.
NAME, SOURCE = "_atlas_name", "_atlas_source"

_allowed = contextvars.ContextVar("allowed", default=True)

# Modules of loaded members and of the user's files that they import.
_modules: set[str] = set()


def is_reference(name: str) -> bool:
    """Return whether a name of a member refers to the user's own code."""
    return ":" in name


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Refuse to load code within the block: the configuration of another run may come from anyone."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def load_object(reference: str, where: str) -> Any:
    """Return the object that "my_file.py:name" or "my_package.module:name" refers to.

    A relative path is relative to the working directory.

    Raises:
        AtlasError: If there is no such file or module, if it raises when it is imported, or if it lacks the name.
    """
    if not _allowed.get():
        raise AtlasError(
            f"{where}={reference} is code of the user, which is not loaded from the folder of another run."
        )
    place, _, name = reference.rpartition(":")
    module = _import_file(Path(place).expanduser(), where) if place.endswith(".py") else _import_module(place, where)
    found = getattr(module, name, None)
    if found is None:
        public = [key for key in vars(module) if not key.startswith("_")]
        raise AtlasError(f"{where}: {place} has no {name!r}. {nearest_names(name, public)}")
    return found


def load_member(reference: str, where: str, bases: Iterable[type]) -> type:
    """Return the class of a member that a reference names.

    Args:
        reference: "my_file.py:Class" or "my_package.module:Class".
        where: The setting, for messages.
        bases: The class must be derived from all of these.

    Raises:
        AtlasError: If it cannot be loaded, or is not a frozen dataclass derived from `bases`.
    """
    cls = load_object(reference, where)
    missing = [base for base in bases if not (isinstance(cls, type) and issubclass(cls, base))]
    if missing:
        base = missing[0]
        raise AtlasError(f"{where}: {reference} must be a class derived from {base.__module__}.{base.__name__}.")
    parameters = getattr(cls, "__dataclass_params__", None)
    if "__dataclass_params__" not in vars(cls) or parameters is None or not parameters.frozen:
        raise AtlasError(f"{where}: {reference} must be decorated with @dataclasses.dataclass(frozen=True).")
    if NAME not in vars(cls):
        place, _, name = reference.rpartition(":")
        setattr(cls, NAME, f"{Path(place).name if place.endswith('.py') else place}:{name}")
        setattr(cls, SOURCE, _source_digest(cls))
    return cls


def identity(cls: type) -> dict[str, str]:
    """Return name and source digest of a class that `load_member` returned; empty for other classes."""
    values = vars(cls)
    return {"name": values[NAME], "source of the class": values[SOURCE]} if NAME in values else {}


def modules() -> list[ModuleType]:
    """Return the modules of the user's code, which workers on other machines may not be able to import."""
    return [sys.modules[name] for name in sorted(_modules) if name in sys.modules]


@functools.cache
def load_entry_points() -> None:
    """Import the modules that installed packages name as entry points; each registers its members.

    Raises:
        AtlasError: If a module cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else entry.value
            raise AtlasError(
                f"The members of the installed package {package} can't be imported: {first_line(error)}. Update or "
                f"uninstall it."
            ) from error


def _source_digest(cls: type) -> str:
    """Return a digest of the code of a class: its file and the files of the user that it imports."""
    module = sys.modules[cls.__module__]
    path = user_code.file_of(module)
    if path is None or not path.is_file():
        return hashlib.sha256(repr(sorted(vars(cls))).encode()).hexdigest()
    package = module.__name__.partition(".")[0] if module.__package__ else ""
    with _on_path(path.parent):
        root = user_code.Source.of(user_code.TARGET, path, module.__package__ or "")
        sources = user_code.closure([root], package)
    paths = {source.path.resolve() for source in sources.values()}
    for name, other in list(sys.modules.items()):
        file = user_code.file_of(other)
        if file is not None and file.resolve() in paths and not user_code.installed(file):
            _modules.add(name)
    code = sorted((source.name, source.code) for source in sources.values())
    return hashlib.sha256(repr(code).encode()).hexdigest()


def _import_file(path: Path, where: str) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise AtlasError(f"{where}: there is no file {path}.")
    with _on_path(path.parent):
        # A file that this one imports may have been edited since another member was loaded.
        sources = user_code.closure([user_code.Source.of(path.stem, path)])
        user_code.refresh(sources)
        try:
            module = user_code.import_file(path, f"atlas_user_{path.stem}")
        except (Exception, SystemExit) as error:
            raise AtlasError(f"{where}: {path} can't be imported: {user_code.describe(error)}") from error
    user_code.remember(sources.values())
    return module


def _import_module(name: str, where: str) -> ModuleType:
    try:
        with _on_path(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise AtlasError(f"{where}: {name} can't be imported: {user_code.describe(error)}") from error


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """Let the files of a folder be imported within the block."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
