"""What of a request this network can do: everything that makes no sense is refused before any work."""

import dataclasses
import logging
from collections.abc import Sequence

import torch

from pipeline.config.schema import Config
from pipeline.core.errors import AtlasError, first_line
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model, load_other
from pipeline.visualization import preset as presets
from pipeline.visualization.initial_images import opened
from pipeline.visualization.network_perturbations import Ensemble
from pipeline.visualization.objectives import Direction, Objective
from pipeline.visualization.parameterizations import FromImage
from pipeline.visualization.preset import Preset, Size, canvas_size

log = logging.getLogger(__name__)


def with_labels(model: Model, heads: Sequence[Layer], given: bool) -> Model:
    """Return `model` with its class names where one of the `heads`, the layers of logits, has as many channels.

    Names that come with a library's network are dropped where its head is another one. Raises `AtlasError` for names
    `given` by the user that no head has room for.
    """
    if any(layer.channels == len(model.labels) for layer in heads):
        return model
    if given and not heads:
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {model.name} has no classifier: no layer gives its "
            "output. Leave model.labels null."
        )
    if given:
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {heads[-1].name} has {heads[-1].channels} outputs: "
            "one name each, in their order."
        )
    return dataclasses.replace(model, labels=())


def channels_to_render(layer: Layer, asked: tuple[int, ...], config: Config) -> tuple[int, ...]:
    """Channel numbers of a layer that get pictures: those `asked` for that the objectives have something to say to.

    Raises `AtlasError` where the presets of a run have it about different channels.
    """
    found = {preset.name: _told_of(preset.objective, asked) for preset in config.presets}
    main = found[config.render.name]
    for name, own in found.items():
        if own != main:
            raise AtlasError(
                f"also={name} is about {len(own)} channels of {layer.name}, {config.render.name} about {len(main)}: "
                "give it a run of its own."
            )
    return main


def _told_of(objective: Objective, asked: tuple[int, ...]) -> tuple[int, ...]:
    if objective.whole:
        return asked[:1]
    if isinstance(objective, Direction):
        return tuple(c for c in asked if c < len(objective.rows))
    return asked


def validate_request(
    config: Config, model: Model, candidates: Sequence[Layer], chosen: Sequence[Layer], heads: Sequence[Layer]
) -> tuple[Layer, ...]:
    """The layers that the presets look at besides a unit's own; `AtlasError` for a combination without sense.

    `heads` are the layers that hold logits.
    """
    known = {layer.name: layer for layer in candidates}
    classifiers = {layer.name for layer in heads}
    for preset in config.presets:
        try:
            presets.check(preset, model.recipe.channels)
            if isinstance(preset.canvas, FromImage) and not preset.canvas.best:
                opened(preset.canvas.source, model.recipe.channels)
            for file in (f for a in preset.augmentations if isinstance(a, Ensemble) for f in a.checkpoints):
                load_other(config.model, file)
            for layer in chosen:
                presets.check_layer(preset, layer, known, layer.name in classifiers)
        except AtlasError as error:
            if preset is config.render:
                raise
            raise AtlasError(f"also={preset.name}: {error}") from None
    return tuple(known[name] for name in dict.fromkeys(n for preset in config.presets for n in preset.others))


def choose_canvas_sizes(model: Model, chosen: Sequence[Layer], preset: Preset) -> dict[str, Size]:
    """The size of each layer's canvas: what the preset asks for, if the network takes it, else its own input size.

    Transformers and others take one size only; an explicit `render.size` that they can't take is an error, as is
    a schedule that shows them other sizes.
    """
    own, stages = model.recipe.size, preset.stages
    wanted = {layer.name: canvas_size(layer, own, preset.size) for layer in chosen}

    def views(size: Size) -> set[Size]:
        shares = {stage.canvas if stage.view is None else stage.view for stage in stages}
        return {(round(size[0] * s), round(size[1] * s)) for s in shares} | {size}

    for size in sorted(set().union(*(views(size) for size in wanted.values())) - {own}):
        try:
            with torch.no_grad():
                model.module(model.normalise(torch.zeros(1, model.recipe.channels, *size)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Networks refuse a size with whatever error their code raises: a shape, an assertion, a value.
            asked = preset.size
            if not isinstance(asked, str):
                raise AtlasError(
                    f"render.size={asked}: {model.name} does not take pictures of {size[0]} x {size[1]} pixels "
                    f"({first_line(error)}). Use render.size=auto or {_side(own)}."
                ) from error
            if views(own) != {own}:
                raise AtlasError(
                    f"{model.name} takes one size of picture only: render/schedule can't change it."
                ) from None
            log.info(
                "canvases are %d x %d pixels: %s does not take %d x %d (%s: %s)", *own, model.name, *size,
                type(error).__name__, first_line(error),
            )  # fmt: skip
            return dict.fromkeys(wanted, own)
    return wanted


def _side(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
