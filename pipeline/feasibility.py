"""What of a request this network can do: everything that makes no sense is refused before any work."""

from collections.abc import Sequence

import torch

from pipeline import presets
from pipeline.augmentations import Ensemble
from pipeline.canvases import Start
from pipeline.config import Config
from pipeline.errors import AtlasError, first_line
from pipeline.layers import Layer
from pipeline.models import Model, load_other
from pipeline.objectives import Direction, Objective
from pipeline.presets import RenderConfig, Size, canvas_size
from pipeline.starts import opened


def check_labels(model: Model, logits: Sequence[Layer]) -> None:
    """Raise `AtlasError` where the labels that the user gave are not as many as the classifier's outputs."""
    if all(layer.channels != len(model.labels) for layer in logits):
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {logits[-1].name} has {logits[-1].channels} outputs: "
            "one name each, in their order."
        )


def units_of(layer: Layer, asked: tuple[int, ...], config: Config) -> tuple[int, ...]:
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


def refuse_nonsense(
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
            if isinstance(preset.canvas, Start) and not preset.canvas.best:
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


def fitting(model: Model, chosen: Sequence[Layer], preset: RenderConfig) -> dict[str, Size]:
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
        except Exception as error:
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
            return dict.fromkeys(wanted, own)
    return wanted


def _side(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]},{size[1]}]"
