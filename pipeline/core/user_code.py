"""Python files that a user's network depends on: find them by their imports, hash them, and reload edited ones.

Dependencies are found from the files alone, by following the import statements in their syntax trees. The result does
not depend on what this process has imported before, or in which order.
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
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import first_line

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# Libraries that are never user code, even if they are installed from a checkout. This package is one of them.
LIBRARIES = ("torch", "torchvision", "timm", __name__.partition(".")[0])

# Name of the target's own file among the sources, so that its real name and location do not matter.
TARGET = "model.target"

# An import by a computed name may refer to any Python file below the importing file's folder. Limits of that search.
MAX_FILES, MAX_ENTRIES = 2_000, 100_000

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")
_SKIPPED_FOLDERS = (*_PACKAGE_FOLDERS, "__pycache__", "node_modules")

# Py_TPFLAGS_HEAPTYPE: set for classes made by `class` statements, not for static types of C extensions.
_HEAP_TYPE = 1 << 9


@dataclasses.dataclass(frozen=True)
class Source:
    """A Python file.

    Attributes:
        name: Name that it is imported as, independent of its location.
        path: Its path.
        package: The package that its relative imports start from.
        content: Its bytes when it was read.
    """

    name: str
    path: Path
    package: str
    content: bytes = dataclasses.field(repr=False)

    @staticmethod
    def of(name: str, path: Path, package: str = "") -> "Source":
        """Read a file as it is now."""
        return Source(name, path, package, path.read_bytes())

    @property
    def code(self) -> str:
        """Digest of the code, ignoring comments and formatting."""
        return _code_digest(self.content)


# Content that each module was imported from.
_imported: "weakref.WeakKeyDictionary[types.ModuleType, bytes]" = weakref.WeakKeyDictionary()

# Content of each file when a network that depends on it was last built. Modules that are imported later, while the
# network runs, are assumed to come from that content.
_content_at_build: dict[Path, bytes] = {}


def closure(roots: Iterable[Source], package: str = "") -> dict[str, Source]:
    """Return the roots and all user files that they import, directly or indirectly, by name.

    Import statements count wherever they are, also inside functions.

    Args:
        roots: The files to start from.
        package: Top-level package whose files count as user code even where it is installed.
    """
    sources = {root.name: root for root in roots}
    paths = {root.path for root in sources.values()}
    queue = list(sources.values())
    while queue:
        source = queue.pop()
        names, has_computed = imports(source.content, source.package)
        candidates = [candidate for name in names for candidate in sources_of_import(name, package)]
        if has_computed and not installed(source.path):
            candidates += (candidate for candidate in _files_below(source) if candidate.path not in paths)
        for candidate in candidates:
            if candidate.name not in sources:
                sources[candidate.name] = candidate
                paths.add(candidate.path)
                queue.append(candidate)
    return sources


def sources_of_import(name: str, package: str = "") -> Iterator[Source]:
    """Yield the user files that `import a.b.c` executes: those of `a`, `a.b` and `a.b.c`, as far as they exist.

    Args:
        name: Absolute dotted name of a module.
        package: Top-level package whose files count as user code even where it is installed.
    """
    parts = name.split(".")
    if parts[0] in LIBRARIES:
        return
    locations: Any = None
    for i in range(len(parts)):
        prefix = ".".join(parts[: i + 1])
        spec = _find_spec(prefix, locations)
        if spec is None:
            return
        locations = spec.submodule_search_locations
        if spec.has_location and spec.origin:
            path = Path(spec.origin)
            if not path.is_file() or (installed(path) and parts[0] != package):
                return
            yield Source.of(prefix, path, prefix if locations is not None else prefix.rpartition(".")[0])
        elif locations is None:  # built in
            return
        if locations is None:
            return


def _find_spec(name: str, locations: Any) -> ModuleSpec | None:
    """Return the spec that a module is imported from; unlike `importlib.util.find_spec`, import no parent package."""
    module = sys.modules.get(name)
    file = file_of(module)
    if module is not None and (name in sys.builtin_module_names or (file is not None and installed(file))):
        return getattr(module, "__spec__", None)  # already imported, so a file of the user cannot take its place
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, locations, None)
        except Exception as error:  # a finder of another package
            log.debug("%s failed to search for %s: %s", finder, name, error)
            continue
        if spec is not None:
            return spec
    return None


def _files_below(source: Source) -> Iterator[Source]:
    """Yield all Python files below the folder of `source`, any of which it may import by a computed name."""
    files, entries = 0, 0
    for folder, subfolders, names in os.walk(source.path.parent):
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and n not in _SKIPPED_FOLDERS)
        if "pyvenv.cfg" in names:
            subfolders.clear()
            continue
        entries += len(subfolders) + len(names)
        for name in sorted(n for n in names if n.endswith(".py")):
            path = Path(folder, name)
            parts = path.relative_to(source.path.parent).with_suffix("").parts
            files += 1
            package = ".".join([*filter(None, [source.package]), *parts[:-1]])
            yield Source.of(f"{source.name}/{'.'.join(parts)}", path, package)
        if files > MAX_FILES or entries > MAX_ENTRIES:
            log.warning(
                "%s imports modules by computed names, and its folder has too many files to search them all. A change "
                "in a file that is only imported this way may not be noticed.",
                source.path,
            )
            return


@functools.lru_cache(maxsize=4096)
def imports(content: bytes, package: str) -> tuple[tuple[str, ...], bool]:
    """Return the modules that a file may import.

    `from a import b` gives `a.b`, whether that is a module or not. Code that runs only in scripts or type checkers is
    ignored, and a file that Python cannot parse imports nothing.

    Args:
        content: The file.
        package: The package that relative imports start from.

    Returns:
        Sorted absolute names, and whether the file also imports modules by computed names.
    """
    names: set[str] = set()
    has_computed = False
    tree = _parse(content)
    queue: list[ast.AST] = [] if tree is None else [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and _is_never_imported(node.test):
            queue += node.orelse
            continue
        queue += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            names.update(base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names if base)
        elif isinstance(node, ast.Call) and _is_import_function(node.func):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.add(_absolute(first.value, package))
            else:
                has_computed = True
    return tuple(sorted(names - {""})), has_computed


def _absolute(name: str, package: str) -> str:
    """Resolve a relative name: `..blocks` in the package `a.b` is `a.blocks`; "" if it leads out of all packages."""
    level = len(name) - len(name.lstrip("."))
    parts = package.split(".") if package else []
    if level > len(parts):
        return ""
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])]) if level else name


def _is_never_imported(test: ast.expr) -> bool:
    """Return whether a condition is true only in scripts or type checkers."""
    text = ast.unparse(test)
    return text in ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


def _is_import_function(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _parse(content: bytes) -> ast.Module | None:
    try:
        return ast.parse(content)
    except (SyntaxError, ValueError):
        return None


@functools.lru_cache(maxsize=4096)
def _code_digest(content: bytes) -> str:
    tree = _parse(content)
    return hashlib.sha256(content if tree is None else ast.dump(tree).encode()).hexdigest()


# ---- user files and installed files


@functools.cache
def _installed_folders() -> tuple[Path, ...]:
    """Return the folders of the standard library, of installed packages and of this program."""
    folders = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[1])]
    return tuple({Path(folder) for folder in folders} | {Path(folder).resolve() for folder in folders})


@functools.lru_cache(maxsize=65536)
def installed(path: Path) -> bool:
    """Return whether a file belongs to an installed package, the standard library or this program."""
    return any(
        any(part in _PACKAGE_FOLDERS for part in form.parts)
        or any(form.is_relative_to(folder) for folder in _installed_folders())
        for form in (path, path.resolve())
    )


def file_of(module: Any) -> Path | None:
    """Return the file of a module, or None. Lazy-import proxies are not touched, as that could import the module."""
    if not isinstance(module, types.ModuleType):
        return None
    file = object.__getattribute__(module, "__dict__").get("__file__")
    return Path(file) if isinstance(file, str) else None


# ---- the classes of a network


def of_classes(module: "nn.Module", package: str = "") -> tuple[list[Source], dict[str, str]]:
    """Return the user files that define the classes of a network's modules, including base classes.

    Args:
        module: The network.
        package: Top-level package whose files count as user code even where it is installed.

    Returns:
        The files, and for classes without a file (of a notebook, or made by `exec`) digests of their compiled code, by
        qualified name.
    """
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if cls.__flags__ & _HEAP_TYPE}
    sources: dict[str, Source] = {}
    compiled_digests: dict[str, str] = {}
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        name = str(cls.__module__)
        if name.partition(".")[0] in LIBRARIES:
            continue
        defining_module = sys.modules.get(name)
        path = file_of(defining_module)
        if path is None or not path.is_file():
            if name == "builtins" or name not in sys.stdlib_module_names:
                compiled_digests[f"{name}.{cls.__qualname__}"] = _compiled_digest(cls)
        elif not installed(path) or name.partition(".")[0] == package:
            sources[name] = _as_imported(name, defining_module, path)
    return list(sources.values()), compiled_digests


def _as_imported(name: str, module: Any, path: Path) -> Source:
    """Return the source of a module with the content that it was imported from, where that was recorded."""
    content = _imported.get(module)
    return Source(name, path, module.__package__ or "", path.read_bytes() if content is None else content)


def of_object(value: Any) -> list[Source]:
    """Return the file that defines a function, class or callable object, without its wrappers; empty if none does."""
    while True:
        inner = inspect.unwrap(value.func if isinstance(value, functools.partial) else value)
        if inner is value:
            break
        value = inner
    name = getattr(value, "__module__", None) or type(value).__module__
    module = sys.modules.get(name)
    path = file_of(module)
    return [_as_imported(name, module, path)] if path is not None and path.is_file() else []


def _compiled_digest(cls: type) -> str:
    """Return a digest of the bytecode of a class's methods and of its plain attributes."""
    members = []
    for name, value in sorted(vars(cls).items()):
        if callable(value) or _is_method_wrapper(value):
            value = inspect.unwrap(getattr(value, "__func__", value))
        if isinstance(value, types.FunctionType):
            members.append((name, _describe_code(value.__code__)))
        elif isinstance(value, (bool, int, float, complex, str, bytes)):
            members.append((name, repr(value)))
    return hashlib.sha256(repr(members).encode()).hexdigest()


