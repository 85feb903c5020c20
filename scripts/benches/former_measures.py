"""Formulas that measures had before they were repaired, for `scripts/bench measures`.

Each is that of commit ff7e0dd; its docstring names the file there and what the formula gets wrong.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.examples.channel_stats import BINS, ChannelAccumulator, HistogramRange, channel_statistics
from pipeline.layers.connections import Connectivity
from pipeline.layers.connectivity import SCALED_NORMS, find_connectivity
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model

# Values at most this far from black or white counted as saturated.
SATURATION_MARGIN = 2 / 255
# Least number of images (not of source images) of a label, and number of over-represented labels.
LEAST_IMAGES, TOP_LABELS = 10, 3
# Percentile of random images that bounds `Transfer`, as in `pipeline.images.metrics.transfer`.
FLOOR = 0.95


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Former transfer, with the two bounds that today's has.

    Attributes:
        value: Of the V visualizations of G units, (G, V), −1 … 1.
        ceiling: Of each dataset example of a unit with the mean of its others, mean over them, (G,).
        floor: Of random dataset images, the percentile `FLOOR`, (G,).
    """

    value: np.ndarray
    ceiling: np.ndarray
    floor: np.ndarray


def transfer(responses: np.ndarray, examples: np.ndarray, natural: np.ndarray) -> Transfer:
    """Return cos(r − u, n − u) over all channels of the layer, the unit's own included and none scaled.

    `transfer` of pipeline/quality.py. Its answer is in its question: the image was optimized for one of the channels,
    and the dataset examples were chosen by it. Channels with large activations decide the rest. It had no bounds; they
    are computed here by the same formula.

    Args:
        responses: r, maximum activations for V visualizations of G units, (G, V, C).
        examples: n is their mean over k: maximum activations for the best dataset examples, (G, k, C); NaN for none.
        natural: u is their mean over n: maximum activations for random dataset images, (n, C).
    """
    usual = natural.astype(np.float64).mean(0)
    centered = examples - usual
    available = np.isfinite(centered).all(2)
    known = np.where(available[..., None], centered, 0)
    count = available.sum(1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = known.sum(1) / count
        rest = (known.sum(1, keepdims=True) - known) / (count - 1)[..., None]
        each = np.where(available & (count > 1), cosine(centered, rest), np.nan)
        ceiling = np.nansum(each, 1) / np.isfinite(each).sum(1)
    random = cosine((natural - usual)[:, None], mean[None])
    return Transfer(cosine(responses - usual, mean[:, None]), ceiling, np.quantile(random, FLOOR, axis=0))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines over the last axis of arrays that are broadcast; NaN for vectors of zeros."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def activation_ratio(activation: np.ndarray, best: np.ndarray, negative: bool) -> np.ndarray:
    """Return the objective of visualizations (G, V) ÷ the best of any dataset image (G,); NaN where that has no sign.

    `gain` of pipeline/measures.py, which led the pages. For channel objectives both are means of maps: a visualization
    fills the map with a feature that a photograph contains once.
    """
    best = best[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(-best > 0 if negative else best > 0, activation / best, np.nan)


def rank(responses: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """Return 1 + the number of channels of the layer with a larger maximum activation than the unit's own, (G, V).

    `rank` of pipeline/quality.py. Channels are not scaled, so that a channel with large activations everywhere is
    first for any image.

    Args:
        responses: (G, V, C), maximum activations; NaN for a missing image.
        channels: (G,), the units' own channels.
    """
    own = np.take_along_axis(responses, channels[:, None, None], 2)
    return np.where(np.isnan(own[..., 0]), np.nan, (responses > own).sum(2) + 1)


def saturated(images: np.ndarray, margin: float = SATURATION_MARGIN) -> np.ndarray:
    """Return the share of values within `margin` of black or white, 0 … 1, of (…, H, W, C) uint8 images.

    `saturated` of pipeline/quality.py, with 2/255, where the image of a sigmoid never comes.
    """
    levels = images / np.float32(255)
    return ((levels <= margin + 1e-6) | (levels >= 1 - margin - 1e-6)).mean((-3, -2, -1))


def zero_statistics(total: ChannelAccumulator, ranges: HistogramRange) -> dict[str, np.ndarray]:
    """Return `nonzero`, `fired`, `sparsity` and `inactive` of channels, against zero in every layer, (C,) each.

    `statistics` of pipeline/statistics.py. In a linear output, half of all positions are above zero whatever the
    channel is.
    """
    every = channel_statistics(total, ranges, np.ones(len(total.max), bool))
    return {name: every[name] for name in ("nonzero", "fired", "sparsity", "inactive")}


def best_labels(
    codes: np.ndarray, labels: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the label with the largest mean activation of each channel, and its AUROC on the same images, (C,) each.

    `by_responses` of pipeline/labels.py. The label that is chosen among many on some images is better on these images
    than on others, and every crop of a source image counts as an image.

    Args:
        codes: Histogram bins of per-image maxima, (n, C) uint8.
        labels: Label number of each image, (n,), −1 for none.
        low: Lower ends of the histograms, (C,).
        high: Upper ends, (C,).

    Returns:
        −1 and NaN for a channel whose rectified activations are all zero.
    """
    codes, labels = codes[labels >= 0], labels[labels >= 0]
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= LEAST_IMAGES)
    best, area = np.full(codes.shape[1], -1), np.full(codes.shape[1], np.nan)
    centers = np.maximum(low[:, None] + (high - low)[:, None] * np.arange(-0.5, BINS + 1) / BINS, 0)
    for channel, bins in enumerate(codes.T):
        means = np.bincount(labels, centers[channel][bins])[large] / sizes[large]
        if means.max(initial=0) > 0:
            best[channel] = large[means.argmax()]
            area[channel] = _auroc(bins[labels == best[channel]], bins)
    return best, area


def _auroc(own: np.ndarray, every: np.ndarray) -> float:
    """Return the probability that one of `own` bins is above one of the other bins, ties counting half."""
    mine = np.bincount(own, minlength=BINS + 2).astype(float)
    others = np.bincount(every, minlength=BINS + 2) - mine
    below = np.cumsum(others) - others
    pairs = mine.sum() * others.sum()
    return float((mine * (below + others / 2)).sum() / pairs) if pairs else float("nan")


def over_represented(codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels with the largest lift among the top 1 % of images, and their lifts, (C, `TOP_LABELS`) each.

    `_over` of pipeline/labels.py. A label counts with two images among the top ones and a lift above 1: with many
    labels, that is common without any relation to labels, and the two images may be crops of one source.

    Args:
        codes: Histogram bins of per-image maxima, (n, C) uint8.
        labels: Label number of each image, (n,), −1 for none.

    Returns:
        −1 and NaN where there are fewer labels.
    """
    codes, labels = codes[labels >= 0], labels[labels >= 0]
    sizes, count = np.bincount(labels), len(labels)
    top = -(-count // 100)
    over, lifts = np.full((codes.shape[1], TOP_LABELS), -1), np.full((codes.shape[1], TOP_LABELS), np.nan)
    for channel, bins in enumerate(codes.T):
        highest = np.lexsort((np.arange(count), -bins.astype(int)))[:top]
        counts = np.bincount(labels[highest], minlength=len(sizes))
        lift = counts / top / (np.maximum(sizes, 1) / count)
        names = np.flatnonzero((sizes >= LEAST_IMAGES) & (counts >= min(2, top)) & (lift > 1))
        names = names[np.lexsort((names, -counts[names], -lift[names]))][:TOP_LABELS]
        over[channel, : len(names)], lifts[channel, : len(names)] = names, lift[names]
    return over, lifts


def connectivity(
    model: Model, layers: Sequence[Layer]
) -> tuple[Mapping[str, Connectivity], Mapping[str, Connectivity]]:
    """Return the connections of layers by unfolded weights, as `find_connectivity` does by effective ones.

    `wires` of pipeline/wiring.py: normalizations are left out, a depthwise convolution between two layers multiplies
    the sum of a kernel by the *norm* of its own, which has no sign, and no channel is scaled by its deviation. It is
    computed on a copy of the network whose normalizations do not scale, and in which each depthwise kernel that is no
    layer itself is a single weight, its norm.
    """
    plain = copy.deepcopy(model.module)
    known = {layer.name.partition("#")[0] for layer in layers}
    for name, module in plain.named_modules():
        if isinstance(module, SCALED_NORMS):
            _make_unscaled(module)
        elif name not in known and is_depthwise(module):
            weight = module.get_parameter("weight")
            kernels = torch.zeros_like(weight.data).flatten(1)
            kernels[:, 0] = weight.data.flatten(1).norm(dim=1)
            weight.data = kernels.reshape(weight.shape)
    return find_connectivity(dataclasses.replace(model, module=plain), layers)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution with one input channel for each output channel."""
    groups, weight = getattr(module, "groups", 0), getattr(module, "weight", None)
    return groups > 1 and weight is not None and len(weight) == groups


def _make_unscaled(norm: nn.Module) -> None:
    """Set γ and √(σ² + ε) of a normalization to 1."""
    weight, variance, epsilon = (getattr(norm, name, None) for name in ("weight", "running_var", "eps"))
    if isinstance(weight, Tensor):
        weight.data.fill_(1)
    if isinstance(variance, Tensor) and epsilon is not None:
        variance.fill_(1 - epsilon)
