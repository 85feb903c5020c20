"""What to excite: a scalar per image, from the network's responses.

An objective sees (B, C, H, W) maps and couples no two images. `natural` names the dataset statistic that measures
photographs by the same yardstick, so that a picture can be held against them; None where there is none. What is
raised may be the negative of any objective (`render.negative`): what a unit likes least.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry, registered_name

OBJECTIVES = Registry("objective")

# Dot products below this share of alignment count as this: two negatives must not make a praise (lucid#116).
LEAST_COSINE = 0.1


@dataclasses.dataclass(frozen=True)
class Activations:
    """What the network said to a batch.

    `own` is (B, C, H, W) at the layer of the unit; `channels` and `variants` (B,) say whose picture each image is,
    `count` how many variants there are; `others` holds the layers that the objective asked for besides.
    """

    own: Tensor
    channels: Tensor
    variants: Tensor
    count: int
    others: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """What can be known of a unit's layer before any work: enough to refuse what makes no sense."""

    layer: str
    channels: int
    classifier: bool
    others: Mapping[str, int]
    variants: int


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `render` needs of an objective."""

    natural: ClassVar[Literal["mean", "max"] | None] = None
    # True where all variants of a unit start from the same picture and are shaken alike.
    aligned: ClassVar[bool] = False
    # True where the picture belongs to the layer: it is made once, and kept at the layer's first channel.
    whole: ClassVar[bool] = False

    @property
    def units(self) -> tuple[str, ...]:
        """Other units that it needs, as layer:channel."""
        return ()

    def check(self, facts: LayerInfo) -> None:
        """Raise `AtlasError` where the objective makes no sense for a layer."""
        for unit in self.units:
            layer, channel = parse(unit)
            if layer not in facts.others:
                raise AtlasError(
                    f"render.objective: there is no layer {layer!r} ({unit!r}); `atlas plan layers=all` lists them."
                )
            if channel >= facts.others[layer]:
                raise AtlasError(f"render.objective: {layer} has {facts.others[layer]} channels, {unit!r} is beyond.")

    def value(self, responses: Activations) -> Tensor:
        """(B,) values to be raised."""
        raise NotImplementedError


def parse(unit: str) -> tuple[str, int]:
    """`blocks.3:17` → ("blocks.3", 17)."""
    layer, _, channel = unit.rpartition(":")
    if not layer or not channel.isdecimal():
        raise AtlasError(f"{unit!r} is not a unit: write layer:channel, e.g. blocks.3.0:17.")
    return layer, int(channel)


def pick(maps: Tensor, channels: Tensor) -> Tensor:
    """(B, H, W): of each image the map of its own channel."""
    return maps[torch.arange(maps.shape[0], device=maps.device), channels]


@OBJECTIVES.add("channel")
@dataclasses.dataclass(frozen=True)
class Channel(Objective):
    """Mean of the channel over all positions (Distill's *channel* objective); a logit for the classifier."""

    natural: ClassVar[Literal["mean", "max"] | None] = "mean"

    def value(self, responses: Activations) -> Tensor:
        """Spatial mean, (B,)."""
        return pick(responses.own, responses.channels).mean(dim=(1, 2))


@OBJECTIVES.add("neuron")
@dataclasses.dataclass(frozen=True)
class Neuron(Objective):
    """The channel at one position of its map (Distill's *neuron* objective): y and x, or the centre."""

    y: int | None = None
    x: int | None = None

    natural: ClassVar[Literal["mean", "max"] | None] = "max"

    def value(self, responses: Activations) -> Tensor:
        """Response at row y (H // 2), column x (W // 2), (B,)."""
        own = pick(responses.own, responses.channels)
        y = own.shape[1] // 2 if self.y is None else min(self.y, own.shape[1] - 1)
        x = own.shape[2] // 2 if self.x is None else min(self.x, own.shape[2] - 1)
        return own[:, y, x]


@OBJECTIVES.add("layer")
@dataclasses.dataclass(frozen=True)
class WholeLayer(Objective):
    """Mean of squares over all channels and positions: DeepDream (Mordvintsev, Olah & Tyka 2015)."""

    whole: ClassVar[bool] = True

    def value(self, responses: Activations) -> Tensor:
        """Mean square, (B,)."""
        return responses.own.pow(2).mean(dim=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class _OfClassifier(Objective):
    def check(self, facts: LayerInfo) -> None:
        """Only the network's last layer has logits."""
        super().check(facts)
        if not facts.classifier:
            name = registered_name(self)
            raise AtlasError(
                f"render.objective: {name} needs the classifier's logits, {facts.layer} is another layer. "
                "Set layers=logits, or render/objective=channel."
            )


@OBJECTIVES.add("logit")
@dataclasses.dataclass(frozen=True)
class Logit(_OfClassifier):
    """The class's score before the softmax."""

    natural: ClassVar[Literal["mean", "max"] | None] = "mean"

    def value(self, responses: Activations) -> Tensor:
        """Logits, (B,)."""
        return pick(responses.own, responses.channels).mean(dim=(1, 2))


@OBJECTIVES.add("probability")
@dataclasses.dataclass(frozen=True)
class Probability(_OfClassifier):
    """The class's share after the softmax: easily raised by lowering the other classes, as Distill warns.

    Kept because showing that it is worse is part of the science.
    """

    def value(self, responses: Activations) -> Tensor:
        """Probabilities, (B,)."""
        return pick(F.softmax(responses.own, dim=1), responses.channels).mean(dim=(1, 2))


@OBJECTIVES.add("log_probability")
@dataclasses.dataclass(frozen=True)
class LogProbability(_OfClassifier):
    """Logarithm of the class's share after the softmax: the loss that the network was trained on."""

    def value(self, responses: Activations) -> Tensor:
        """Log probabilities, (B,)."""
        return pick(F.log_softmax(responses.own, dim=1), responses.channels).mean(dim=(1, 2))


@OBJECTIVES.add("direction")
@dataclasses.dataclass(frozen=True)
class Direction(Objective):
    """A direction in the layer's space: dot × max(0.1, cosine)^power at each position, then the mean.

    lucid `direction` (`cossim_pow`), Carter et al. 2019. `vectors` is an .npy of (N, C) numbers; row i makes the
    picture of unit i of the layer, so N is at most C. `position` is `all` or `centre`.
    """

    vectors: ConfigFile
    power: float = 0.0
    position: str = "all"

    @property
    def rows(self) -> np.ndarray:
        """(N, C) float32."""
        array = self.vectors.arrays().get("array")
        if array is None or array.dtype.kind not in "fiu" or array.ndim not in (1, 2) or not np.isfinite(array).all():
            raise AtlasError(f"{self.vectors.path} must be an .npy of finite numbers, (N, C) or (C,).")
        return np.atleast_2d(array).astype(np.float32)

    def check(self, facts: LayerInfo) -> None:
        """The vectors must have the layer's width."""
        super().check(facts)
        if self.position not in ("all", "centre"):
            raise AtlasError(f"render.objective.position={self.position!r} is not one of all, centre.")
        rows = self.rows
        if rows.shape[1] != facts.channels or len(rows) > facts.channels:
            raise AtlasError(
                f"{self.vectors.path} holds {len(rows)} vectors of {rows.shape[1]} numbers; {facts.layer} needs "
                f"{facts.channels} numbers a vector, and at most as many vectors. Choose the layer with layers.include."
            )

    def value(self, responses: Activations) -> Tensor:
        """Mean over positions of dot × cosine^power, (B,)."""
        maps = responses.own
        if self.position == "centre":
            maps = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2, None, None]
        vectors = torch.from_numpy(self.rows).to(maps)[responses.channels]
        dot = torch.einsum("bchw,bc->bhw", maps, vectors)
        if self.power:
            length = maps.norm(dim=1) * vectors.norm(dim=1)[:, None, None]
            dot = dot * (dot / length.clamp(min=1e-12)).clamp(min=LEAST_COSINE) ** self.power
        return dot.mean(dim=(1, 2))


@OBJECTIVES.add("joint")
@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """The unit's own channel mean times `own`, plus a weighted sum of other units', of any layers."""

    with_units: tuple[str, ...]
    weights: tuple[float, ...] = ()
    own: float = 1.0

    @property
    def units(self) -> tuple[str, ...]:
        """The partners."""
        return self.with_units

    def check(self, facts: LayerInfo) -> None:
        """There must be a partner, and a weight for each or none at all."""
        if not self.with_units:
            raise AtlasError("render.objective.with_units is empty: joint needs at least one layer:channel.")
        if self.weights and len(self.weights) != len(self.with_units):
            raise AtlasError("render.objective.weights must be as many as with_units, or none.")
        super().check(facts)

    def value(self, responses: Activations) -> Tensor:
        """Weighted sum of channel means, (B,)."""
        total = self.own * pick(responses.own, responses.channels).mean(dim=(1, 2))
        for unit, weight in zip(self.with_units, self.weights or (1.0,) * len(self.with_units), strict=True):
            layer, channel = parse(unit)
            total = total + weight * responses.others[layer][:, channel].mean(dim=(1, 2))
        return total


@OBJECTIVES.add("interpolate")
@dataclasses.dataclass(frozen=True)
class Interpolate(Objective):
    """From the unit's own channel mean (first variant) to that of unit `to` (last), in `render.variants` even steps.

    All steps start from one picture and are shaken alike; the `alignment` coupling keeps neighbours together
    (Distill, "Interaction between neurons").
    """

    to: str | None = None

    aligned: ClassVar[bool] = True

    @property
    def units(self) -> tuple[str, ...]:
        """The other end."""
        return () if self.to is None else (self.to,)

    def check(self, facts: LayerInfo) -> None:
        """There must be another end and at least two steps."""
        if self.to is None:
            raise AtlasError("render.objective.to is missing: interpolate needs the other unit, as layer:channel.")
        if facts.variants < 2:
            raise AtlasError("interpolate needs render.variants of at least 2: the number of pictures from end to end.")
        super().check(facts)

    def value(self, responses: Activations) -> Tensor:
        """(1 - t) × own + t × other, t = variant / (variants - 1), (B,)."""
        assert self.to is not None
        layer, channel = parse(self.to)
        share = responses.variants.to(responses.own.dtype) / max(1, responses.count - 1)
        own = pick(responses.own, responses.channels).mean(dim=(1, 2))
        return (1 - share) * own + share * responses.others[layer][:, channel].mean(dim=(1, 2))