def _is_method_wrapper(value: Any) -> bool:
    return isinstance(value, (staticmethod, classmethod))


def _describe_code(code: types.CodeType) -> tuple[Any, ...]:
    constants = [_describe_code(c) if isinstance(c, types.CodeType) else _describe_constant(c) for c in code.co_consts]
    return code.co_code.hex(), code.co_names, code.co_varnames, constants


def _describe_constant(constant: Any) -> str:
    # The iteration order of a set differs between processes.
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


# ---- modules of this process


def import_file(path: Path, prefix: str) -> types.ModuleType:
    """Import a Python file under a name that begins with `prefix`; an edited file is imported again.

    The name contains a hash of path and content, so that it hides no other module.

    Raises:
        Exception: Whatever the code of the file raises, SystemExit included.
    """
    name = f"{prefix}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of a class here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def describe(error: BaseException) -> str:
    """Describe an error in the user's code: its type, first line, and the innermost line of the user's code."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "importlib" not in file and not installed(Path(file)):
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {first_line(error)}{place}"


def refresh(sources: Mapping[str, Source]) -> None:
    """Remove modules from `sys.modules` so that Python imports `sources` again, if that is necessary.

    It is if a source was edited since it was imported, or if another module has taken its name: two targets in
    different folders may both have a `blocks.py`. Modules of installed packages are kept.
    """
    for source in sources.values():
        _remove_outdated_bytecode(source.path)
    files = {source.path.resolve(): source for source in sources.values()}
    related: set[str] = set()
    changed = False
    for name, module in list(sys.modules.items()):
        file = file_of(module)
        if name in ("__main__", "__mp_main__") or (file is not None and installed(file)):
            continue
        source = files.get(file.resolve()) if file is not None else None
        if source is not None:
            related.add(name)
            imported_content = _imported.get(module, _content_at_build.get(source.path, source.content))
            changed |= imported_content != source.content
        elif _hides_a_source(name, module, sources):
            related.add(name)
            changed = True
    if not changed:
        return
    for name in list(sys.modules):
        parts = name.split(".")
        if any(".".join(parts[: i + 1]) in related for i in range(len(parts))):
            file = file_of(sys.modules[name])
            if file is None or not installed(file):
                del sys.modules[name]
    importlib.invalidate_caches()


def _remove_outdated_bytecode(path: Path) -> None:
    """Remove the bytecode file of a source if it is not newer than the source.

    Python compares modification times in whole seconds and the length of the source. It would use the old bytecode if a
    file was edited, without a change of length, in the same second in which it was imported.
    """
    with contextlib.suppress(OSError, NotImplementedError, ValueError):
        bytecode = Path(importlib.util.cache_from_source(str(path)))
        if not installed(path) and bytecode.stat().st_mtime_ns <= path.stat().st_mtime_ns:
            bytecode.unlink()


def _hides_a_source(name: str, module: Any, sources: Mapping[str, Source]) -> bool:
    """Return whether an imported module that is none of `sources` would be used in place of one of them."""
    if name in sources:
        return name not in sys.builtin_module_names
    submodules = [source for n, source in sources.items() if n.startswith(f"{name}.")]
    if not submodules:
        return False
    folders = [Path(p).resolve() for p in getattr(module, "__path__", ())]
    return any(not any(source.path.resolve().is_relative_to(f) for f in folders) for source in submodules)


def remember(sources: Iterable[Source]) -> None:
    """Record the content that the modules of these files were imported from, or will be."""
    files = {source.path.resolve(): source for source in sources}
    _content_at_build.update((source.path, source.content) for source in files.values())
    for module in list(sys.modules.values()):
        file = file_of(module)
        if file is not None and not installed(file) and file.resolve() in files:
            _imported.setdefault(module, files[file.resolve()].content)


class LateImportFinder:
    """Meta path finder for imports from the target's folders that run after the network was built, e.g. in `forward`.

    Args:
        folders: The target's folders.
        sources: Names of the modules that the target's code imports.
    """

    def __init__(self, folders: Sequence[str], sources: Iterable[str]) -> None:
        self.folders = list(folders)
        self.names = frozenset(".".join(n.split(".")[: i + 1]) for n in sources for i in range(n.count(".") + 1))

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Find a module that the target's code imports; see `importlib.abc.MetaPathFinder`."""
        return PathFinder.find_spec(name, self.folders if path is None else path) if name in self.names else None

    def install(self) -> None:
        """Append this finder to `sys.meta_path`, in place of that of any other target."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, LateImportFinder)]
        sys.meta_path.append(self)
