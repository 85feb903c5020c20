"""Presets of `conf/render/`: the settings of a feature visualization, and their validation."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.errors import AtlasError
from pipeline.core.registry import ADDED_LATER, Member, Members, Registry, registered_name
from pipeline.core.units import Unit
from pipeline.core.validation import Keyed, Use
from pipeline.images.gradient_preconditioners import PRECONDITIONERS, BlurGradient, Preconditioner
from pipeline.images.image_regularizers import L2, PENALTIES, ImageRegularizer
from pipeline.images.parameterizations import CANVASES, FromImage, Parameterization
from pipeline.images.transforms import TRANSFORMS, Transform
from pipeline.layers.finding import Layer
from pipeline.layers.heads import HeadLayer
from pipeline.visualization.batch_terms import COUPLINGS, BatchTerm
from pipeline.visualization.layer_regularizers import LAYER_PENALTIES, LayerRegularizer
from pipeline.visualization.network_penalties import NETWORK_PENALTIES, NetworkPenalty
from pipeline.visualization.network_perturbations import AUGMENTATIONS, Ensemble, NetworkPerturbation
from pipeline.visualization.objectives import OBJECTIVES, Energy, LayerInfo, Objective
from pipeline.visualization.optimizers import OPTIMIZERS, Optimizer
from pipeline.visualization.schedules import STOPS, Fixed, Stage, Stop
from pipeline.visualization.schedules import check as check_schedule

Size = tuple[int, int]

# Side of a finished image in pixels.
Side = Annotated[int, Field(ge=16)]

# Channel and variant of an image of a layer.
ChannelVariant = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a feature visualization.

    Attributes:
        name: Name of the preset.
        objective: What is maximized.
        canvas: Parameterization of the image.
        transforms: Random transformations of every step, in this order.
        optimizer: Optimizer of the parameters.
        steps: Number of optimization steps.
        size: Size of the finished image in pixels: its side, (height, width), "auto", "field" or "input"; see
            `canvas_size`.
        margin: Width in pixels of the part of the canvas beyond each edge of the finished image.
        variants: Number of images for each unit.
        attempts: Maximum number of attempts for an image whose objective does not rise.
        negative: Minimize the objective instead.
        penalties: Image regularizers.
        preconditioners: Preconditioners of the gradient in pixel space, in this order.
        augmentations: Perturbations of the network.
        couplings: Terms over all variants of a unit.
        network_penalties: Penalties on the activations of the network; `for_layer` has those of a layer.
        schedule: Stages of the optimization; empty for a single stage with default settings.
        stop: Stopping rule.
        layer_penalties: Regularizers in the space of a layer.
    """

    name: str
    objective: Annotated[Objective, Member(OBJECTIVES)]
    canvas: Annotated[Parameterization, Member(CANVASES)]
    transforms: Annotated[tuple[Transform, ...], Members(TRANSFORMS)]
    optimizer: Annotated[Optimizer, Member(OPTIMIZERS)]
    steps: Annotated[int, Field(ge=1)]
    size: Annotated[
        Side | tuple[Side, Side] | Literal["auto", "field", "input"],
        Use("auto, field, input, or pixels from 16: a number or [height, width]"),
    ] = "auto"
    margin: Annotated[int, Field(ge=0)] = 24
    variants: Annotated[int, Field(ge=1)] = 1
    attempts: Annotated[int, Field(ge=1)] = 3
    negative: bool = False
    penalties: Annotated[tuple[ImageRegularizer, ...], Members(PENALTIES)] = ()
    preconditioners: Annotated[tuple[Preconditioner, ...], Members(PRECONDITIONERS)] = ()
    augmentations: Annotated[tuple[NetworkPerturbation, ...], Members(AUGMENTATIONS)] = ()
    couplings: Annotated[tuple[BatchTerm, ...], Members(COUPLINGS)] = ()
    schedule: Annotated[tuple[Stage, ...], Keyed] = ()
    stop: Annotated[Stop, Member(STOPS)] = Fixed()
    layer_penalties: Annotated[tuple[LayerRegularizer, ...], Members(LAYER_PENALTIES)] = dataclasses.field(
        default=(), metadata=ADDED_LATER
    )
    network_penalties: Annotated[tuple[NetworkPenalty, ...], Members(NETWORK_PENALTIES)] = dataclasses.field(
        default=(), metadata=ADDED_LATER
    )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the schedule; one stage with default settings if there is no schedule."""
        return self.schedule or (Stage(),)

    @property
    def budgets(self) -> tuple[ImageRegularizer, ...]:
        """The image regularizers with a budget."""
        return tuple(regularizer for regularizer in self.penalties if regularizer.target is not None)

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the layers that are captured in addition to that of the unit."""
        names = [Unit.parse(unit).layer for unit in self.objective.units]
        names += [layer for term in self.couplings if (layer := getattr(term, "layer", None))]
        names += [stage.layer for stage in self.stages if stage.layer]
        names += self.penalty_layers
        return tuple(dict.fromkeys(names))

    @property
    def penalty_layers(self) -> tuple[str, ...]:
        """Names of the layers that the regularizers in the space of a layer read."""
        return tuple(dict.fromkeys(term.layer for term in self.layer_penalties if term.layer))

    @property
    def requires_original_weights(self) -> bool:
        """Whether steps need the original float32 network: perturbed weights may be absent from a folded variant."""
        return bool(self.augmentations)

    @property
    def is_rendered_alone(self) -> bool:
        """Whether every image is optimized alone, as a perturbation has draws of its own for each image."""
        return any(perturbation.per_image for perturbation in self.augmentations)

    def for_layer(self, layer: Layer) -> "Preset":
        """Return the preset as it is for `layer`.

        The objective `auto` is replaced by the one that it stands for there, and penalties on activations that do not
        apply to the layer are left out.

        Two of these come with a budget of the squared distance from gray, unless the preset has a regularizer of it, so
        that the image has the contrast of the median photograph. The `energy` of a linear layer grows with the square
        of the contrast: without a budget the image is black and white, whatever the kernel. Penalties of "pooled"
        layers leave the contrast free within what single photographs have in each layer: over the steps it becomes that
        of the harshest ones.
        """
        objective = self.objective.resolved(layer, self.negative)
        of_network = tuple(p for p in self.network_penalties if p.applies_to(layer) and self._can_have(p))
        penalties = self.penalties
        to_energy = isinstance(objective, Energy) and objective is not self.objective
        has_contrast = any(isinstance(penalty, L2) for penalty in penalties)
        if not has_contrast and (to_energy or any(p.layers == "pooled" for p in of_network)):
            penalties = (*penalties, L2(budget="natural"))
        return dataclasses.replace(self, objective=objective, penalties=penalties, network_penalties=of_network)

    def _can_have(self, penalty: NetworkPenalty) -> bool:
        """Return whether the preset can have a penalty on activations: an ensemble has no one network's statistics."""
        return penalty.layers == "all" or not any(isinstance(a, Ensemble) for a in self.augmentations)

    @property
    def natural(self) -> str:
        """Name of the dataset statistic that corresponds to the objective; empty if there is none.

        The maximum over the dataset images of the spatial "mean" or "max"; for a negative preset the minimum, "least"
        of the means or "min".
        """
        if self.objective.natural is None:
            return ""
        return {"mean": "least", "max": "min"}[self.objective.natural] if self.negative else self.objective.natural

    @property
    def needs_examples(self) -> bool:
        """Whether visualizations start from the best dataset example of their unit."""
        return isinstance(self.canvas, FromImage) and self.canvas.best

    @property
    def can_restart(self) -> bool:
        """Whether units that stay silent may start from their best dataset example instead.

        Not if the preset sets the initial image itself, minimizes the objective, or has no objective of single units.
        """
        return self.objective.of_unit and not isinstance(self.canvas, FromImage) and not self.negative

    @property
    def needs_dataset_pass(self) -> bool:
        """Whether visualizations need results of the dataset pass: examples, or the mean of the layer."""
        return self.needs_examples or self.objective.compares_with == "mean"


