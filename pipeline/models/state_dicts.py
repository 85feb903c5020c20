"""Read a checkpoint file, safely: every tensor in it with the keys of the mappings around it and its name."""

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

# Parts of a name that a wrapping module inserts: DataParallel and AveragedModel, torch.compile, FSDP, activation
# checkpointing, Lightning Fabric.
INSERTED = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)  # fmt: skip

# A word in a key or prefix that marks averaged weights. They are what is evaluated, so they are preferred.
AVERAGED = frozenset(("ema", "swa", "averaged"))

# Where Lightning keeps the weights that were not averaged.
NOT_AVERAGED = "current_model_state"

# Objects of training scripts that are not needed: each is read as a `_Ignored`, so that no code runs.
HARMLESS = (
    "argparse.Namespace", "datetime.datetime", "datetime.timedelta",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
)  # fmt: skip


class _Ignored:
    """Takes the place of an object that is not needed, whatever it is made from."""

    def __new__(cls, *_: Any, **__: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file: the keys of the mappings around it, from outside, and its name in the innermost one."""

    keys: tuple[str, ...]
    name: str
    value: Any

    def places(self) -> "Iterator[tuple[Place, list[str]]]":
        """Every place where the state dict that holds this tensor may begin, and the parts of its name from there."""
        names = self.name.split(".")
        for i in range(len(self.keys)):
            yield Place(self.keys[:i], ""), [*self.keys[i:], *names]
        for i in range(len(names)):
            yield Place(self.keys, "".join(f"{part}." for part in names[:i])), names[i:]

    def within(self, place: "Place") -> list[str] | None:
        """The parts of its name if the state dict begins at `place`; None if it lies elsewhere."""
        return next((parts for known, parts in self.places() if known == place), None)


class Place(NamedTuple):
    """Where in a file a state dict begins: the keys of nested mappings, and what its names begin with."""

    keys: tuple[str, ...]
    prefix: str

    @property
    def preference(self) -> int:
        """0 for averaged weights, 1 for others, 2 for those that were replaced by averaged ones."""
        words = set(re.split(r"[._\W]+", ".".join((*self.keys, self.prefix)).lower()))
        return 0 if words & AVERAGED else 2 if NOT_AVERAGED in self.keys else 1

    def __str__(self) -> str:
        found = [f"key {'.'.join(self.keys)!r}"] if self.keys else []
        return ", ".join(found + [f"prefix {self.prefix!r}"] * bool(self.prefix)) or "top level"


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors of a file, and the version numbers of modules that PyTorch keeps beside a state dict."""

    entries: list[Entry]
    metadata: dict[tuple[str, ...], Mapping[str, Any]]


def contents(path: Path, trust: bool, content: bytes | None) -> Contents:
    """All tensors of a checkpoint file, however deep they lie."""
    if content is None and not path.is_file():
        raise AtlasError(
            f"There is no checkpoint {path}. Give model.checkpoint a file, or leave it null for random weights."
        )
    loaded = _read(path, trust, content)
    found = Contents([], {})
    _collect(loaded, (), found, ())
    if not found.entries:
        what = f" with the keys {', '.join(map(str, list(loaded)[:6]))}" if isinstance(loaded, Mapping) else ""
        raise AtlasError(
            f"{path} holds a {type(loaded).__name__}{what}, and no state dict. Save model.state_dict(), bare or under "
            "a key such as state_dict or model."
        )
    return found


def _collect(value: Any, keys: tuple[str, ...], found: Contents, above: tuple[int, ...]) -> None:
    if id(value) in above:
        return
    above = (*above, id(value))
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, (list, tuple)):
        # Tensors in lists have no names, but a state dict may lie in one.
        value = {str(i): item for i, item in enumerate(value) if isinstance(item, (Mapping, list, tuple, nn.Module))}
    if not isinstance(value, Mapping):
        return
    versions = getattr(value, "_metadata", None)
    if isinstance(versions, Mapping):
        found.metadata[keys] = versions
    for key, item in value.items():
        name = str(key)
        if isinstance(item, Tensor) or name.endswith("_extra_state"):
            found.entries.append(Entry(keys, name, item))
        else:
            _collect(item, (*keys, name), found, above)


def bare_name(parts: Iterable[str]) -> str:
    """A name without what wrapping modules insert."""
    return ".".join(part for part in parts if part not in INSERTED)


def of_optimizer(keys: Sequence[str]) -> bool:
    """Whether tensors under these keys are moments and the like, which may have the name and shape of a weight."""
    return any(key.lower().startswith("optim") for key in keys)


def _read(path: Path, trust: bool, content: bytes | None) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes() if content is None else content)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Ignored, name) for name in HARMLESS]):
            # torch.load says of a TorchScript archive that it is one; what follows says more.
            warnings.simplefilter("ignore")
            source = path if content is None else io.BytesIO(content)
            return torch.load(source, map_location="cpu", weights_only=not trust)
    except Exception as error:
        # Unpicklers raise almost anything on a file that is not theirs.
        reason = first_line(error)
        if not trust and ("weights_only" in str(error) or "Unsupported" in str(error) or "WeightsUnpickler" in reason):
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"Python objects ({named[1]})" if named else "Python objects"
            raise AtlasError(
                f"{path} can't be read as weights only: it holds {what}, and to load those is to run code. "
                "If you trust whoever made it: model.trust_checkpoint=true. Else save model.state_dict() and use that."
            ) from error
        raise AtlasError(f"{path} can't be read as a checkpoint: {type(error).__name__}: {reason}") from error
