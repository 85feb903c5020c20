"""Load a network by name or file, with its preprocessing, and prepare it for hooks.

A `Model` is in eval mode, frozen and without in-place activations, and has a preprocessing and a digest of its weights.
The rest of the package relies on these properties.
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

from pipeline.core.config_files import ConfigFile, decode_text
from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.kernels.device_errors import is_device_failure
from pipeline.kernels.transfers import constant_like
from pipeline.models.checkpoints import StateDictSelector, load_checkpoint
from pipeline.models.config import INTERPOLATIONS, ModelConfig, Preprocessing
from pipeline.models.custom import code_digest
from pipeline.models.zoo import SOURCES

log = logging.getLogger(__name__)

# Attribute of modules whose in-place activation was disabled.
_WAS_IN_PLACE = "_was_in_place"


@dataclasses.dataclass(frozen=True)
class Model:
    """A network that is ready for feature visualization and for a pass over a dataset.

    Attributes:
        module: The network, prepared by `prepare_module`.
        name: Its name.
        preprocessing: Its preprocessing.
        digest: sha256 of its weights, and of its code for `source=custom`.
        labels: Class names in the order of its outputs; empty if unknown.
        channels_last: Whether the network supports inputs in the channels-last memory format.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    digest: str
    labels: tuple[str, ...]
    channels_last: bool = True

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.module.parameters()).device

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format that the network runs in. Channels-last is faster for convolutions."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images to the value range of the network and normalize them.

        Args:
            images: (B, C, H, W) in [0, 1].

        Returns:
            (B, C, H, W) in `memory_format`.
        """
        low, high = self.preprocessing.value_range
        if (low, high) != (0.0, 1.0):
            images = images * (high - low) + low
        # On rows (B, H, W × C) with mean and std repeated: ten times as fast as broadcasting over C per pixel.
        rows = images.permute(0, 2, 3, 1).flatten(2)
        recipe, width = self.preprocessing, images.shape[-1]
        mean, std = (constant_like(images, tuple(v) * width) for v in (recipe.mean, recipe.std))
        maps = (rows - mean).div_(std).unflatten(2, (images.shape[-1], -1)).permute(0, 3, 1, 2)
        return maps.contiguous(memory_format=self.memory_format)

    def to(self, device: torch.device | str) -> "Model":
        """Return the model on `device`, in channels-last memory format if the network supports it.

        A forward pass with `x.view(len(x), -1)` does not support it; such a network stays in contiguous format.
        """
        model = dataclasses.replace(self, module=self.module.to(device))
        for channels_last in (True, False):
            _set_format(model.module, channels_last)
            model = dataclasses.replace(model, channels_last=channels_last)
            if _forward_error(model) is None:
                return model
        return model  # the network does not accept its own input size; enumerating its layers reports the reason


def _set_format(module: nn.Module, channels_last: bool) -> None:
    """Convert the weights of two-dimensional convolutions to a memory format; other tensors have none."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for child in module.modules():
        for tensor in child._parameters.values() if isinstance(child, nn.modules.conv._ConvNd) else ():
            if tensor is not None and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=memory_format)


def _forward_error(model: Model) -> Exception | None:
    """Return the exception that the network raises for one black image of its own size, or None."""
    parameter = next(model.module.parameters())
    images = torch.zeros(1, model.preprocessing.channels, *model.preprocessing.size, device=parameter.device)
    try:
        with torch.no_grad():
            model.module(model.normalize(images).contiguous(memory_format=model.memory_format))
    except Exception as error:
        if is_device_failure(error):
            raise
        # The network may be the user's code, which can raise anything.
        return error
    return None


