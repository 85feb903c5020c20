"""Objectives: one value per image, computed from the activations of a network, that is maximized.

An objective treats the images of a batch independently. With `render.negative` its value is minimized instead.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry, registered_name
from pipeline.core.units import Unit
from pipeline.layers.finding import Layer

OBJECTIVES = Registry("objective")

# Lower bound of the cosine factor: a negative dot product times a negative cosine must not become positive (lucid#116).
MIN_COSINE = 0.1


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations of a network for a batch of images.

    Attributes:
        outputs: (B, C, H, W) activations of the layer that is visualized, in the precision of the network.
        channels: (B,) int64 channel that each image visualizes.
        variants: (B,) int64 variant of each image.
        num_variants: Number of variants of a unit.
        other_maps: float32 activations of the layers that `Objective.units` names, by layer.
        compared: What `Objective.compares_with` names: (B, C, H, W) activations of the layer for a photograph, with the
            transformations of the image; or (1, C, 1, 1) means of its channels over the dataset.
    """

    outputs: Tensor
    channels: Tensor
    variants: Tensor
    num_variants: int
    other_maps: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    compared: Tensor | None = None

    @functools.cached_property
    def maps(self) -> Tensor:
        """(B, C, H, W) activations of the layer that is visualized, float32."""
        return _as_float(self.outputs)

    @property
    def own_maps(self) -> Tensor:
        """(B, H, W) activations of the channel that each image visualizes, float32."""
        # Picked first: a copy of all channels in another precision takes as long as a layer of the network.
        return _as_float(select_channels(self.outputs, self.channels))


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """Properties of a layer that objectives are checked against.

    Attributes:
        name: Name of the layer.
        channels: Its number of channels.
        is_classifier: Whether it holds the logits of a classifier.
        all_channels: Number of channels of every layer of the network, by layer.
        num_variants: Number of variants of a unit.
    """

    name: str
    channels: int
    is_classifier: bool
    all_channels: Mapping[str, int]
    num_variants: int


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base class of objectives.

    Attributes:
        natural: Dataset statistic that measures dataset images as the objective measures visualizations; None if there
            is none.
        examples: Dataset examples that visualizations are compared with: those with the largest spatial means, or with
            the largest activation at any position. Of the same channel, few images are in both lists.
        aligned: Whether all variants of a unit start from the same image and get the same transformations.
        per_layer: Whether the objective is computed from all channels. There is one image, for the first channel.
        raises_activation: Whether a larger value means larger activations of the unit. Otherwise neither the peak nor
            the mean of the unit's map is compared with the dataset.
    """

    natural: ClassVar[Literal["mean", "max"] | None] = None
    examples: ClassVar[Literal["mean", "max"]] = "mean"
    aligned: ClassVar[bool] = False
    per_layer: ClassVar[bool] = False
    raises_activation: ClassVar[bool] = True

    @property
    def of_unit(self) -> bool:
        """Whether single units are raised: one that stays silent may start from its best dataset example instead."""
        return self.natural is not None

    @property
    def units(self) -> tuple[str, ...]:
        """Further units that the objective is computed from, as layer:channel."""
        return ()

    @property
    def compares_with(self) -> Literal["image", "mean"] | None:
        """What `Activations.compared` is: the activations of an image, the means of the layer, or nothing."""
        return None

    @property
    def target_image(self) -> ConfigFile | None:
        """The image that the objective compares with, if there is one."""
        return None

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` if the objective does not apply to a layer."""
        for unit in self.units:
            layer, channel = Unit.parse(unit)
            if layer not in info.all_channels:
                raise AtlasError(
                    f"render.objective: there is no layer {layer!r} ({unit!r}); `atlas plan layers=all` lists them."
                )
            if channel >= info.all_channels[layer]:
                raise AtlasError(
                    f"render.objective: {layer} has {info.all_channels[layer]} channels; {unit!r} does not exist."
                )

    def resolved(self, layer: Layer, negative: bool) -> "Objective":
        """Return the objective that is used for a layer: itself, unless its choice depends on the layer (`auto`).

        Args:
            layer: The layer.
            negative: Whether the objective is minimized.
        """
        return self

    def value(self, activations: Activations) -> Tensor:
        """Return the value of each image, (B,)."""
        raise NotImplementedError