def _groups(annotation: type[Member] | type[Members]) -> dict[str, Registry]:
    """Return the registries of the fields of `Preset` that have an annotation, by field."""
    hints = typing.get_type_hints(Preset, include_extras=True)
    return {
        name: part.registry
        for name, hint in hints.items()
        for part in getattr(hint, "__metadata__", ())
        if isinstance(part, annotation)
    }


# Groups of `conf/render/`: those with one member, which has a `name`, and those with several members by key.
SINGLE_GROUPS = _groups(Member)
KEYED_GROUPS = _groups(Members)


def check(preset: Preset, channels: int) -> None:
    """Check that the settings of a preset are consistent with each other.

    Args:
        preset: The preset.
        channels: Number of input channels of the network.

    Raises:
        AtlasError: If the preset cannot be rendered for any layer of such a network.
    """
    preset.canvas.check(channels)
    check_schedule(preset.schedule)
    for perturbation in preset.augmentations:
        perturbation.check()
    for regularizer in preset.penalties:
        regularizer.check()
    canvas = registered_name(preset.canvas)
    if any(max(stage.blur) > 0 for stage in preset.stages) and not preset.canvas.can_blur:
        raise AtlasError(
            f"render.schedule blurs the image, which the {canvas} canvas does not support: its amplitudes are fixed. "
            "Remove blur from the schedule, or choose another render/canvas."
        )
    if len({stage.canvas for stage in preset.stages}) > 1 and not preset.canvas.can_grow:
        raise AtlasError(
            f"render.schedule changes the size of the canvas, which the {canvas} canvas does not support. "
            "Choose another render/canvas."
        )
    if preset.couplings and preset.variants < 2:
        raise AtlasError("render.couplings need render.variants of at least 2: they compare the variants of a unit.")
    if preset.couplings and preset.is_rendered_alone:
        raise AtlasError(
            "render.couplings compare the variants of a unit, and render.augmentations with per_image optimize each "
            "image alone: use one of the two."
        )
    of_all = any(penalty.layers == "all" for penalty in preset.network_penalties)
    if of_all and any(isinstance(a, Ensemble) for a in preset.augmentations):
        raise AtlasError(
            "render.network_penalties compare with the statistics of one network, not with those of the ensemble in "
            "render.augmentations: use one of the two."
        )
    blurs_gradient = any(isinstance(preconditioner, BlurGradient) for preconditioner in preset.preconditioners)
    if any(stage.gradient_blur for stage in preset.stages) and not blurs_gradient:
        raise AtlasError(
            "render.schedule sets gradient_blur, but render.preconditioners has no blur that it applies to."
        )
    if isinstance(preset.canvas, FromImage) and channels not in (1, 3):
        raise AtlasError(f"render/canvas=image needs an image of 1 or 3 channels; the network takes {channels}.")
    if any(regularizer.anchored for regularizer in preset.penalties) and not isinstance(preset.canvas, FromImage):
        raise AtlasError("render.penalties.prior compares with an initial image: it needs render/canvas=image.")
    if preset.layer_penalties and not isinstance(preset.canvas, FromImage):
        raise AtlasError("render.layer_penalties compare with an initial image: they need render/canvas=image.")
    if preset.objective.compares_with == "image" and channels not in (1, 3):
        raise AtlasError(
            f"render.objective.target needs an image of 1 or 3 channels; the network takes {channels}. "
            "Use render.objective.target=mean."
        )


