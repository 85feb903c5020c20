"""Results of the measurement of effects, and their merging."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.examples.localizations import Localizations

# What the map of an ablated unit is set to.
REPLACEMENTS = ("zero", "mean")

# Effects are summed as integers, so that no order of images changes a byte: multiples of 2⁻³², and 2⁻²⁴ for squares.
SUM_BITS, SQUARE_BITS = 32, 24
# Larger effects are clipped before they are summed: 10⁵ images of this size still fit into 64 bits.
LARGEST = 2.0**12

# Of the effects of ablated units: on the largest output of each image (n, U) float32, and sums of effects and of their
# squares over the images, (U, K) int64 each.
Ablation = tuple[np.ndarray, np.ndarray, np.ndarray]


def exact_sum(effect: np.ndarray) -> np.ndarray:
    """Return effects as integers whose sums are exact."""
    return _rounded(effect, SUM_BITS)


def exact_sum_of_squares(effect: np.ndarray) -> np.ndarray:
    """Return the squares of effects as integers whose sums are exact."""
    return _rounded(np.square(np.clip(np.nan_to_num(effect.astype(np.float64)), -LARGEST, LARGEST)), SQUARE_BITS)


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    limit = LARGEST**2
    return np.rint(np.clip(np.nan_to_num(values.astype(np.float64)), -limit, limit) * 2.0**bits).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class EffectsPart:
    """Effects for some dataset images.

    Attributes:
        index: The images, (n,) int32.
        top: The largest output of each, (n,) int32.
        attribution: Attribution of all channels of all layers, side by side, to that output, (n, C) float32.
        relevance: Sum over positions of activation × gradient of that output, of the same channels, (n, C) float32.
        ablations: Effects of the U ablated units of all layers, by replacement.
        failed: Images that could not be read, with the reason.
    """

    index: np.ndarray
    top: np.ndarray
    attribution: np.ndarray
    relevance: np.ndarray
    ablations: Mapping[str, Ablation]
    failed: tuple[tuple[int, str], ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["EffectsPart"], failed: Sequence[tuple[int, str]] = ()) -> "EffectsPart":
        """Return several parts as one, in their order; `failed` are further images that could not be read."""
        reasons = (*(one for part in parts for one in part.failed), *failed)
        if not parts:
            empty = np.zeros(0, np.int32)
            nothing = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64)
            none = np.zeros((0, 0), np.float32)
            return cls(empty, empty, none, none, dict.fromkeys(REPLACEMENTS, nothing), reasons)
        filled = [part for part in parts if len(part.index)] or list(parts[:1])
        ablations = {
            name: (
                np.concatenate([part.ablations[name][0] for part in filled]),
                sum(part.ablations[name][1] for part in filled),
                sum(part.ablations[name][2] for part in filled),
            )
            for name in REPLACEMENTS
        }
        return cls(
            np.concatenate([part.index for part in filled]),
            np.concatenate([part.top for part in filled]),
            np.concatenate([part.attribution for part in filled]),
            np.concatenate([part.relevance for part in filled]),
            ablations,  # type: ignore[arg-type]
            reasons,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        arrays = {name: getattr(self, name) for name in ("index", "top", "attribution", "relevance")}
        for name, (top, total, squares) in self.ablations.items():
            arrays |= {f"{name}/top": top, f"{name}/sum": total, f"{name}/squares": squares}
        arrays["failed/index"] = np.array([i for i, _ in self.failed], np.int32)
        arrays["failed/reason"] = np.array([reason for _, reason in self.failed], object)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "EffectsPart":
        """Create from the result of `arrays`."""
        ablations = {
            name: (arrays[f"{name}/top"], arrays[f"{name}/sum"], arrays[f"{name}/squares"]) for name in REPLACEMENTS
        }
        failed = zip(arrays["failed/index"].tolist(), map(str, arrays["failed/reason"].tolist()), strict=True)
        index, top, attribution, relevance = (arrays[name] for name in ("index", "top", "attribution", "relevance"))
        return cls(index, top, attribution, relevance, ablations, tuple(failed))


@dataclasses.dataclass(frozen=True)
class LayerEffects:
    """Effects of the units of one layer.

    Attributes:
        attribution: Attribution of C channels to the largest output of n images, (C, n) float32.
        relevance: Relevance of these channels for the same outputs, (C, n) float32; see `effects.relevance`.
        ablated: Channels that were ablated, (U,) int32.
        top: Effects of these on the largest output of each image, (U, n) float32, by replacement.
        mean: Mean effects on all K outputs, (U, K) float32, by replacement.
        deviation: Standard deviations over the images, (U, K) float32, by replacement.
    """

    attribution: np.ndarray
    relevance: np.ndarray
    ablated: np.ndarray
    top: Mapping[str, np.ndarray]
    mean: Mapping[str, np.ndarray]
    deviation: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RelevantImages:
    """The dataset images with the largest relevance for each unit of a layer, largest first.

    Attributes:
        value: Relevance, (C', k) float32; NaN for none.
        index: Dataset images, (C', k) int32; −1 for none.
        y: Row of the largest relevance in the layer's map, (C', k) int16.
        x: Its column.
        mask: Pixels that the relevance comes from, in cells of the network's input, (C', k, h, w) uint8; 255 for the
            largest value of each mask; all 0 for a unit that responds to a blurred copy of the image as well.
        crop: Number of the crop among those of the layer, (C', k) int32; −1 for none. None where no crops are stored.
    """

    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray
    mask: np.ndarray
    crop: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class ConnectionAttribution:
    """Attributions of the connections between the units of two layers, means over dataset images.

    Attributes:
        source: Name of the layer before.
        value: Attributions of the target's channels in the atlas, by channel of the source, (C', I) float32; see
            `effects.connections`.
        images: Number of images.
    """

    source: str
    value: np.ndarray
    images: int


@dataclasses.dataclass(frozen=True)
class EffectsResult:
    """Effects of the units of all measured layers.

    Attributes:
        outputs: Name of the layer of the outputs.
        index: Dataset images, (n,) int32.
        top: The largest output of each, (n,) int32.
        layers: Effects by layer name.
        relevant: Images by relevance for the units of the atlas, by layer name; empty without such lists.
        crops: Arrays `i/jpeg` and `i/offset` with crops of these images, for each number i of a layer in `layers`; None
            where no crops are stored.
        device: Kinds of the devices that effects were measured on, such as "cpu cuda"; empty if parts of former
            versions do not say it.
        connections: Attributions of connections, by the name of the target; empty without.
    """

    outputs: str
    index: np.ndarray
    top: np.ndarray
    layers: Mapping[str, LayerEffects]
    relevant: Mapping[str, RelevantImages] = dataclasses.field(default_factory=dict)
    crops: Localizations | None = None
    device: str = ""
    connections: Mapping[str, ConnectionAttribution] = dataclasses.field(default_factory=dict)


def split_by_layer(
    part: EffectsPart, names: Sequence[str], channels: Sequence[int], ablated: Sequence[Sequence[int]], outputs: str
) -> EffectsResult:
    """Return the complete result by layer.

    Args:
        part: Effects for all images.
        names: Names of the layers.
        channels: Number of channels of each.
        ablated: Ablated channels of each.
        outputs: Name of the layer of the outputs.
    """
    layers: dict[str, LayerEffects] = {}
    first, unit, count = 0, 0, max(1, len(part.index))
    for name, size, own in zip(names, channels, ablated, strict=True):
        rows = slice(unit, unit + len(own))
        mean, deviation = {}, {}
        for replacement, (_, total, squares) in part.ablations.items():
            average = total[rows] / 2.0**SUM_BITS / count
            spread = squares[rows] / 2.0**SQUARE_BITS / count - np.square(average)
            mean[replacement] = average.astype(np.float32)
            deviation[replacement] = np.sqrt(np.maximum(spread, 0) * count / max(1, count - 1)).astype(np.float32)
        layers[name] = LayerEffects(
            part.attribution[:, first : first + size].T,
            part.relevance[:, first : first + size].T,
            np.array(own, np.int32),
            {replacement: values[0][:, rows].T for replacement, values in part.ablations.items()},
            mean,
            deviation,
        )
        first, unit = first + size, unit + len(own)
    return EffectsResult(outputs, part.index, part.top, layers)
