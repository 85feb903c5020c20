"""The user's own network: built by a function in a Python file or module, or loaded from an exported program."""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import logging
import sys
import warnings
import weakref
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pipeline.core import user_code
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.models import exported
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.wrappers import unwrapped

log = logging.getLogger(__name__)

# Source files that each network was built from, with their content at that time.
_build_sources: "weakref.WeakKeyDictionary[nn.Module, dict[str, user_code.Source]]" = weakref.WeakKeyDictionary()

# Classes without a source file that were already logged.
_logged_classes: set[str] = set()

# By target: files of its network that its import statements did not lead to before it was built.
_late_files: defaultdict[tuple[str, str], set[Path]] = defaultdict(set)

FORMS = "my_net.py:build, my_package.nets:build, or an exported program net.pt2"


def from_target(config: ModelConfig) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    """Build or load the network that `model.target` names.

    Returns:
        The network, the preprocessing that the configuration defines, and an empty tuple of labels.

    Raises:
        AtlasError: If there is no such file, module or function, if the builder raises, or if it does not return a
            `torch.nn.Module`.
    """
    if not config.target:
        raise AtlasError(f"model=custom needs model.target: {FORMS}.")
    module = from_file(config) if _is_saved_network(config.target) else from_builder(config)
    channels = config.channels or len(config.mean or config.std or (0.0,) * 3)
    size = config.input_size or 224
    pair = (size, size) if isinstance(size, int) else size
    return module, Preprocessing(pair, min(pair), (0.0,) * channels, (1.0,) * channels), ()


def code_digest(config: ModelConfig, module: nn.Module) -> str:
    """Return a digest of the code of a network, because weights alone do not determine what it computes.

    The digest covers the target's own file, the files of all classes in the network, and what these import, except
    installed packages. It ignores comments, formatting and the location of the files. For an exported program it is the
    sha256 of the file.

    Args:
        config: Configuration with a `target`.
        module: The network that was built from it.
    """
    assert config.target is not None
    if _is_saved_network(config.target):
        return hashlib.sha256(config.absolute_path(config.target).read_bytes()).hexdigest()
    package = _target_package(config)
    build_sources = _build_sources.get(module, {})
    with _import_paths(config):
        class_sources, compiled_digests = user_code.of_classes(module, package)
        build_paths = {source.path.resolve() for source in build_sources.values()}
        new = [source for source in class_sources if source.path.resolve() not in build_paths]
        sources = build_sources | user_code.closure(new, package) if new else build_sources
    user_code.remember(sources.values())
    late = (source.path for source in sources.values() if source.path.resolve() not in build_paths)
    _late_files[_target_key(config)].update(late)
    for name in sorted(compiled_digests.keys() - _logged_classes):
        log.info("%s has no source file; the digest of the network covers its compiled code instead", name)
    _logged_classes.update(compiled_digests)
    code = sorted({(source.name, source.code) for source in sources.values()})
    arguments = json.dumps(dict(config.arguments or {}), sort_keys=True, default=str)
    # One file may contain several builders and classes with equal weights, so the digest covers which are used.
    classes_used = [[path, type(part).__qualname__] for path, part in module.named_modules()]
    builder = str(config.target).rpartition(":")[2]
    parts = [code, sorted(compiled_digests.items()), arguments, builder, classes_used]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def from_builder(config: ModelConfig) -> nn.Module:
    """Return the network that the target's builder returns for `model.arguments`.

    Raises:
        AtlasError: If the builder cannot be imported, raises, or does not return a `torch.nn.Module`.
    """
    package = _target_package(config)
    with _import_paths(config) as folders:
        roots = _root_sources(config)
        sources = user_code.closure(roots, package)
        late_paths = [path for path in _late_files[_target_key(config)] if path.is_file()]
        late = {str(path): user_code.Source.of(str(path), path) for path in late_paths}
        user_code.refresh(sources | late)
        build = _builder(config)
        try:
            module = build(**(config.arguments or {}))
        except Exception as error:
            raise AtlasError(f"{config.target} failed: {user_code.describe(error)}") from error
        # The builder may be defined in another file than the one that the target names.
        paths = {source.path.resolve() for source in sources.values()}
        others = [source for source in user_code.of_object(build) if source.path.resolve() not in paths]
        more = user_code.closure(others, package) if others else {}
    _late_files[_target_key(config)].update(source.path for source in more.values())
    sources |= more
    user_code.remember(sources.values())
    user_code.LateImportFinder(folders, sources).install()
    if isinstance(module, torch.jit.ScriptModule):
        raise _torchscript_error(config.target or "")
    if not isinstance(module, nn.Module):
        raise AtlasError(f"{config.target} returned a {type(module).__name__}; it must return a torch.nn.Module.")
    module = unwrapped(module)
    _build_sources[module] = sources
    return module


