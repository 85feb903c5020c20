"""The user's own network: a builder in a Python file or on the import path, or an exported program."""

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

from pipeline.core.errors import AtlasError, first_line, nearest
from pipeline.models import exported, user_code
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.wrappers import unwrapped

log = logging.getLogger(__name__)

# The user's files that a network was built from, as they were then.
_built: "weakref.WeakKeyDictionary[nn.Module, dict[str, user_code.Source]]" = weakref.WeakKeyDictionary()

# Classes without a source file that the log has named.
_told: set[str] = set()

# By target: files of its network that no import statement led to before it was built.
_late: defaultdict[tuple[str, str], set[Path]] = defaultdict(set)

FORMS = "my_net.py:build, my_package.nets:build, or an exported program net.pt2"


def from_target(config: ModelConfig) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    """The network that `model.target` builds, the recipe that the configuration gives, and no labels.

    Raises `AtlasError` where there is no such file, module or function, where the builder raises, or where it
    gives something else than a module.
    """
    if not config.target:
        raise AtlasError(f"model=custom needs model.target: {FORMS}.")
    module = from_file(config) if _is_file(config.target) else from_builder(config)
    channels = config.channels or len(config.mean or config.std or (0.0,) * 3)
    size = config.input_size or 224
    pair = (size, size) if isinstance(size, int) else size
    return module, Preprocessing(pair, min(pair), (0.0,) * channels, (1.0,) * channels), ()


def code_digest(config: ModelConfig, module: nn.Module) -> str:
    """Digest of the code that builds `module` and that its classes are written in: weights alone do not tell it.

    It covers the target's own file, the files of all classes in the network, and what these import, except installed
    packages. Comments and formatting do not count, nor where the files lie. For exported programs it is that of the
    file, which holds all.
    """
    assert config.target is not None
    if _is_file(config.target):
        return hashlib.sha256(config.locate(config.target).read_bytes()).hexdigest()
    own = _top_level(config)
    built = _built.get(module, {})
    with _importing(config):
        classes, without = user_code.of_classes(module, own)
        paths = {source.path.resolve() for source in built.values()}
        also = [source for source in classes if source.path.resolve() not in paths]
        sources = built | user_code.closure(also, own) if also else built
    user_code.remember(sources.values())
    _late[_key(config)].update(source.path for source in sources.values() if source.path.resolve() not in paths)
    for name in sorted(without.keys() - _told):
        log.info("%s has no source file: its compiled code counts in its place", name)
    _told.update(without)
    code = sorted({(source.name, source.code) for source in sources.values()})
    arguments = json.dumps(dict(config.arguments or {}), sort_keys=True, default=str)
    # One file may hold several builders and classes whose weights are alike: which of them were used counts as well.
    classes_used = [[path, type(part).__qualname__] for path, part in module.named_modules()]
    builder = str(config.target).rpartition(":")[2]
    parts = [code, sorted(without.items()), arguments, builder, classes_used]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def from_builder(config: ModelConfig) -> nn.Module:
    """What the builder gives when it is called with `model.arguments`."""
    own = _top_level(config)
    with _importing(config) as folders:
        roots = _roots(config)
        sources = user_code.closure(roots, own)
        late = {str(path): user_code.Source.of(str(path), path) for path in _late[_key(config)] if path.is_file()}
        user_code.refresh(sources | late)
        build = _builder(config)
        try:
            module = build(**(config.arguments or {}))
        except Exception as error:
            raise AtlasError(f"{config.target} failed: {_where(error)}") from error
        # A builder may come from another file than the target names.
        paths = {source.path.resolve() for source in sources.values()}
        others = [source for source in user_code.of_object(build) if source.path.resolve() not in paths]
        more = user_code.closure(others, own) if others else {}
    _late[_key(config)].update(source.path for source in more.values())
    sources |= more
    user_code.remember(sources.values())
    user_code.Beside(folders, sources).install()
    if isinstance(module, torch.jit.ScriptModule):
        raise _scripted(config.target or "")
    if not isinstance(module, nn.Module):
        raise AtlasError(f"{config.target} gave a {type(module).__name__}; it must return a torch.nn.Module.")
    module = unwrapped(module)
    _built[module] = sources
    return module