def _as_float(maps: Tensor) -> Tensor:
    """Return maps in float32; those in double precision as they are."""
    return maps if maps.dtype == torch.float64 else maps.float()


def select_channels(maps: Tensor, channels: Tensor) -> Tensor:
    """Return one channel of each image: (B, C, H, W) maps and (B,) channels → (B, H, W)."""
    return _Selected.apply(maps, channels)


class _Selected(torch.autograd.Function):
    """Indexing whose gradient is written and not added: PyTorch sorts the indices for that, on a GPU at every step."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, channels: Tensor) -> Tensor:
        rows = torch.arange(maps.shape[0], device=maps.device)
        ctx.save_for_backward(rows, channels)
        is_last = maps.dim() == 4 and maps.is_contiguous(memory_format=torch.channels_last)
        ctx.format = torch.channels_last if is_last else torch.contiguous_format
        ctx.shape, ctx.dtype = maps.shape, maps.dtype
        return maps[rows, channels]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, channels = ctx.saved_tensors
        gradient = torch.empty(ctx.shape, dtype=ctx.dtype, device=rows.device, memory_format=ctx.format).zero_()
        gradient[rows, channels] = grads[0]
        return gradient, None


def compared_examples(name: str, minimized: bool) -> Literal["mean", "max", "min"]:
    """Return the list of dataset examples that visualizations by the objective `name` are compared with."""
    if minimized:
        return "min"
    return OBJECTIVES[name].examples if name in OBJECTIVES else Objective.examples


def not_of_activations() -> set[str]:
    """Return the names of the objectives whose value does not grow with the unit's activation."""
    members = {name: OBJECTIVES[name] for name in OBJECTIVES}
    return {name for name, cls in members.items() if issubclass(cls, Objective) and not cls.raises_activation}


@OBJECTIVES.add("channel")
@dataclasses.dataclass(frozen=True)
class Channel(Objective):
    """Mean of the channel over all positions (the channel objective of Distill); for a classifier, the logit."""

    natural: ClassVar[Literal["mean", "max"] | None] = "mean"

    def value(self, activations: Activations) -> Tensor:
        """Return the spatial mean, (B,)."""
        return activations.own_maps.mean(dim=(1, 2))


@OBJECTIVES.add("energy")
@dataclasses.dataclass(frozen=True)
class Energy(Objective):
    """Energy of the channel: mean over all positions of (activation − its own mean over all positions)².

    For layers that are linear in the pixels, such as a first convolution. There the mean of a channel is the sum of its
    kernel times the mean color, up to the border: it is blind to the pattern of a kernel that sums to 0, as edge
    detectors do. The energy is what the pattern adds. It is largest for the frequency and the color that the kernel
    passes best, with either sign.
    """

    raises_activation: ClassVar[bool] = False

    def value(self, activations: Activations) -> Tensor:
        """Return the spatial variance, (B,): mean over (h, w) of (a[h, w] − mean a)². 0 for a map of one position."""
        maps = activations.own_maps
        return (maps - maps.mean(dim=(1, 2), keepdim=True)).pow(2).mean(dim=(1, 2))


@OBJECTIVES.add("rectified")
@dataclasses.dataclass(frozen=True)
class Rectified(Objective):
    """Mean over all positions of the channel behind a leaky rectifier: of a where a > 0, of slope · a elsewhere.

    For depthwise convolutions before a rectifier. A unit there reads one channel, and the mean of its map is, up to the
    border, the sum of its kernel times the mean of that channel: if the sum is negative, whatever silences the channel
    raises the mean. Behind the rectifier it is raised only by what the kernel responds to. The slope keeps a gradient
    where the unit is off.
    """

    # A unit whose kernel sums to less than 0 is silent in the images with the largest means.
    examples: ClassVar[Literal["mean", "max"]] = "max"

    slope: Annotated[float, Field(ge=0, le=1)] = 0.1

    @property
    def of_unit(self) -> bool:
        """Yes, though no dataset statistic is of rectified maps."""
        return True

    def value(self, activations: Activations) -> Tensor:
        """Return the mean over (h, w) of max(a[h, w], slope · a[h, w]), (B,)."""
        return F.leaky_relu(activations.own_maps, self.slope).mean(dim=(1, 2))