def check_layer(preset: Preset, layer: Layer, others: Mapping[str, Layer], classifier: bool) -> None:
    """Check that a preset can be rendered for a layer.

    Args:
        preset: The preset.
        layer: The layer whose units are visualized.
        others: All layers of the network by name.
        classifier: Whether `layer` holds the logits of a classifier.

    Raises:
        AtlasError: If the objective, a batch term or the schedule does not apply to the layer.
    """
    widths = {name: other.channels for name, other in others.items()}
    preset = preset.for_layer(layer)
    preset.objective.check(LayerInfo(layer.name, layer.channels, classifier, widths, preset.variants))
    for term in preset.couplings:
        term_layer = getattr(term, "layer", None)
        if term_layer and term_layer not in widths:
            raise AtlasError(f"render.couplings: there is no layer {term_layer!r}; `atlas plan layers=all` lists them.")
    for name in preset.penalty_layers:
        if name not in widths:
            raise AtlasError(f"render.layer_penalties: there is no layer {name!r}; `atlas plan layers=all` lists them.")
    for stage in preset.stages:
        if stage.layer is None:
            continue
        if stage.layer not in widths:
            raise AtlasError(
                f"render.schedule needs a head {stage.layer!r}, which this network does not have. Use a network that "
                "has it (model=googlenet_aux for oygard), the same schedule without heads (render/schedule=blur), or "
                "`atlas run`, which fits heads to the images of a dataset."
            )
        if isinstance(others[stage.layer], HeadLayer) and not classifier:
            raise AtlasError(
                f"render.schedule: {stage.layer} predicts the classes of the network, and {layer.name} does not hold "
                "their logits. Set layers=logits."
            )
        if widths[stage.layer] != layer.channels:
            raise AtlasError(
                f"render.schedule: {stage.layer} has {widths[stage.layer]} channels and {layer.name} {layer.channels}; "
                "a schedule over heads needs layers=logits, and heads for the same classes."
            )


def canvas_size(layer: Layer, model_size: Size, size: int | tuple[int, int] | str) -> Size:
    """Return the size of the finished images of a layer in pixels.

    "auto" follows the receptive field of a unit: features have a size in pixels, and the time of a step grows with the
    area. The side is the receptive field rounded up to a multiple of 32, at least 128 (for smaller receptive fields,
    the mean of a channel becomes a texture) and at most six sevenths of the network's input (192 of 224). A receptive
    field that covers the whole input counts as 8 × the stride. Small networks, and layers with a single position, get
    the size of the network's input. "field" is the receptive field itself, at least 32 and at most the network's input;
    "input" is the size of the network's input.

    Args:
        layer: The layer, with its receptive field.
        model_size: (height, width) of the network's input.
        size: `Preset.size`.

    Returns:
        (height, width), without margins.
    """
    if isinstance(size, int):
        return size, size
    if not isinstance(size, str):
        return size
    if size == "input":
        return model_size
    if size == "field":
        if layer.field is None:
            return model_size
        return min(model_size[0], max(32, layer.field.size[0])), min(model_size[1], max(32, layer.field.size[1]))
    stride = max(1, round(min(model_size) / max(1, min(layer.height, layer.width))))
    if min(layer.height, layer.width) == 1:
        return model_size
    field = 8 * stride if layer.field is None else max(layer.field.size)
    largest = min(model_size) * 6 // 7 // 32 * 32
    side = min(min(model_size), max(128, min(largest, -(-field // 32) * 32)))
    # A network with a rectangular input keeps its aspect ratio.
    return round(model_size[0] * side / min(model_size)), round(model_size[1] * side / min(model_size))
