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

from pipeline.core.config_files import ConfigFile, decoded
from pipeline.core.errors import AtlasError, first_line, nearest
from pipeline.models.checkpoints import Choice, load_checkpoint
from pipeline.models.config import INTERPOLATIONS, ModelConfig, Preprocessing
from pipeline.models.custom import code_digest
from pipeline.models.zoo import SOURCES

log = logging.getLogger(__name__)

# Marks modules whose in-place activation was switched off.
_WAS_IN_PLACE = "_was_in_place"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network ready to be looked at."""

    module: nn.Module
    name: str
    recipe: Preprocessing
    digest: str
    labels: tuple[str, ...]
    channels_last: bool = True  # whether the network takes images whose channels lie together in memory

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format in which the network is run; channels-last is the faster one for convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] → the values that the network was trained on."""
        low, high = self.recipe.value_range
        if (low, high) != (0.0, 1.0):
            images = images * (high - low) + low
        # By rows of pixels whose colours lie together: ten times as fast as numbers that are told apart pixel by pixel.
        rows = images.permute(0, 2, 3, 1).flatten(2)
        mean, std = (images.new_tensor(v).repeat(images.shape[-1]) for v in (self.recipe.mean, self.recipe.std))
        maps = (rows - mean).div_(std).unflatten(2, (images.shape[-1], -1)).permute(0, 3, 1, 2)
        return maps.contiguous(memory_format=self.memory_format)

    def to(self, device: torch.device | str) -> "Model":
        """Return the same model on `device`, its convolutions channels-last where the network runs so.

        A forward pass that ends in `x.view(len(x), -1)` does not: such networks stay as they are.
        """
        model = dataclasses.replace(self, module=self.module.to(device))
        for channels_last in (True, False):
            _set_format(model.module, channels_last)
            model = dataclasses.replace(model, channels_last=channels_last)
            if _error(model) is None:
                return model
        return model  # it does not take its own input at all; enumerating its layers says why


def _set_format(module: nn.Module, channels_last: bool) -> None:
    """Bring the weights of two-dimensional convolutions into a memory format; no other tensor has one."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    for child in module.modules():
        for tensor in child._parameters.values() if isinstance(child, nn.modules.conv._ConvNd) else ():
            if tensor is not None and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=wanted)


def _error(model: Model) -> Exception | None:
    """What the network raises for one black image of its own size, if anything."""
    parameter = next(model.module.parameters())
    images = torch.zeros(1, model.recipe.channels, *model.recipe.size, device=parameter.device)
    try:
        with torch.no_grad():
            model.module(model.normalise(images).contiguous(memory_format=model.memory_format))
    except Exception as error:
        # The network is the user's code, and may raise anything.
        return error
    return None


def load(config: ModelConfig, state: Mapping[str, Tensor] | None = None, content: bytes | None = None) -> Model:
    """The network that `config` names, eval, frozen and with in-place activations switched off.

    `state` takes the place of its weights: nothing is read or downloaded then. `content` is that of the checkpoint,
    where it was read before.

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
    refuse_quantized(module, config.name)
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    module = prepare(module)
    if (config.arguments or {}).get("aux_logits") is True:
        # torchvision runs auxiliary heads in training only. This flag of the top module alone, whose own forward
        # looks at it, runs them here too; all modules below stay in eval mode.
        module.training = True
    if state is not None:
        module.load_state_dict(state)
    elif config.own_weights is not None:
        choice = Choice(config.checkpoint_key, config.checkpoint_prefix)
        load_checkpoint(module, config.own_weights, config.trust_checkpoint, config.strict, choice, content)
    if not any(True for _ in module.parameters()):
        raise AtlasError(f"{config.name} has no weights, so there is nothing to look at.")
    if isinstance(config.labels, str):
        labels = read_labels(config.locate(config.labels))
    elif config.labels is not None:
        labels = config.labels
    recipe = with_overrides(recipe, config)
    if double:
        _restore_double(Model(module, config.name, recipe, "", labels))
    digest = weights_digest(module)
    if config.source == "custom":
        digest = hashlib.sha256(f"{digest} {code_digest(config, module)}".encode()).hexdigest()
    return Model(module, config.name, recipe, digest, labels)


