"""The Python files that a network of the user's own depends on: found by imports, hashed, read again once edited.

Dependencies are found from the files alone, by following the import statements of their syntax trees. What this process
has imported before, and in which order, makes no difference.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import site
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from torch import nn

log = logging.getLogger(__name__)

# Libraries that are no user code, also where they are installed from a checkout. This package is one of them.
LIBRARIES = ("torch", "torchvision", "timm", __name__.partition(".")[0])

# The name of the target's own file among the sources: the file may be called and lie as it likes.
TARGET = "model.target"

# An import by a computed name may mean any Python file below its folder: at most so many files and folder entries are
# looked at.
MOST_FILES, MOST_ENTRIES = 2_000, 100_000

_PACKAGES = ("site-packages", "dist-packages")
_NO_CODE = (*_PACKAGES, "__pycache__", "node_modules")

# The classes that `class` statements make carry this flag; those of C extensions do not.
_HEAP_TYPE = 1 << 9


@dataclasses.dataclass(frozen=True)
class Source:
    """A Python file by the name it is imported as, which is the same wherever it lies; `package` resolves `from .`."""

    name: str
    path: Path
    package: str
    content: bytes = dataclasses.field(repr=False)

    @staticmethod
    def of(name: str, path: Path, package: str = "") -> "Source":
        """The file as it is now."""
        return Source(name, path, package, path.read_bytes())

    @property
    def code(self) -> str:
        """Digest of what it says, comments and formatting aside."""
        return _code(self.content)


# From which content a module was imported, and what a file held when a network that depends on it was last built: what
# is imported later, while the network runs, is taken to come from that.
_imported: "weakref.WeakKeyDictionary[types.ModuleType, bytes]" = weakref.WeakKeyDictionary()
_seen: dict[Path, bytes] = {}


def closure(roots: Iterable[Source], own: str = "") -> dict[str, Source]:
    """The roots and all files of the user's that they import, directly or through others, by name.

    Import statements count wherever they stand, also inside functions. `own` is the top-level package of a target that
    is given by import path: its files count even where it is installed.
    """
    found = {root.name: root for root in roots}
    paths = {root.path for root in found.values()}
    waiting = list(found.values())
    while waiting:
        source = waiting.pop()
        names, computed = imports(source.content, source.package)
        candidates = [one for name in names for one in along(name, own)]
        if computed and not installed(source.path):
            candidates += (one for one in _below(source) if one.path not in paths)
        for candidate in candidates:
            if candidate.name not in found:
                found[candidate.name] = candidate
                paths.add(candidate.path)
                waiting.append(candidate)
    return found


def along(name: str, own: str = "") -> Iterator[Source]:
    """The user's files that `import a.b.c` runs: those of `a`, `a.b` and `a.b.c`, as far as there are any."""
    parts = name.split(".")
    if parts[0] in LIBRARIES:
        return
    places: Any = None
    for i in range(len(parts)):
        part = ".".join(parts[: i + 1])
        spec = _spec(part, places)
        if spec is None:
            return
        places = spec.submodule_search_locations
        if spec.has_location and spec.origin:
            path = Path(spec.origin)
            if not path.is_file() or (installed(path) and parts[0] != own):
                return
            yield Source.of(part, path, part if places is not None else part.rpartition(".")[0])
        elif places is None:  # built in
            return
        if places is None:
            return


def _spec(name: str, places: Any) -> ModuleSpec | None:
    """Where a module is imported from. Unlike `importlib.util.find_spec`, this imports no parent package."""
    known = sys.modules.get(name)
    file = file_of(known)
    if known is not None and (name in sys.builtin_module_names or (file is not None and installed(file))):
        return getattr(known, "__spec__", None)  # an import gives it, whatever lies in the user's folder
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, places, None)
        except Exception as error:  # a finder of another package
            log.debug("%s can't look for %s: %s", finder, name, error)
            continue
        if spec is not None:
            return spec
    return None


