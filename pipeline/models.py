"""Load a network by name or file, make it safe to look at, and say how its input is made.

A `Model` is in eval mode, frozen, without in-place activations, and carries its input recipe and a digest
of its weights. Everything downstream trusts these four things.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipeline.checkpoints import load_checkpoint
from pipeline.custom import code_digest
from pipeline.errors import AtlasError, first_line, nearest
from pipeline.recipes import INTERPOLATIONS, ModelConfig, Recipe
from pipeline.sources import SOURCES

log = logging.getLogger(__name__)

# Marks modules whose in-place activation was switched off.
_WAS_IN_PLACE = "_was_in_place"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network ready to be looked at."""

    module: nn.Module
    name: str
    recipe: Recipe
    digest: str
    labels: tuple[str, ...]

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] → the values that the network was trained on."""
        low, high = self.recipe.value_range
        if (low, high) != (0.0, 1.0):
            images = images * (high - low) + low
        # By rows of pixels whose colours lie together: ten times as fast as numbers that are told apart pixel by pixel.
        rows = images.permute(0, 2, 3, 1).flatten(2)
        mean, std = (images.new_tensor(v).repeat(images.shape[-1]) for v in (self.recipe.mean, self.recipe.std))
        return (rows - mean).div_(std).unflatten(2, (images.shape[-1], -1)).permute(0, 3, 1, 2)

    def to(self, device: torch.device | str) -> "Model":
        """The same model on `device`, its convolutions channels-last, which is faster on CPU and GPU alike."""
        module = self.module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return dataclasses.replace(self, module=module)


def load(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> Model:
    """The network that `config` names, eval, frozen and with in-place activations switched off.

    `state` takes the place of its weights: nothing is read or downloaded then.

    Raises `AtlasError` for an unknown source or name, a missing file, or weights that do not fit.
    """
    if config.source not in SOURCES:
        raise AtlasError(f"model.source={config.source!r} is unknown. {nearest(config.source, SOURCES)}")
    if config.interpolation not in (None, *INTERPOLATIONS):
        raise AtlasError(
            f"model.interpolation={config.interpolation!r} is unknown. {nearest(config.interpolation, INTERPOLATIONS)}"
        )
    if state is not None:
        # Built like a network whose weights are a file of the user's own, except that no file is read.
        config = dataclasses.replace(config, weights="sent by the driver")
    # Random weights must be the same on every worker, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, recipe, labels = SOURCES[config.source](config)
    module = prepare(module)
    if (config.arguments or {}).get("aux_logits") is True:
        # torchvision runs auxiliary heads in training only. This flag of the top module alone, whose own forward
        # looks at it, runs them here too; all modules below stay in eval mode.
        module.training = True
    if state is not None:
        module.load_state_dict(state)
    elif config.own_weights is not None:
        load_checkpoint(module, config.own_weights, config.trust_checkpoint, config.strict)
    if not any(True for _ in module.parameters()):
        raise AtlasError(f"{config.name} has no weights, so there is nothing to look at.")
    if isinstance(config.labels, str):
        labels = read_labels(config.locate(config.labels))
    elif config.labels is not None:
        labels = config.labels
    digest = weights_digest(module)
    if config.source == "custom":
        digest = hashlib.sha256(f"{digest} {code_digest(config, module)}".encode()).hexdigest()
    return Model(module, config.name, with_overrides(recipe, config), digest, labels)


def with_overrides(recipe: Recipe, config: ModelConfig) -> Recipe:
    """The network's own recipe with what the configuration says instead; `AtlasError` where that makes no sense."""
    size = config.input_size
    pair = (size, size) if isinstance(size, int) else size
    # The user's own network sees the whole of a picture; the usual ones are evaluated on its middle 7/8.
    share = 1.0 if config.source == "custom" else 0.875
    overrides: dict[str, Any] = {
        "size": pair,
        "resize": config.resize or (round(min(pair) / share) if pair else None),
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
        "value_range": config.value_range,
    }
    recipe = dataclasses.replace(recipe, **{k: v for k, v in overrides.items() if v is not None})
    channels = config.channels or len(recipe.mean)
    if channels < 1 or not len(recipe.mean) == len(recipe.std) == channels:
        raise AtlasError(
            f"model.channels={channels}, but model.mean has {len(recipe.mean)} values and model.std {len(recipe.std)}: "
            "one a channel each."
        )
    if min(recipe.size) < 1 or recipe.resize < 1:
        raise AtlasError(f"model.input_size={config.input_size} and model.resize={config.resize} must be above 0.")
    if min(recipe.std) <= 0:
        raise AtlasError(f"model.std={list(recipe.std)}: every value must be above 0.")
    if recipe.value_range[0] >= recipe.value_range[1]:
        raise AtlasError(f"model.value_range={list(recipe.value_range)}: black comes first, then white, as in [0,255].")
    return recipe


def prepare(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients for weights, no in-place activation, no randomness, 32-bit floats.

    In-place activations overwrite what a hook on the module before has captured (captum#156).
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise AtlasError(f"{name} has no size yet: run the lazy network once on an input, in its builder.")
    module.eval().float().requires_grad_(False)
    for child in module.modules():
        # Some networks override `train` to keep their dropout on, or miss modules of theirs.
        child.training = False
        if getattr(child, "inplace", False) is True:
            child.inplace = False  # type: ignore[assignment]
            setattr(child, _WAS_IN_PLACE, True)
    return module


@contextlib.contextmanager
def in_place(model: Model) -> Iterator[None]:
    """Activations overwrite what they read, as the network's author had it: a tenth faster, for who keeps no map.

    They are as before on exit. For copies (`fold`) as well as for what `load` gave.
    """
    found = [module for module in model.module.modules() if getattr(module, _WAS_IN_PLACE, False)]
    try:
        for module in found:
            module.inplace = True  # type: ignore[assignment]
        yield
    finally:
        for module in found:
            module.inplace = False  # type: ignore[assignment]


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names, one a line of a text file, or a JSON list, or a JSON object from class number to name.

    The object's values may be pairs of an identifier and a name, as in ImageNet's class index.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return tuple(line.strip() for line in text.splitlines() if line.strip())
        loaded = json.loads(text)
        if isinstance(loaded, dict):
            loaded = [loaded[key] for key in sorted(loaded, key=int)]
        return tuple(str(name[-1] if isinstance(name, list) else name) for name in loaded)
    except (OSError, ValueError, TypeError) as error:
        raise AtlasError(
            f"model.labels={path} can't be read: {first_line(error)}. One name a line, or a JSON list."
        ) from error


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all tensors of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packed_weights(config: ModelConfig) -> bytes | None:
    """The weights of a network as safetensors, to be sent to workers; None for random ones, which a seed gives."""
    if config.weights is None and config.checkpoint is None:
        return None
    from safetensors.torch import save

    return save({name: tensor.clone().contiguous() for name, tensor in load(config).module.state_dict().items()})