def load_model(config: ModelConfig, state: Mapping[str, Tensor] | None = None, content: bytes | None = None) -> Model:
    """Load a network and prepare it: eval mode, frozen, without in-place activations.

    Args:
        config: The network and its weights.
        state: A state dict that replaces the configured weights; nothing is read or downloaded then.
        content: Bytes of the checkpoint, if it was read before.

    Raises:
        AtlasError: If the source or name is unknown, a file is missing, or the weights do not fit.
    """
    if config.source not in SOURCES:
        raise AtlasError(f"model.source={config.source!r} is unknown. {nearest_names(config.source, SOURCES)}")
    if config.interpolation not in (None, *INTERPOLATIONS):
        raise AtlasError(
            f"model.interpolation={config.interpolation!r} is unknown. "
            f"{nearest_names(config.interpolation, INTERPOLATIONS)}"
        )
    if state is not None:
        # Any value other than "default" and None builds the network without downloading weights. No file is read.
        config = dataclasses.replace(config, weights="sent by the driver")
    # Random weights must be the same on every worker, whatever random numbers were drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, preprocessing, labels = SOURCES[config.source](config)
    refuse_quantized(module, config.name)
    double = any(parameter.dtype == torch.float64 for parameter in module.parameters())
    module = prepare_module(module)
    if (config.arguments or {}).get("aux_logits") is True:
        # torchvision runs auxiliary heads in training mode only. This flag of the top module, which its own forward
        # reads, enables them here too; all submodules stay in eval mode.
        module.training = True
    if state is not None:
        module.load_state_dict(state)
    elif config.checkpoint_path is not None:
        selector = StateDictSelector(config.checkpoint_key, config.checkpoint_prefix)
        load_checkpoint(module, config.checkpoint_path, config.trust_checkpoint, config.strict, selector, content)
    if not any(True for _ in module.parameters()):
        raise AtlasError(f"{config.name} has no parameters, so there is nothing to visualize.")
    if isinstance(config.labels, str):
        labels = read_labels(config.absolute_path(config.labels))
    elif config.labels is not None:
        labels = config.labels
    preprocessing = with_overrides(preprocessing, config)
    if double:
        _restore_double(Model(module, config.name, preprocessing, "", labels))
    digest = weights_digest(module)
    if config.source == "custom":
        digest = hashlib.sha256(f"{digest} {code_digest(config, module)}".encode()).hexdigest()
    return Model(module, config.name, preprocessing, digest, labels)


def _restore_double(model: Model) -> None:
    """Convert a network back to double precision if it needs it, as with `x.double()` in its forward pass."""
    if _forward_error(model) is None:
        return
    model.module.double()
    if _forward_error(model) is not None:
        model.module.float()


def refuse_quantized(module: nn.Module, name: str) -> None:
    """Check that a network has no quantized modules or weights, which do not propagate gradients.

    Raises:
        AtlasError: If it has any.
    """
    places = ("nn.quantized", "nn.intrinsic.quantized", "torchao.")
    for path, child in module.named_modules():
        tensors = [t for t in (*child._parameters.values(), *child._buffers.values()) if t is not None]
        quantized = any(t.is_quantized or type(t).__module__.startswith("torchao") for t in tensors)
        if quantized or any(place in type(child).__module__ for place in places):
            raise AtlasError(
                f"{name} is quantized: {path or 'it'} is a {type(child).__name__}, which does not propagate gradients. "
                "Use the floating-point network from before the conversion by torch.ao.quantization or a similar tool."
            )


def load_ensemble_member(config: ModelConfig, file: ConfigFile) -> Model:
    """Load the network with the weights of another checkpoint, for an ensemble.

    Args:
        config: The network. `checkpoint_key`, `checkpoint_prefix` and `strict` apply to the other checkpoint too.
        file: The other checkpoint, with its content.

    Raises:
        AtlasError: If the weights do not fit.
    """
    assert file.content is not None, f"{file.path} was not read"
    try:
        return load_model(dataclasses.replace(config, checkpoint=file.path), content=file.content)
    except AtlasError as error:
        keys = ("checkpoint_key", "checkpoint_prefix")
        settings = [f"model.{key}" for key in keys if getattr(config, key) is not None]
        note = f" {' and '.join(settings)} also applies to the checkpoints of the ensemble." if settings else ""
        raise AtlasError(f"render.augmentations.ensemble.checkpoints: {error}{note}") from error


def with_overrides(preprocessing: Preprocessing, config: ModelConfig) -> Preprocessing:
    """Return the network's own preprocessing with the settings of the configuration applied.

    Raises:
        AtlasError: If the settings contradict each other or are out of range.
    """
    size = config.input_size
    pair = (size, size) if isinstance(size, int) else size
    # The user's network gets the whole image. Networks of the zoo are evaluated on the central 7/8.
    crop_ratio = 1.0 if config.source == "custom" else 0.875
    overrides: dict[str, Any] = {
        "size": pair,
        "resize": config.resize or (round(min(pair) / crop_ratio) if pair else None),
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
        "value_range": config.value_range,
    }
    preprocessing = dataclasses.replace(preprocessing, **{k: v for k, v in overrides.items() if v is not None})
    channels = config.channels or len(preprocessing.mean)
    if channels < 1 or not len(preprocessing.mean) == len(preprocessing.std) == channels:
        raise AtlasError(
            f"model.channels={channels}, but model.mean has {len(preprocessing.mean)} values and model.std "
            f"{len(preprocessing.std)}. Each must have one value per channel."
        )
    if min(preprocessing.size) < 1 or preprocessing.resize < 1:
        raise AtlasError(f"model.input_size={config.input_size} and model.resize={config.resize} must be above 0.")
    if min(preprocessing.std) <= 0:
        raise AtlasError(f"model.std={list(preprocessing.std)}: every value must be above 0.")
    if preprocessing.value_range[0] >= preprocessing.value_range[1]:
        raise AtlasError(
            f"model.value_range={list(preprocessing.value_range)}: the value of black must be below that of white, as "
            "in [0,255]."
        )
    return preprocessing