def _below(source: Source) -> Iterator[Source]:
    """The Python files below the folder of a file that imports by a computed name, any of which may be meant."""
    files, entries = 0, 0
    for folder, inner, names in os.walk(source.path.parent):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and n not in _NO_CODE)
        if "pyvenv.cfg" in names:
            inner.clear()
            continue
        entries += len(inner) + len(names)
        for name in sorted(n for n in names if n.endswith(".py")):
            path = Path(folder, name)
            parts = path.relative_to(source.path.parent).with_suffix("").parts
            files += 1
            package = ".".join([*filter(None, [source.package]), *parts[:-1]])
            yield Source.of(f"{source.name}/{'.'.join(parts)}", path, package)
        if files > MOST_FILES or entries > MOST_ENTRIES:
            log.warning(
                "%s imports modules by computed names, and its folder is too large to follow them all: a change in a "
                "file that is only imported so may go unnoticed.", source.path,
            )  # fmt: skip
            return


@functools.lru_cache(maxsize=4096)
def imports(content: bytes, package: str) -> tuple[tuple[str, ...], bool]:
    """Absolute names of all modules that a file may import, and whether it imports any by a computed name.

    `from a import b` gives `a.b`, whether that is a module or not. What runs in scripts and type checkers only does not
    count, and a file that Python can't parse imports nothing.
    """
    names: set[str] = set()
    computed = False
    waiting: list[ast.AST] = [tree] if (tree := _tree(content)) else []
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _never(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            names.update(base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names if base)
        elif isinstance(node, ast.Call) and _is_import(node.func):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.add(_absolute(first.value, package))
            else:
                computed = True
    return tuple(sorted(names - {""})), computed


def _absolute(name: str, package: str) -> str:
    """`..blocks` inside the package `a.b` is `a.blocks`; empty where that leads out of all packages."""
    level = len(name) - len(name.lstrip("."))
    parts = package.split(".") if package else []
    if level > len(parts):
        return ""
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])]) if level else name


def _never(test: ast.expr) -> bool:
    """Whether a condition holds in scripts and type checkers only."""
    text = ast.unparse(test)
    return text in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


def _is_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _tree(content: bytes) -> ast.Module | None:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):
        return None


@functools.lru_cache(maxsize=4096)
def _code(content: bytes) -> str:
    tree = _tree(content)
    return hashlib.sha256(content if tree is None else ast.dump(tree).encode()).hexdigest()


# ---- whose a file is


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    """The standard library's and the package folders of this Python, and this program's own."""
    found = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    found += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    return tuple({Path(p) for p in found} | {Path(p).resolve() for p in found})


@functools.lru_cache(maxsize=65536)
def installed(path: Path) -> bool:
    """Whether a file belongs to an installed package, the standard library or this program, and not to the user."""
    return any(
        any(part in _PACKAGES for part in form.parts) or any(form.is_relative_to(f) for f in _installed_folders())
        for form in (path, path.resolve())
    )


def file_of(module: Any) -> Path | None:
    """The file of a module; nothing is asked of objects that only stand for one, which might import it."""
    if not isinstance(module, types.ModuleType):
        return None
    file = object.__getattribute__(module, "__dict__").get("__file__")
    return Path(file) if isinstance(file, str) else None


# ---- the classes of a network


def of_classes(module: nn.Module, own: str = "") -> tuple[list[Source], dict[str, str]]:
    """The user's files that the classes of all modules of a network were defined in, base classes included.

    Classes without a file (of a notebook, or made by `exec`) come second: name → digest of their compiled code.
    """
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if cls.__flags__ & _HEAP_TYPE}
    sources: dict[str, Source] = {}
    without: dict[str, str] = {}
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        name = str(cls.__module__)
        if name.partition(".")[0] in LIBRARIES:
            continue
        known = sys.modules.get(name)
        path = file_of(known)
        if path is None or not path.is_file():
            if name == "builtins" or name not in sys.stdlib_module_names:
                without[f"{name}.{cls.__qualname__}"] = _compiled(cls)
        elif not installed(path) or name.partition(".")[0] == own:
            sources[name] = _as_imported(name, known, path)
    return list(sources.values()), without


def _as_imported(name: str, module: Any, path: Path) -> Source:
    content = _imported.get(module)
    return Source(name, path, module.__package__ or "", path.read_bytes() if content is None else content)