def _roots(config: ModelConfig) -> list[user_code.Source]:
    """The files that a target names: its own, or for an import path that and those of the packages around it."""
    place = _place(config)
    if not place.endswith(".py"):
        return list(user_code.along(place, _top_level(config)))
    path = config.locate(place)
    return [user_code.Source.of(user_code.TARGET, path)] if path.is_file() else []


def _place(config: ModelConfig) -> str:
    """File or import path of a target, without the builder's name."""
    target = config.target or ""
    return target.rpartition(":")[0] if ":" in target else target


def _top_level(config: ModelConfig) -> str:
    """The package that a target given by import path lies in, whose files count even where it is installed."""
    place = _place(config)
    return "" if place.endswith(".py") else place.partition(".")[0]


def _key(config: ModelConfig) -> tuple[str, str]:
    return str(config.target), str(config.locate("."))


def from_file(config: ModelConfig) -> nn.Module:
    """An exported program as a tree of modules that hooks can be put on; TorchScript is refused."""
    assert config.target is not None
    path = config.locate(config.target)
    if not path.is_file():
        raise AtlasError(f"model.target={config.target}: there is no such file. Use {FORMS}.")
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any("/code/" in name for name in names):
        raise _scripted(config.target)
    if path.suffix != ".pt2":
        raise AtlasError(
            f"model.target={config.target} is no network: use {FORMS}. Weights alone go to model.checkpoint."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not config.trust_checkpoint:
                exported.check(path)
            return torch.export.unflatten(torch.export.load(path))
    except exported.Refused as error:
        raise AtlasError(
            f"{path} holds {error}, which is beyond what programs of ordinary networks hold, and to load such a file "
            "may run code of whoever made it. If you trust them: model.trust_checkpoint=true. Else export the network "
            "again with torch.export.save."
        ) from error
    except Exception as error:
        raise AtlasError(f"{path} can't be read as an exported program: {_where(error)}") from error


def _scripted(target: str) -> AtlasError:
    return AtlasError(
        f"{target} is TorchScript, which runs its inner modules where no hook can look. Give the Python code that "
        "made it (model.target=my_net.py:build with its weights as model.checkpoint), or export it again with "
        "torch.export (net.pt2)."
    )


def _is_file(target: str) -> bool:
    """Whether a target is a network saved whole, and not code."""
    return ":" not in target and not target.endswith(".py") and Path(target).suffix in (".pt2", ".pt", ".pth", ".ts")


def _builder(config: ModelConfig) -> Callable[..., Any]:
    assert config.target is not None
    place, _, name = config.target.rpartition(":") if ":" in config.target else (config.target, "", "")
    if not name:
        raise AtlasError(f"model.target={config.target} names no function. Use {FORMS}.")
    code = _from_path(config.locate(place)) if place.endswith(".py") else _from_name(place)
    builder = getattr(code, name, None)
    if not callable(builder):
        functions = [k for k, v in vars(code).items() if callable(v) and not k.startswith("_")]
        raise AtlasError(f"{place} has no function {name!r}. {nearest(name, functions)}")
    return builder


def _from_path(path: Path) -> ModuleType:
    if not path.is_file():
        raise AtlasError(f"model.target: there is no file {path}. Use {FORMS}.")
    # One name for each file and content: a file that was edited is read again.
    name = f"atlas_target_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code
    try:
        spec.loader.exec_module(code)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise AtlasError(f"{path} can't be run: {_where(error)}") from error
    return code


def _from_name(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise AtlasError(
            f"model.target: {place} can't be imported: {_where(error)}. Install it, stand in the folder "
            "that it lies in, or give the file: my_net.py:build."
        ) from error


@contextlib.contextmanager
def _importing(config: ModelConfig) -> Iterator[list[str]]:
    """Let the target import what lies beside it and where the command was typed; gives these folders."""
    place = _place(config)
    added = [str(config.locate("."))]
    if place.endswith(".py"):
        added.insert(0, str(config.locate(place).parent))
    saved = list(sys.path)
    sys.path[:0] = added
    try:
        yield added
    finally:
        sys.path[:] = saved


def _where(error: BaseException) -> str:
    """An error of the user's code: its type, first line, and the last line of that code that it went through."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and "importlib" not in file and "site-packages" not in file:
            place = f" ({Path(file).name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {first_line(error)}{place}"
