"""Validation of a request against the network, before any work starts."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch

from pipeline.config.schema import Config
from pipeline.core.errors import AtlasError, first_line
from pipeline.images.parameterizations import FromImage
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model, load_ensemble_member
from pipeline.visualization import preset as presets
from pipeline.visualization.initial_images import decode_source, preprocess_photograph
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.objectives import Direction, Objective
from pipeline.visualization.preset import Preset, Size, canvas_size

log = logging.getLogger(__name__)


def with_labels(model: Model, heads: Sequence[Layer], user_labels: bool) -> Model:
    """Return `model` with its class names if one of its layers of logits has as many channels.

    Names that come with a library's network are dropped if its head was replaced.

    Args:
        model: The network with its class names.
        heads: Layers of logits.
        given: Whether the names were set by the user.

    Raises:
        AtlasError: If the number of the user's names differs from the number of outputs.
    """
    if any(layer.channels == len(model.labels) for layer in heads):
        return model
    if user_labels and not heads:
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {model.name} has no classifier: no layer gives its "
            "output. Leave model.labels null."
        )
    if user_labels:
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {heads[-1].name} has {heads[-1].channels} outputs: "
            "give one name for each output, in their order."
        )
    return dataclasses.replace(model, labels=())


def channels_to_render(layer: Layer, requested: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """Return the requested channels of `layer` that the presets of the run can visualize.

    Args:
        layer: The layer.
        asked: Requested channels.
        config: The configuration of the run.

    Raises:
        AtlasError: If two presets select different channels; they need separate runs.
    """
    by_preset = {preset.name: _channels_of_objective(preset.objective, requested) for preset in config.presets}
    main = by_preset[config.render.name]
    for name, channels in by_preset.items():
        if channels != main:
            raise AtlasError(
                f"also={name} visualizes {len(channels)} channels of {layer.name}, {config.render.name} {len(main)}: "
                f"put {name} into a separate run."
            )
    return main


def _channels_of_objective(objective: Objective, requested: tuple[int, ...]) -> tuple[int, ...]:
    """Return one channel for an objective of the whole layer, and one per row for directions."""
    if objective.per_layer:
        return requested[:1]
    if isinstance(objective, Direction):  # not `Directions`, which is of the layer
        return tuple(channel for channel in requested if channel < len(objective.rows))
    return requested


def validate_request(
    config: Config, model: Model, candidates: Sequence[Layer], chosen: Sequence[Layer], heads: Sequence[Layer]
) -> tuple[Layer, ...]:
    """Check every preset against the network and the layers of the plan.

    Args:
        config: The configuration of the run.
        model: The network.
        candidates: All layers of the network.
        chosen: Layers of the plan.
        heads: Layers of logits.

    Returns:
        The layers that presets use besides the unit's own.

    Raises:
        AtlasError: If a preset can't be used with this network or one of the layers.
    """
    by_name = {layer.name: layer for layer in candidates}
    classifiers = {layer.name for layer in heads}
    for preset in config.presets:
        try:
            _validate_preset(preset, config, model)
            for layer in chosen:
                presets.check_layer(preset, layer, by_name, layer.name in classifiers)
        except AtlasError as error:
            if preset is config.render:
                raise
            raise AtlasError(f"also={preset.name}: {error}") from None
    names = dict.fromkeys(name for preset in config.presets for name in preset.others)
    return tuple(by_name[name] for name in names)


def _validate_preset(preset: Preset, config: Config, model: Model) -> None:
    """Check a preset against the network: settings, image files and checkpoints."""
    presets.check(preset, model.preprocessing.channels)
    if isinstance(preset.canvas, FromImage) and not preset.canvas.best:
        decode_source(preset.canvas, model.preprocessing)
    if preset.objective.target_image is not None:
        preprocess_photograph(preset.objective.target_image, model.preprocessing, "render.objective.target")
    for perturbation in preset.augmentations:
        if isinstance(perturbation, Ensemble):
            for file in perturbation.checkpoints:
                load_ensemble_member(config.model, file)


def choose_canvas_sizes(model: Model, chosen: Sequence[Layer], preset: Preset) -> dict[str, Size]:
    """Return the canvas size (height, width) of each layer: the preset's if the network accepts it.

    Networks with one input size, such as many transformers, get that size for every layer.

    Args:
        model: The network.
        chosen: Layers to render.
        preset: The preset.

    Raises:
        AtlasError: If the network accepts neither an explicit `render.size` nor the sizes of `render.schedule`.
    """
    input_size = model.preprocessing.size
    sizes = {layer.name: canvas_size(layer, input_size, preset.size) for layer in chosen}
    tried = set().union(*(_stage_sizes(preset, size) for size in sizes.values()))
    for size in sorted(tried - {input_size}):
        error = _size_error(model, size)
        if error is None:
            continue
        if not isinstance(preset.size, str):
            raise AtlasError(
                f"render.size={preset.size}: {model.name} does not accept images of {size[0]} x {size[1]} pixels "
                f"({first_line(error)}). Use render.size=auto or {_size_setting(input_size)}."
            ) from error
        if _stage_sizes(preset, input_size) != {input_size}:
            raise AtlasError(
                f"{model.name} accepts images of {input_size[0]} x {input_size[1]} pixels only: remove the stages of "
                "render/schedule that change the size."
            )
        log.info(
            "All canvases have %d x %d pixels: %s does not accept %d x %d (%s: %s)",
            *input_size,
            model.name,
            *size,
            type(error).__name__,
            first_line(error),
        )
        return dict.fromkeys(sizes, input_size)
    return sizes


def display_sizes(model: Model, measured: Mapping[str, Size], config: Config) -> dict[str, Size]:
    """Return the canvas size (height, width) of the display images of each layer.

    It has the aspect ratio of the measured visualizations, and `display.size` as its longer side.

    Args:
        model: The network.
        measured: Canvas size of the measured visualizations of each layer.
        config: The configuration of the run.

    Raises:
        AtlasError: If the network does not accept images of such a size.
    """
    longest = config.display.size
    sizes = {
        name: (round(h * longest / max(h, w)), round(w * longest / max(h, w))) for name, (h, w) in measured.items()
    }
    for size in sorted(set(sizes.values())):
        error = _size_error(model, size)
        if error is not None:
            raise AtlasError(
                f"display.size={longest}: {model.name} does not accept images of {size[0]} x {size[1]} pixels "
                f"({first_line(error)}). Use display.units=null, or a size that it accepts."
            ) from error
    return sizes


def _stage_sizes(preset: Preset, size: Size) -> set[Size]:
    """Return the sizes that the network gets in the stages of a preset with a canvas of `size`."""
    shares = {stage.canvas if stage.view is None else stage.view for stage in preset.stages}
    return {(round(size[0] * share), round(size[1] * share)) for share in shares} | {size}


def _size_error(model: Model, size: Size) -> Exception | None:
    """Return the error of a forward pass with an image of `size`; None if the network accepts it."""
    try:
        with torch.no_grad():
            model.module(model.normalize(torch.zeros(1, model.preprocessing.channels, *size)))
    except Exception as error:
        if is_device_failure(error):
            raise
        # Networks refuse a size with whatever error their code raises: a shape, an assertion, a value.
        return error
    return None


def _size_setting(size: Size) -> str:
    """Return `size` as a value of `render.size`."""
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