def of_object(value: Any) -> list[Source]:
    """The file that a function, class or callable object was defined in, wrappers taken off; empty if there is none."""
    while True:
        bare = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
        if bare is value:
            break
        value = bare
    name = getattr(value, "__module__", None) or type(value).__module__
    module = sys.modules.get(name)
    path = file_of(module)
    return [_as_imported(name, module, path)] if path is not None and path.is_file() else []


def _compiled(cls: type) -> str:
    """Digest of the compiled methods and the plain attributes of a class."""
    found = []
    for name, value in sorted(vars(cls).items()):
        value = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) or _wraps(value) else value
        if isinstance(value, types.FunctionType):
            found.append((name, _of_code(value.__code__)))
        elif isinstance(value, (bool, int, float, complex, str, bytes)):
            found.append((name, repr(value)))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _wraps(value: Any) -> bool:
    return isinstance(value, (staticmethod, classmethod))


def _of_code(code: types.CodeType) -> tuple[Any, ...]:
    constants = [_of_code(c) if isinstance(c, types.CodeType) else _plain(c) for c in code.co_consts]
    return code.co_code.hex(), code.co_names, code.co_varnames, constants


def _plain(constant: Any) -> str:
    # The order of a set differs from process to process.
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


# ---- modules of this process


def refresh(sources: Mapping[str, Source]) -> None:
    """Let Python import all of `sources` again if one was edited since it was imported, or hides behind a namesake.

    Two targets in different folders may both have a `blocks.py`. Modules of installed packages stay as they are.
    """
    for source in sources.values():
        _drop_old_bytecode(source.path)
    files = {source.path.resolve(): source for source in sources.values()}
    own: set[str] = set()
    changed = False
    for name, module in list(sys.modules.items()):
        file = file_of(module)
        if name in ("__main__", "__mp_main__") or (file is not None and installed(file)):
            continue
        source = files.get(file.resolve()) if file is not None else None
        if source is not None:
            own.add(name)
            known = _imported.get(module, _seen.get(source.path, source.content))
            changed |= known != source.content
        elif _namesake(name, module, sources):
            own.add(name)
            changed = True
    if not changed:
        return
    for name in list(sys.modules):
        parents = name.split(".")
        if any(".".join(parts) in own for parts in (parents[: i + 1] for i in range(len(parents)))):
            file = file_of(sys.modules[name])
            if file is None or not installed(file):
                del sys.modules[name]
    importlib.invalidate_caches()


def _drop_old_bytecode(path: Path) -> None:
    """Remove compiled code that is older than its source.

    Python compares times in whole seconds, so that it takes code of the same length, edited in the second in which it
    was imported, for unchanged.
    """
    with contextlib.suppress(OSError, NotImplementedError, ValueError):
        compiled = Path(importlib.util.cache_from_source(str(path)))
        if not installed(path) and compiled.stat().st_mtime_ns <= path.stat().st_mtime_ns:
            compiled.unlink()


def _namesake(name: str, module: Any, sources: Mapping[str, Source]) -> bool:
    """Whether a module that is none of `sources` stands where Python would look for one of them."""
    if name in sources:
        return name not in sys.builtin_module_names
    inside = [s for n, s in sources.items() if n.startswith(f"{name}.")]
    places = [Path(p).resolve() for p in getattr(module, "__path__", ())] if inside else []
    return any(not any(s.path.resolve().is_relative_to(p) for p in places) for s in inside)


def remember(sources: Iterable[Source]) -> None:
    """Note from which content the modules of these files were imported, or will be."""
    files = {source.path.resolve(): source for source in sources}
    _seen.update((source.path, source.content) for source in files.values())
    for module in list(sys.modules.values()):
        file = file_of(module)
        if file is not None and not installed(file) and file.resolve() in files:
            _imported.setdefault(module, files[file.resolve()].content)


class Beside:
    """Finds what a target's code imports from its own folders only when the network runs, after it was built."""

    def __init__(self, folders: Sequence[str], sources: Iterable[str]) -> None:
        self.folders = list(folders)
        self.names = frozenset(".".join(n.split(".")[: i + 1]) for n in sources for i in range(n.count(".") + 1))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder` asks, for names that the code was seen to import."""
        return PathFinder.find_spec(name, self.folders if path is None else path) if name in self.names else None

    def install(self) -> None:
        """Be the last finder to be asked, in the place of any other target's."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Beside)]
        sys.meta_path.append(self)
