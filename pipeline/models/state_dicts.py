"""Read all tensors of a checkpoint file without running code, with their names and the keys of enclosing mappings."""

import dataclasses
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line

# Parts of names that wrappers insert: DataParallel and AveragedModel, torch.compile, FSDP, activation checkpointing,
# Lightning Fabric.
INSERTED = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"))

# Words in keys and prefixes that indicate averaged weights. These are meant for evaluation, so they are preferred.
AVERAGED = frozenset(("ema", "swa", "averaged"))

# Key of the non-averaged weights in checkpoints of Lightning.
NOT_AVERAGED = "current_model_state"

# Types of objects in training checkpoints that are not needed. They are read as `_Ignored`, so that no code runs.
HARMLESS = (
    "argparse.Namespace", "datetime.datetime", "datetime.timedelta",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip


class _Ignored:
    """Placeholder for an object that is not needed. It accepts any arguments."""

    def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        keys: Keys of the enclosing mappings, outermost first.
        name: Its name in the innermost mapping.
        value: The tensor, or the extra state of a module.
    """

    keys: tuple[str, ...]
    name: str
    value: Any

    def places(self) -> "Iterator[tuple[Place, list[str]]]":
        """Yield every place where the state dict with this tensor may begin, and the parts of its name from there."""
        names = self.name.split(".")
        for i in range(len(self.keys)):
            yield Place(self.keys[:i], ""), [*self.keys[i:], *names]
        for i in range(len(names)):
            yield Place(self.keys, "".join(f"{part}." for part in names[:i])), names[i:]

    def within(self, place: "Place") -> list[str] | None:
        """Return the parts of its name in a state dict that begins at `place`, or None if it is not part of that."""
        return next((parts for candidate, parts in self.places() if candidate == place), None)


class Place(NamedTuple):
    """Where in a file a state dict begins.

    Attributes:
        keys: Keys of the enclosing mappings, outermost first.
        prefix: Common prefix of its names, empty or ending in a dot.
    """

    keys: tuple[str, ...]
    prefix: str

    @property
    def preference(self) -> int:
        """Rank: 0 for averaged weights, 1 for others, 2 for weights that averaged ones have replaced."""
        words = set(re.split(r"[._\W]+", ".".join((*self.keys, self.prefix)).lower()))
        if words & AVERAGED:
            return 0
        return 2 if NOT_AVERAGED in self.keys else 1

    def __str__(self) -> str:
        parts = []
        if self.keys:
            parts.append(f"key {'.'.join(self.keys)!r}")
        if self.prefix:
            parts.append(f"prefix {self.prefix!r}")
        return ", ".join(parts) or "top level"


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint file.

    Attributes:
        entries: All tensors.
        metadata: By the keys of a state dict: its `_metadata`, the version numbers of modules.
    """

    entries: list[Entry]
    metadata: dict[tuple[str, ...], Mapping[str, Any]]


def contents(path: Path, trust: bool, content: bytes | None) -> Contents:
    """Read all tensors of a checkpoint file, at any depth.

    Args:
        path: The file.
        trust: Whether to unpickle arbitrary objects, which can run code.
        content: Bytes of the file, if it was read before.

    Raises:
        AtlasError: If the file cannot be read or contains no tensors.
    """
    if content is None and not path.is_file():
        raise AtlasError(
            f"There is no checkpoint {path}. Set model.checkpoint to a file, or to null for random weights."
        )
    loaded = _read(path, trust, content)
    collected = Contents([], {})
    _collect(loaded, (), collected, ())
    if not collected.entries:
        what = f" with the keys {', '.join(map(str, list(loaded)[:6]))}" if isinstance(loaded, Mapping) else ""
        raise AtlasError(
            f"{path} contains a {type(loaded).__name__}{what} but no state dict. Save model.state_dict(), directly or "
            "under a key such as state_dict or model."
        )
    return collected


def _collect(value: Any, keys: tuple[str, ...], target: Contents, ancestors: tuple[int, ...]) -> None:
    """Add all tensors below `value` to `target`; `ancestors` are ids of enclosing objects, to stop at cycles."""
    if id(value) in ancestors:
        return
    ancestors = (*ancestors, id(value))
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, (list, tuple)):
        # Tensors in lists have no names, but a list may contain a state dict.
        value = {str(i): item for i, item in enumerate(value) if isinstance(item, (Mapping, list, tuple, nn.Module))}
    if not isinstance(value, Mapping):
        return
    versions = getattr(value, "_metadata", None)
    if isinstance(versions, Mapping):
        target.metadata[keys] = versions
    for key, item in value.items():
        name = str(key)
        if isinstance(item, Tensor) or name.endswith("_extra_state"):
            target.entries.append(Entry(keys, name, item))
        else:
            _collect(item, (*keys, name), target, ancestors)


def bare_name(parts: Iterable[str]) -> str:
    """Return a name without the parts that wrappers insert."""
    return ".".join(part for part in parts if part not in INSERTED)


def of_optimizer(keys: Sequence[str]) -> bool:
    """Return whether tensors under these keys are optimizer state, which may have the name and shape of a weight."""
    return any(key.lower().startswith("optim") for key in keys)


def _read(path: Path, trust: bool, content: bytes | None) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes() if content is None else content)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Ignored, name) for name in HARMLESS]):
            # torch.load warns about TorchScript archives; the error below is more specific.
            warnings.simplefilter("ignore")
            source = path if content is None else io.BytesIO(content)
            return torch.load(source, map_location="cpu", weights_only=not trust)
    except Exception as error:
        # Unpicklers raise almost any exception for a file of another format.
        reason = first_line(error)
        if not trust and ("weights_only" in str(error) or "Unsupported" in str(error) or "WeightsUnpickler" in reason):
            match = re.search(r"GLOBAL ([\w.]+)", str(error))
            objects = f"Python objects ({match[1]})" if match else "Python objects"
            raise AtlasError(
                f"{path} can't be read as weights only: it contains {objects}, and loading them can run code. If you "
                "trust whoever made it, set model.trust_checkpoint=true. Otherwise save model.state_dict() and load "
                "that."
            ) from error
        raise AtlasError(f"{path} can't be read as a checkpoint: {type(error).__name__}: {reason}") from error