def _root_sources(config: ModelConfig) -> list[user_code.Source]:
    """Return the files that a target names: its own, and for an import path also those of its parent packages."""
    location = _location(config)
    if not location.endswith(".py"):
        return list(user_code.sources_of_import(location, _target_package(config)))
    path = config.absolute_path(location)
    return [user_code.Source.of(user_code.TARGET, path)] if path.is_file() else []


def _location(config: ModelConfig) -> str:
    """Return the file or import path of a target, without the builder's name."""
    target = config.target or ""
    return target.rpartition(":")[0] if ":" in target else target


def _target_package(config: ModelConfig) -> str:
    """Return the top-level package of a target given by import path, or "" for a file.

    The files of this package count as user code even where it is installed.
    """
    location = _location(config)
    return "" if location.endswith(".py") else location.partition(".")[0]


def _target_key(config: ModelConfig) -> tuple[str, str]:
    return str(config.target), str(config.absolute_path("."))


def from_file(config: ModelConfig) -> nn.Module:
    """Load an exported program as a tree of modules that accept hooks.

    Raises:
        AtlasError: If the file is missing, is TorchScript, or could run code and `trust_checkpoint` is not set.
    """
    assert config.target is not None
    path = config.absolute_path(config.target)
    if not path.is_file():
        raise AtlasError(f"model.target={config.target}: there is no such file. Use {FORMS}.")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any("/code/" in name for name in names):
        raise _torchscript_error(config.target)
    if path.suffix != ".pt2":
        raise AtlasError(
            f"model.target={config.target} is not a network. Use {FORMS}. Weights alone belong in model.checkpoint."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not config.trust_checkpoint:
                exported.check(path)
            return torch.export.unflatten(torch.export.load(path))
    except exported.Refused as error:
        raise AtlasError(
            f"{path} {error}, unlike exported programs of ordinary networks. Loading it may run code of whoever made "
            "it. If you trust them, set model.trust_checkpoint=true. Otherwise export the network again with "
            "torch.export.save."
        ) from error
    except Exception as error:
        raise AtlasError(f"{path} can't be read as an exported program: {user_code.describe(error)}") from error


def _torchscript_error(target: str) -> AtlasError:
    return AtlasError(
        f"{target} is TorchScript, whose inner modules do not run forward hooks. Use the Python code that it was made "
        "from (model.target=my_net.py:build with its weights as model.checkpoint), or export the network with "
        "torch.export (net.pt2)."
    )


def _is_saved_network(target: str) -> bool:
    """Return whether a target is the file of a saved network rather than code."""
    return ":" not in target and not target.endswith(".py") and Path(target).suffix in (".pt2", ".pt", ".pth", ".ts")


def _builder(config: ModelConfig) -> Callable[..., Any]:
    assert config.target is not None
    location, _, name = config.target.rpartition(":") if ":" in config.target else (config.target, "", "")
    if not name:
        raise AtlasError(f"model.target={config.target} names no function. Use {FORMS}.")
    code = _import_file(config.absolute_path(location)) if location.endswith(".py") else _import_module(location)
    builder = getattr(code, name, None)
    if not callable(builder):
        functions = [k for k, v in vars(code).items() if callable(v) and not k.startswith("_")]
        raise AtlasError(f"{location} has no function {name!r}. {nearest_names(name, functions)}")
    return builder


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise AtlasError(f"model.target: there is no file {path}. Use {FORMS}.")
    try:
        return user_code.import_file(path, "atlas_target")
    except (Exception, SystemExit) as error:
        raise AtlasError(f"{path} can't be run: {user_code.describe(error)}") from error


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise AtlasError(
            f"model.target: {name} can't be imported: {user_code.describe(error)}. Install it, run the command in the "
            "folder that contains it, or name the file: my_net.py:build."
        ) from error


@contextlib.contextmanager
def _import_paths(config: ModelConfig) -> Iterator[list[str]]:
    """Add the target's folder and the folder of the command to the import path; yield the added folders."""
    location = _location(config)
    added = [str(config.absolute_path("."))]
    if location.endswith(".py"):
        added.insert(0, str(config.absolute_path(location).parent))
    saved = list(sys.path)
    sys.path[:0] = added
    try:
        yield added
    finally:
        sys.path[:] = saved
