"""A preset of `conf/render/`: what is excited, on what canvas, how it is shaken, what is discouraged, and how long."""

import dataclasses
from collections.abc import Mapping

from pipeline.core.errors import AtlasError
from pipeline.core.registry import registered_name
from pipeline.layers.finding import Layer
from pipeline.visualization.batch_terms import BatchTerm
from pipeline.visualization.gradient_preconditioners import BlurGradient, Preconditioner
from pipeline.visualization.image_regularizers import ImageRegularizer
from pipeline.visualization.network_perturbations import NetworkPerturbation
from pipeline.visualization.objectives import LayerInfo, Objective, parse
from pipeline.visualization.optimizers import Optimizer
from pipeline.visualization.parameterizations import FromImage, Parameterization
from pipeline.visualization.schedules import Fixed, Stage, Stop
from pipeline.visualization.schedules import check as check_schedule
from pipeline.visualization.transforms import Transform

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One preset.

    `size` is the finished picture's side in pixels, (height, width), `auto` or `field` (see `canvas_size`);
    `margin` the pixels of canvas beyond each edge. `variants` pictures are made of each unit. With `negative` the
    objective is lowered.
    """

    name: str
    objective: Objective
    canvas: Parameterization
    transforms: tuple[Transform, ...]
    optimizer: Optimizer
    steps: int
    size: int | tuple[int, int] | str = "auto"
    margin: int = 24
    variants: int = 1
    attempts: int = 3
    negative: bool = False
    penalties: tuple[ImageRegularizer, ...] = ()
    preconditioners: tuple[Preconditioner, ...] = ()
    augmentations: tuple[NetworkPerturbation, ...] = ()
    couplings: tuple[BatchTerm, ...] = ()
    schedule: tuple[Stage, ...] = ()
    stop: Stop = Fixed()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The schedule, or the one plain stage that stands for none."""
        return self.schedule or (Stage(),)

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the layers that it looks at besides the unit's own."""
        named = [parse(unit)[0] for unit in self.objective.units]
        named += [layer for c in self.couplings if (layer := getattr(c, "layer", None))]
        named += [stage.layer for stage in self.stages if stage.layer]
        return tuple(dict.fromkeys(named))

    @property
    def requires_original_weights(self) -> bool:
        """True where steps need the network's own weights: noise on them is none on a lowered network's."""
        return bool(self.augmentations)

    @property
    def natural(self) -> str:
        """The dataset statistic that measures photographs as the objective does; empty where there is none.

        Over photographs, the largest spatial `mean` or `max`; of a negative, the `least` mean or the `min`.
        """
        if self.objective.natural is None:
            return ""
        return {"mean": "least", "max": "min"}[self.objective.natural] if self.negative else self.objective.natural

    @property
    def needs_examples(self) -> bool:
        """True where a unit's picture starts from its own best dataset example."""
        return isinstance(self.canvas, FromImage) and self.canvas.best


def check(config: Preset, channels: int) -> None:
    """Raise `AtlasError` for a preset that makes no sense for any layer of a network of `channels` input channels."""
    config.canvas.check(channels)
    config.optimizer.check()
    check_schedule(config.schedule)
    for augmentation in config.augmentations:
        augmentation.check()
    canvas = registered_name(config.canvas)
    if any(max(stage.blur) > 0 for stage in config.stages) and not config.canvas.can_blur:
        raise AtlasError(
            f"render.schedule blurs the picture, which the {canvas} canvas can't: its amplitudes are fixed."
        )
    if len({stage.canvas for stage in config.stages}) > 1 and not config.canvas.can_grow:
        raise AtlasError(f"render.schedule changes the canvas's size, which the {canvas} canvas can't.")
    if config.couplings and config.variants < 2:
        raise AtlasError("render.couplings need render.variants of at least 2: they compare the pictures of one unit.")
    if any(stage.gradient_blur for stage in config.stages) and not any(
        isinstance(p, BlurGradient) for p in config.preconditioners
    ):
        raise AtlasError("render.schedule has gradient_blur, but render.preconditioners has no blur to follow it.")
    if isinstance(config.canvas, FromImage) and channels not in (1, 3):
        raise AtlasError(f"render/canvas=image begins with a picture of 1 or 3 channels; the network takes {channels}.")
    if any(p.anchored for p in config.penalties) and not isinstance(config.canvas, FromImage):
        raise AtlasError("The prior penalty pulls back to a photograph: it needs render/canvas=image.")


def check_layer(config: Preset, layer: Layer, others: Mapping[str, Layer], classifier: bool) -> None:
    """Raise `AtlasError` for a preset that makes no sense for `layer`; `others` are all layers of the network."""
    widths = {name: other.channels for name, other in others.items()}
    config.objective.check(LayerInfo(layer.name, layer.channels, classifier, widths, config.variants))
    for coupling in config.couplings:
        named = getattr(coupling, "layer", None)
        if named and named not in widths:
            raise AtlasError(f"render.couplings: there is no layer {named!r}; `atlas plan layers=all` lists them.")
    for stage in config.stages:
        if stage.layer is None:
            continue
        if stage.layer not in widths:
            raise AtlasError(
                f"render.schedule asks for a head {stage.layer!r} that this network does not have. Use a network that "
                "has it (model=googlenet_aux for oygard), or the same schedule without heads (render/schedule=blur)."
            )
        if widths[stage.layer] != layer.channels:
            raise AtlasError(
                f"render.schedule: {stage.layer} has {widths[stage.layer]} channels and {layer.name} {layer.channels}; "
                "a schedule over heads needs layers=logits, and heads for the same classes."
            )


def canvas_size(layer: Layer, model_size: Size, asked: int | tuple[int, int] | str) -> Size:
    """(height, width) of the finished picture in pixels.

    `auto` gives a layer what one of its units sees: features have a size in pixels, and the time of a step grows with
    the area. In steps of 32 pixels, never under 128 (where a unit sees less, its channel's mean becomes a texture) and
    never over six sevenths of the network's own size: 192 of 224. Where units see everything, 8 × the stride stands
    for their field. Small networks, and maps of one place, keep the network's own size. `field` is the receptive field
    of one unit itself, at least 32 and at most the network's own size.
    """
    if isinstance(asked, int):
        return asked, asked
    if not isinstance(asked, str):
        return asked
    if asked == "field":
        if layer.field is None:
            return model_size
        return min(model_size[0], max(32, layer.field.size[0])), min(model_size[1], max(32, layer.field.size[1]))
    stride = max(1, round(min(model_size) / max(1, min(layer.height, layer.width))))
    if min(layer.height, layer.width) == 1:
        return model_size
    seen = 8 * stride if layer.field is None else max(layer.field.size)
    most = min(model_size) * 6 // 7 // 32 * 32
    side = min(min(model_size), max(128, min(most, -(-seen // 32) * 32)))
    # A network of other than square input keeps its proportions.
    return round(model_size[0] * side / min(model_size)), round(model_size[1] * side / min(model_size))