@OBJECTIVES.add("auto")
@dataclasses.dataclass(frozen=True)
class Auto(Channel):
    """The objective that suits a layer: `energy`, `rectified` or `channel`.

    It is `energy` for layers that are linear in the pixels (a first convolution), `rectified` for other depthwise
    convolutions before a rectifier, and `channel` for all others. Where it is `energy`, the image gets the contrast of
    the median photograph, by a budget of its squared distance from gray (`l2`): without one it would be black and
    white. The plan resolves `auto` for each layer; digests, seeds and atlases contain the objective that a layer has.
    Minimized, it is always `channel`: the least energy is that of a gray image.
    """

    def resolved(self, layer: Layer, negative: bool) -> Objective:
        """Return `energy`, `rectified` or `channel`; see the class."""
        if negative:
            return Channel()
        if layer.linear_in_pixels:
            return Energy()
        return Rectified() if layer.depthwise and layer.rectified else Channel()


@OBJECTIVES.add("neuron")
@dataclasses.dataclass(frozen=True)
class Neuron(Objective):
    """The channel at one position (the neuron objective of Distill): row `y` and column `x`; null is the center."""

    y: int | None = None
    x: int | None = None

    natural: ClassVar[Literal["mean", "max"] | None] = "max"
    examples: ClassVar[Literal["mean", "max"]] = "max"

    def value(self, activations: Activations) -> Tensor:
        """Return the activation at row y (default H // 2) and column x (default W // 2), (B,)."""
        maps = activations.own_maps
        height, width = maps.shape[1:]
        y = height // 2 if self.y is None else min(self.y, height - 1)
        x = width // 2 if self.x is None else min(self.x, width - 1)
        return maps[:, y, x]