def prepare_module(module: nn.Module) -> nn.Module:
    """Prepare a network in place: eval mode, float32, frozen weights, no in-place activations, no dropout.

    An in-place activation overwrites the tensor that a hook on the preceding module captured (captum#156).

    Returns:
        The same module.

    Raises:
        AtlasError: If the network has lazy parameters without a size.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise AtlasError(f"{name} has no size yet. Run the lazy network once on an input, in its builder.")
    module.eval().float().requires_grad_(False)
    for child in module.modules():
        # Some networks override `train` to keep their dropout active, or do not reach all of their modules.
        child.training = False
        if getattr(child, "inplace", False) is True:
            child.inplace = False  # type: ignore[assignment]
            setattr(child, _WAS_IN_PLACE, True)
    return module


@contextlib.contextmanager
def inplace_activations(model: Model) -> Iterator[None]:
    """Context manager that enables in-place activations where the network's author used them.

    The forward pass is a tenth faster. Only for callers that do not keep activation maps. Works for copies of a model,
    such as folded ones, too.
    """
    modules = [module for module in model.module.modules() if getattr(module, _WAS_IN_PLACE, False)]
    try:
        for module in modules:
            module.inplace = True  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            module.inplace = False  # type: ignore[assignment]


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names from a text or JSON file.

    Args:
        path: A text file with one name per line, or JSON: a list of names, an object from class number to name, or one
            from name to number, such as `class_to_idx` of torchvision's datasets. In JSON a name may be a pair
            [identifier, name], as in ImageNet's class index.

    Returns:
        The names by class number.

    Raises:
        AtlasError: If the file cannot be read, or its names are empty, ambiguous or incomplete.
    """
    where = f"model.labels={path}"
    try:
        text = decode_text(path.read_bytes(), where)
        if path.suffix.lower() != ".json":
            names = tuple(line.strip() for line in text.splitlines() if line.strip())
        else:
            loaded = json.loads(text, object_pairs_hook=_without_duplicates)
            entries = _sorted_names(loaded) if isinstance(loaded, dict) else loaded
            if not isinstance(entries, list):
                raise ValueError(f"it holds a {type(loaded).__name__}")
            names = tuple(_label(entry) for entry in entries)
    except (OSError, ValueError) as error:
        raise AtlasError(
            f"{where} can't be read: {first_line(error)}. It must have one name per line, or be a JSON list of names "
            "or a JSON object from number to name or from name to number."
        ) from error
    if not names:
        raise AtlasError(f"{where} holds no names. Write one name per line, in the order of the classifier's outputs.")
    return names


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise `ValueError` for duplicate keys, which `json` accepts by default."""
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise ValueError(f"the key {key!r} occurs twice")
        mapping[key] = value
    return mapping


def _sorted_names(mapping: dict[str, Any]) -> list[Any]:
    """Return the names of a JSON object by their numbers, which must run from 0 without gaps or repetitions."""
    values_are_numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in mapping.values())
    try:
        if values_are_numbers:
            pairs = [(int(value), key) for key, value in mapping.items()]
        else:
            pairs = [(int(key), value) for key, value in mapping.items()]
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
            f"the numbers of its {len(names)} names must run from 0 to {len(names) - 1}: it lacks "
            f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''} and has "
            f"{', '.join(map(str, outside[:5]))}{', …' if len(outside) > 5 else ''}"
        )
    return [names[number] for number in range(len(names))]


def _label(entry: Any) -> str:
    """Return a name, or the name of a pair [identifier, name]."""
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    if isinstance(entry, bool) or not isinstance(entry, (str, int, float)):
        raise ValueError(f"{json.dumps(entry, ensure_ascii=False)[:40]} is not a name")
    return str(entry)


def weights_digest(module: nn.Module) -> str:
    """Return the sha256 of the names, dtypes, shapes and bytes of all tensors of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialize_weights(config: ModelConfig) -> bytes | None:
    """Return the weights of a network as safetensors, to send to workers.

    Random weights are reproducible from a seed, so None is returned for them.
    """
    if config.weights is None and config.checkpoint is None:
        return None
    from safetensors.torch import save

    return save({name: tensor.clone().contiguous() for name, tensor in load_model(config).module.state_dict().items()})
