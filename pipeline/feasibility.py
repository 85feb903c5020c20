"""What of a request this network can do: everything that makes no sense is refused before any work."""

from collections.abc import Sequence

import torch

from pipeline import presets
from pipeline.canvases import Start
from pipeline.config import Config
from pipeline.errors import AtlasError, first_line
from pipeline.layers import Layer
from pipeline.models import Model
from pipeline.objectives import Direction
from pipeline.policies import channels_of
from pipeline.presets import Size, canvas_size
from pipeline.starts import opened


def check_labels(model: Model, logits: Sequence[Layer]) -> None:
    """Raise `AtlasError` where the labels that the user gave are not as many as the classifier's outputs."""
    if all(layer.channels != len(model.labels) for layer in logits):
        raise AtlasError(
            f"model.labels has {len(model.labels)} names, but {logits[-1].name} has {logits[-1].channels} outputs: "
            "one name each, in their order."
        )


def units_of(layer: Layer, config: Config) -> tuple[int, ...]:
    """Channel numbers of a layer that get pictures: those asked for that the objective has something to say to."""
    asked = channels_of(layer, config.layers.channels)
    objective = config.render.objective
    if objective.whole:
        return asked[:1]
    if isinstance(objective, Direction):
        return tuple(c for c in asked if c < len(objective.rows))
    return asked


def refuse_nonsense(
    config: Config, model: Model, candidates: Sequence[Layer], chosen: Sequence[Layer], heads: Sequence[Layer]
) -> tuple[Layer, ...]:
    """The layers that the preset looks at besides a unit's own; `AtlasError` for a combination without sense.

    `heads` are the layers that hold logits.
    """
    known = {layer.name: layer for layer in candidates}
    classifiers = {layer.name for layer in heads}
    presets.check(config.render, model.recipe.channels)
    if isinstance(config.render.canvas, Start) and not config.render.canvas.best:
        opened(config.render.canvas.source, model.recipe.channels)
    for layer in chosen:
        presets.check_layer(config.render, layer, known, layer.name in classifiers)
    return tuple(known[name] for name in config.render.others)


def fitting(model: Model, chosen: Sequence[Layer], config: Config) -> dict[str, Size]:
    """The size of each layer's canvas: what was asked for, if the network takes it, else its own input size.

    Transformers and others take one size only; an explicit `render.size` that they can't take is an error, as is
    a schedule that shows them other sizes.
    """
    own, stages = model.recipe.size, config.render.stages
    wanted = {layer.name: canvas_size(layer, own, config.render.size) for layer in chosen}

    def views(size: Size) -> set[Size]:
        shares = {stage.canvas if stage.view is None else stage.view for stage in stages}
        return {(round(size[0] * s), round(size[1] * s)) for s in shares} | {size}

    for size in sorted(set().union(*(views(size) for size in wanted.values())) - {own}):
        try:
            with torch.no_grad():
                model.module(model.normalise(torch.zeros(1, model.recipe.channels, *size)))
        except Exception as error:
            asked = config.render.size
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