def _restore_double(model: Model) -> None:
    """Give a network its double precision back where it does not run without, as with `x.double()` in its forward."""
    if _error(model) is None:
        return
    model.module.double()
    if _error(model) is not None:
        model.module.float()


def refuse_quantized(module: nn.Module, name: str) -> None:
    """Raise `AtlasError` for a network with quantized modules or weights, through which no gradient passes."""
    places = ("nn.quantized", "nn.intrinsic.quantized", "torchao.")
    for path, child in module.named_modules():
        tensors = [t for t in (*child._parameters.values(), *child._buffers.values()) if t is not None]
        quantized = any(t.is_quantized or type(t).__module__.startswith("torchao") for t in tensors)
        if quantized or any(place in type(child).__module__ for place in places):
            raise AtlasError(
                f"{name} is quantized: {path or 'it'} is a {type(child).__name__}, through which no gradient passes. "
                "Use the floating-point network that it was made from, before torch.ao.quantization or a like tool "
                "converted it."
            )


def load_other(config: ModelConfig, file: ConfigFile) -> Model:
    """The network with the weights of another checkpoint, of an ensemble; settings for the checkpoint hold for it too.

    Raises `AtlasError` where they do not fit, as for the network's own.
    """
    assert file.content is not None, f"{file.path} was not read"
    try:
        return load(dataclasses.replace(config, checkpoint=file.path), content=file.content)
    except AtlasError as error:
        chosen = [f"model.{key}" for key in ("checkpoint_key", "checkpoint_prefix") if getattr(config, key) is not None]
        also = f" {' and '.join(chosen)} also applies to the checkpoints of the ensemble." if chosen else ""
        raise AtlasError(f"render.augmentations.ensemble.checkpoints: {error}{also}") from error


def with_overrides(recipe: Preprocessing, config: ModelConfig) -> Preprocessing:
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
    """Class names, one a line of a text file, or JSON: a list, or an object from class number to name or back.

    A name may be a pair of an identifier and a name, as in ImageNet's class index. The object from name to number
    is `class_to_idx` of torchvision's datasets.
    """
    where = f"model.labels={path}"
    try:
        text = decoded(path.read_bytes(), where)
        if path.suffix.lower() != ".json":
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
        else:
            loaded = json.loads(text, object_pairs_hook=_once)
            listed = _in_order(loaded) if isinstance(loaded, dict) else loaded
            if not isinstance(listed, list):
                raise ValueError(f"it holds a {type(loaded).__name__}")
            names = tuple(_name(entry) for entry in listed)
    except (OSError, ValueError) as error:
        raise AtlasError(
            f"{where} can't be read: {first_line(error)}. One name a line, or a JSON list of names, or a JSON object "
            "from number to name or from name to number."
        ) from error
    if not names:
        raise AtlasError(f"{where} holds no names. Write one name a line, in the order of the classifier's outputs.")
    return names


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `ValueError` for a key that comes twice, which JSON's readers pass over."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _in_order(loaded: dict[str, Any]) -> list[Any]:
    """The names of an object in the order of their numbers, which run from 0 without gaps or repetitions."""
    backwards = all(isinstance(value, int) and not isinstance(value, bool) for value in loaded.values())
    try:
        pairs = [(int(value), key) if backwards else (int(key), value) for key, value in loaded.items()]
    except ValueError:
        raise ValueError("neither the keys nor the values of its object are all whole numbers") from None
    names: dict[int, Any] = {}
    for number, name in pairs:
        if number in names:
            raise ValueError(f"the number {number} belongs to {names[number]!r} and to {name!r}")
        names[number] = name
    outside = sorted(number for number in names if not 0 <= number < len(names))
    missing = [number for number in range(len(names)) if number not in names]
    if missing:
        raise ValueError(
            f"the numbers of {len(names)} names must run from 0 to {len(names) - 1}: it lacks "
            f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''} and has "
            f"{', '.join(map(str, outside[:5]))}{', …' if len(outside) > 5 else ''}"
        )
    return [names[number] for number in range(len(names))]


def _name(entry: Any) -> str:
    """A name, or the name of a pair of an identifier and a name."""
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    if isinstance(entry, bool) or not isinstance(entry, (str, int, float)):
        raise ValueError(f"{json.dumps(entry, ensure_ascii=False)[:40]} is not a name")
    return str(entry)


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
