"""Read a checkpoint, safely, and fit it to a network, or say exactly why it does not fit."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import AtlasError, first_line

log = logging.getLogger(__name__)

# Keys under which training scripts keep the state dict. The averaged weights first: they are what is evaluated.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema",
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module",
)  # fmt: skip

# What DataParallel and torch.compile put before every name.
PREFIXES = ("module.", "_orig_mod.")


def load_checkpoint(module: nn.Module, path: Path, trust: bool = False, strict: bool = True) -> None:
    """Fill `module` from a checkpoint, bare or inside a common wrapper key.

    Weights only unless `trust`. Raises `AtlasError` where the file can't be read, or where its tensors are not
    the network's, counted and sampled; with `strict=False` what fits is loaded and the rest is logged.
    """
    state = state_dict(path, trust)
    own = module.state_dict()
    state = fitted(state, own)
    wrong = sorted(k for k in own if k in state and own[k].shape != state[k].shape)
    problems = []
    for keys, what in (
        (sorted(set(own) - set(state)), "missing"),
        (sorted(set(state) - set(own)), "not in the network"),
        (wrong, "of another shape"),
    ):
        if keys:
            shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in keys] if keys is wrong else keys
            verb = "is" if len(keys) == 1 else "are"
            noun = "tensor" if len(keys) == 1 else "tensors"
            problems.append(f"{len(keys)} {noun} {verb} {what}, e.g. {', '.join(shapes[:3])}")
    fits = {k: v for k, v in state.items() if k in own and k not in wrong}
    if problems and (strict or not fits):
        hint = " model.strict=false loads the tensors that fit." if fits else " Not one tensor fits."
        raise AtlasError(f"{path} does not fit this network: {'; '.join(problems)}.{hint}")
    if problems:
        log.warning("%s fits in part, %d of %d tensors: %s", path, len(fits), len(own), "; ".join(problems))
    module.load_state_dict(fits, strict=not problems)


def state_dict(path: Path, trust: bool = False) -> dict[str, Tensor]:
    """Names → tensors of a checkpoint file, out of its wrapper and without the prefixes of wrapping modules."""
    if not path.is_file():
        raise AtlasError(
            f"There is no checkpoint {path}. Give model.checkpoint a file, or leave it null for random weights."
        )
    loaded = _read(path, trust)
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    while isinstance(loaded, Mapping):
        inner = next((loaded[k] for k in WRAPPERS if isinstance(loaded.get(k), (Mapping, nn.Module))), None)
        if inner is None:
            break
        loaded = inner.state_dict() if isinstance(inner, nn.Module) else inner
    tensors = loaded if isinstance(loaded, Mapping) else {}
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if isinstance(value, Tensor):
            found[name] = value
    if not found:
        what = f"with the keys {', '.join(map(str, list(loaded)[:6]))}" if isinstance(loaded, Mapping) else ""
        raise AtlasError(
            f"{path} holds a {type(loaded).__name__} {what}, and no state dict. Save model.state_dict(), bare or under "
            f"one of {', '.join(WRAPPERS)}."
        )
    return found


def fitted(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the first part of all its names taken off (`model.`, `net.`, `backbone.`) where only so they fit."""
    first = {name.partition(".")[0] for name in state}
    if len(first) == 1 and not set(state) & set(own):
        bare = {name.partition(".")[2]: value for name, value in state.items()}
        if set(bare) & set(own):
            log.info("the checkpoint's names begin with %s., which the network's do not: taken off", *first)
            return bare
    return state


def _read(path: Path, trust: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            # torch.load says of a TorchScript archive that it is one; what follows says more.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        # Unpicklers raise almost anything on a file that is not theirs.
        reason = first_line(error)
        if not trust and ("weights_only" in str(error) or "Unsupported" in str(error) or "WeightsUnpickler" in reason):
            raise AtlasError(
                f"{path} can't be read as weights only: it holds Python objects, and to load those is to run code. "
                "If you trust whoever made it: model.trust_checkpoint=true. Else save model.state_dict() and use that."
            ) from error
        raise AtlasError(f"{path} can't be read as a checkpoint: {type(error).__name__}: {reason}") from error