@OBJECTIVES.add("layer")
@dataclasses.dataclass(frozen=True)
class WholeLayer(Objective):
    """Mean of squares over all channels and positions: DeepDream (Mordvintsev, Olah & Tyka 2015)."""

    per_layer: ClassVar[bool] = True

    def value(self, activations: Activations) -> Tensor:
        """Return the mean square, (B,)."""
        return activations.maps.pow(2).mean(dim=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class _ClassifierObjective(Objective):
    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` for layers other than the classifier."""
        super().check(info)
        if not info.is_classifier:
            name = registered_name(self)
            raise AtlasError(
                f"render.objective: {name} needs the classifier's logits, which {info.name} does not hold. "
                "Set layers=logits, or render/objective=channel."
            )


@OBJECTIVES.add("logit")
@dataclasses.dataclass(frozen=True)
class Logit(_ClassifierObjective):
    """Logit of the class: its score before the softmax."""

    natural: ClassVar[Literal["mean", "max"] | None] = "mean"

    def value(self, activations: Activations) -> Tensor:
        """Return the logits, (B,)."""
        return activations.own_maps.mean(dim=(1, 2))


def _of_all_logits(function: Callable[..., Tensor], activations: Activations) -> Tensor:
    """Return the value for each image's class of a function of all logits, (B,)."""
    return select_channels(function(activations.maps, dim=1), activations.channels).mean(dim=(1, 2))


@OBJECTIVES.add("probability")
@dataclasses.dataclass(frozen=True)
class Probability(_ClassifierObjective):
    """Probability of the class, after the softmax.

    It rises when the logits of other classes fall, which Distill warns of. It is here for comparison with `logit`.
    """

    def value(self, activations: Activations) -> Tensor:
        """Return the probabilities, (B,)."""
        return _of_all_logits(F.softmax, activations)


@OBJECTIVES.add("log_probability")
@dataclasses.dataclass(frozen=True)
class LogProbability(_ClassifierObjective):
    """Logarithm of the probability of the class: the negative cross-entropy loss of classifiers."""

    def value(self, activations: Activations) -> Tensor:
        """Return the log-probabilities, (B,)."""
        return _of_all_logits(F.log_softmax, activations)


@OBJECTIVES.add("squashed_logit")
@dataclasses.dataclass(frozen=True)
class SquashedLogit(_ClassifierObjective):
    """Logit z of the class after a squashing function.

    `sigmoid` and `tanh` saturate with z alone: their slopes fall as e^(−z) and 4 e^(−2z). `softmax` and `log_softmax`
    are the objectives `probability` and `log_probability`, whose slopes fall with the margin over the other classes.
    For the question whether it is the other logits or the saturation that makes probabilities a poor objective.
    """

    squash: Literal["sigmoid", "tanh", "softmax", "log_softmax"] = "sigmoid"

    def value(self, activations: Activations) -> Tensor:
        """Return the squashed logits, (B,)."""
        if self.squash in ("softmax", "log_softmax"):
            return _of_all_logits(F.softmax if self.squash == "softmax" else F.log_softmax, activations)
        function = torch.sigmoid if self.squash == "sigmoid" else torch.tanh
        return function(activations.own_maps).mean(dim=(1, 2))


@OBJECTIVES.add("direction")
@dataclasses.dataclass(frozen=True)
class Direction(Objective):
    """A direction in the activation space of the layer: mean over positions of dot product × max(0.1, cosine)^power.

    lucid `direction` (`cossim_pow`), Carter et al. 2019. `vectors` is an .npy file of shape (N, C); row i is visualized
    as unit i of the layer, so that N is at most C. `position` is `all`, or `centre` for the central position only.
    """

    vectors: ConfigFile
    power: float = 0.0
    position: Literal["all", "centre"] = "all"

    @property
    def rows(self) -> np.ndarray:
        """The vectors, (N, C) float32."""
        array = self.vectors.arrays().get("array")
        if array is None or array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not np.isfinite(array).all():
            raise AtlasError(f"{self.vectors.path} must be an .npy file of finite numbers of shape (N, C) or (C,).")
        return np.atleast_2d(array).astype(np.float32)

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` if the vectors do not have as many components as the layer has channels."""
        super().check(info)
        rows = self.rows
        if rows.shape[1] != info.channels or len(rows) > info.channels:
            raise AtlasError(
                f"{self.vectors.path} holds {len(rows)} vectors of {rows.shape[1]} numbers; {info.name} needs vectors "
                f"of {info.channels} numbers, and at most as many vectors. Choose the layer with layers.include."
            )

    def value(self, activations: Activations) -> Tensor:
        """Return the mean over positions of dot product × cosine^power, (B,)."""
        return self._projection(activations.maps, activations.channels)

    def _projection(self, maps: Tensor, rows: Tensor) -> Tensor:
        """Return the value for (B, C, H, W) maps and the numbers (B,) of their vectors, (B,)."""
        if self.position == "centre":
            maps = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2, None, None]
        vectors = _vectors(self, maps.dtype, maps.device)[rows]
        dot = torch.einsum("bchw,bc->bhw", maps, vectors)
        if self.power:
            norms = maps.norm(dim=1) * vectors.norm(dim=1)[:, None, None]
            dot = dot * (dot / norms.clamp(min=1e-12)).clamp(min=MIN_COSINE) ** self.power
        return dot.mean(dim=(1, 2))


@functools.lru_cache(maxsize=8)
def _vectors(objective: Direction, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vectors of an objective on a device: they are read and copied once, and not at every step."""
    return torch.from_numpy(objective.rows).to(device, dtype)


@OBJECTIVES.add("directions")
@dataclasses.dataclass(frozen=True)
class Directions(Direction):
    """The objective `direction` for any number of vectors: row i is visualized as variant i of the layer.

    All variants start from the same image and get the same transformations, so that similar vectors give similar
    images. The cells of activation grids are made with it.
    """

    aligned: ClassVar[bool] = True
    per_layer: ClassVar[bool] = True

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` if the vectors do not fit the layer, or there is not one for each variant."""
        rows = self.rows
        if rows.shape[1] != info.channels:
            raise AtlasError(
                f"{self.vectors.path} holds vectors of {rows.shape[1]} numbers; {info.name} needs {info.channels}. "
                "Choose the layer with layers.include."
            )
        if len(rows) != info.num_variants:
            raise AtlasError(f"{self.vectors.path} holds {len(rows)} vectors: set render.variants={len(rows)}.")

    def value(self, activations: Activations) -> Tensor:
        """Return the mean over positions of dot product × cosine^power, (B,)."""
        return self._projection(activations.maps, activations.variants)


@OBJECTIVES.add("caricature")
@dataclasses.dataclass(frozen=True)
class Caricature(Objective):
    """Dot product of the layer's activations a with those of a photograph t, per position, × max(0.1, cos(a, t))^power.

    What the layer sees in a photograph, exaggerated: what it does not represent is lost. lucid's recipe `caricature`
    (objective `dot_compare`, `cossim_pow` 0), which gives the photograph the same random transformations as the image.
    `target` is an image file, `dataset:PATH` for an image of the dataset, or `mean` for the mean
    activation of each channel over the dataset, at every position.
    """

    target: ConfigFile = ConfigFile("mean")
    power: Annotated[float, Field(ge=0)] = 0.0

    per_layer: ClassVar[bool] = True

    @property
    def compares_with(self) -> Literal["image", "mean"] | None:
        """What `target` is."""
        return "mean" if self.target.path == "mean" else "image"

    @property
    def target_image(self) -> ConfigFile | None:
        """The photograph."""
        return None if self.compares_with == "mean" else self.target

    def uses_file(self, field: str) -> bool:
        """Return whether the file in a field is used; `mean` is not a file."""
        return field != "target" or self.compares_with == "image"

    def value(self, activations: Activations) -> Tensor:
        """Return the mean over positions of the dot product over channels, × cosine^power over both, (B,)."""
        assert activations.compared is not None
        maps = activations.maps
        target = activations.compared.to(maps).expand_as(maps)
        dot = (maps * target).sum(dim=1).mean(dim=(1, 2))
        if self.power:
            norms = maps.flatten(1).norm(dim=1) * target.flatten(1).norm(dim=1) / (maps.shape[2] * maps.shape[3])
            dot = dot * (dot / norms.clamp(min=1e-12)).clamp(min=MIN_COSINE) ** self.power
        return dot


@OBJECTIVES.add("joint")
@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """Channel mean of the unit times `own`, plus a weighted sum of the channel means of `with_units`, of any layers."""

    with_units: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    own: float = 1.0

    @property
    def units(self) -> tuple[str, ...]:
        """The units of `with_units`."""
        return self.with_units

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` if there is no further unit, or if the number of weights does not match."""
        if not self.with_units:
            raise AtlasError("render.objective.with_units is empty: joint needs at least one layer:channel.")
        if self.weights and len(self.weights) != len(self.with_units):
            raise AtlasError("render.objective.weights must be empty, or have as many entries as with_units.")
        super().check(info)

    def value(self, activations: Activations) -> Tensor:
        """Return the weighted sum of channel means, (B,)."""
        total = self.own * activations.own_maps.mean(dim=(1, 2))
        for unit, weight in zip(self.with_units, self.weights or (1.0,) * len(self.with_units), strict=True):
            layer, channel = Unit.parse(unit)
            total = total + weight * activations.other_maps[layer][:, channel].mean(dim=(1, 2))
        return total


@OBJECTIVES.add("interpolate")
@dataclasses.dataclass(frozen=True)
class Interpolate(Objective):
    """Interpolation from the channel mean of the unit (first variant) to that of unit `to` (last variant).

    The `render.variants` images are evenly spaced. All start from the same image and get the same transformations; the
    `alignment` coupling keeps neighbors similar (Distill, "Interaction between neurons").
    """

    to: str | None = None

    aligned: ClassVar[bool] = True

    @property
    def units(self) -> tuple[str, ...]:
        """The unit `to`."""
        return () if self.to is None else (self.to,)

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` without a unit `to`, or with a single variant."""
        if self.to is None:
            raise AtlasError("render.objective.to is missing: interpolate needs a second unit, as layer:channel.")
        if info.num_variants < 2:
            raise AtlasError(
                "interpolate needs render.variants of at least 2: the number of images from one unit to the other."
            )
        super().check(info)

    def value(self, activations: Activations) -> Tensor:
        """Return (1 - t) × first + t × second with t = variant / (variants - 1), (B,)."""
        assert self.to is not None
        layer, channel = Unit.parse(self.to)
        t = activations.variants.to(activations.maps.dtype) / max(1, activations.num_variants - 1)
        first = activations.own_maps.mean(dim=(1, 2))
        second = activations.other_maps[layer][:, channel].mean(dim=(1, 2))
        return (1 - t) * first + t * second


@OBJECTIVES.add("facet")
@dataclasses.dataclass(frozen=True)
class Facet(Objective):
    """Softened channel mean × f(cosine)^power of the response of another layer with that to some images.

    One image for each facet of a unit: `embedding` is the layer whose responses its dataset examples were grouped by,
    and `targets` an .npz file: `center` (V, D), the mean standardized response to the images of the facet of each
    variant, and `mean` and `deviation` (D,), which the spatial means of the layer are standardized by. f is the cosine
    itself from 0.1 on and falls exponentially below. The channel mean a is softened to s · log(1 + exp(a / s)), where s
    is the length of the center: it is positive, so that the product rises with both factors from any image. All
    variants of a unit get the same transformations.

    Nguyen, Yosinski & Clune 2016 find facets by the responses of a later layer, and guide the image by its start alone;
    Goh et al. 2021 ("Multimodal Neurons") add the dot product of a linear probe with activation × gradient in an
    earlier layer.
    """

    targets: ConfigFile
    embedding: str = ""
    power: Annotated[float, Field(ge=0)] = 1.0
    rectify: bool = False

    aligned: ClassVar[bool] = True

    @property
    def units(self) -> tuple[str, ...]:
        """The first unit of the layer of the responses, which is read as a whole."""
        return (f"{self.embedding}:0",)

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """`center` (V, D), `mean` and `deviation` (D,), float32."""
        found = self.targets.arrays()
        if set(found) != {"center", "mean", "deviation"} or any(a.dtype.kind not in "fiu" for a in found.values()):
            raise AtlasError(f"{self.targets.path} must be an .npz file of numbers `center`, `mean` and `deviation`.")
        return {name: array.astype(np.float32) for name, array in found.items()}

    def check(self, info: LayerInfo) -> None:
        """Raise `AtlasError` if the targets do not fit the layer of the responses, or there is not one per variant."""
        if not self.embedding:
            raise AtlasError(
                "render.objective.embedding is missing: facet needs the layer whose responses it compares."
            )
        super().check(info)
        width, arrays = info.all_channels[self.embedding], self.arrays
        if any(arrays[name].shape != (width,) for name in ("mean", "deviation")) or arrays["center"].shape[1:] != (
            width,
        ):
            raise AtlasError(f"{self.targets.path} does not fit {self.embedding}, which has {width} channels.")
        if len(arrays["center"]) != info.num_variants:
            count = len(arrays["center"])
            raise AtlasError(f"{self.targets.path} holds {count} centers: set render.variants={count}.")

    def cosine(self, maps: Tensor, variants: Tensor) -> Tensor:
        """Return the cosines of standardized responses with the centers, (B,).

        Args:
            maps: Maps (B, D, H, W) of the layer of the responses.
            variants: Variant of each image, (B,).
        """
        center, mean, scale = _facet_targets(self, maps.dtype, maps.device)
        response = (maps.clamp(min=0) if self.rectify else maps).mean(dim=(2, 3))
        return F.cosine_similarity((response - mean) * scale, center[variants], dim=1, eps=1e-12)

    def value(self, activations: Activations) -> Tensor:
        """Return softened channel mean × f(cosine)^power, (B,)."""
        maps = activations.own_maps
        scale = _facet_targets(self, maps.dtype, maps.device)[0][activations.variants].norm(dim=1).clamp(min=1e-6)
        own = scale * F.softplus(maps.mean(dim=(1, 2)) / scale)
        cosine = self.cosine(activations.other_maps[self.embedding], activations.variants)
        low = MIN_COSINE * torch.exp(cosine.clamp(max=MIN_COSINE) / MIN_COSINE - 1)
        factor = torch.where(cosine > MIN_COSINE, cosine, low) ** self.power
        return own * factor


@functools.lru_cache(maxsize=8)
def _facet_targets(objective: Facet, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return centers, means and inverse deviations on a device; the inverse of a deviation of 0 is 0."""
    arrays = objective.arrays
    deviation = arrays["deviation"]
    scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    found = [torch.from_numpy(array).to(device, dtype) for array in (arrays["center"], arrays["mean"], scale)]
    return found[0], found[1], found[2]
