"""Penalties on the activations of a network: losses that are minimized while the objective is maximized.

Image regularizers judge the image by itself. These judge what the network computes from it, in all layers before that
of the unit.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.registry import ADDED_LATER, Registry
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import Call, Trace, trace_of
from pipeline.models.loading import Model

NETWORK_PENALTIES = Registry("network penalty")

# Channels whose statistics say nothing: of a variance below the epsilon of their normalization (channels that are
# constant over the training images), or a scale below this fraction of the layer's median (the normalized values are
# then lost to rounding in the output, where they are read).
MIN_SCALE = 1e-3

# A map of fewer positions has no useful standard deviation.
MIN_POSITIONS = 16


@dataclasses.dataclass(frozen=True)
class Normalization:
    """A batch normalization with the statistics of the training images in its output.

    A normalization of running mean μ and variance σ², scale γ and offset β maps x to y = β + γ (x - μ) / √(σ² + ε).
    Over the training images y has the mean β and the standard deviation s = |γ| √(σ² / (σ² + ε)), and
    (m(y) - β)² / s² = (m(x) - μ)² / σ² for the mean m over any positions; likewise for standard deviations. The output
    exists also where the normalization is folded into the convolution before it, the input does not.

    Attributes:
        path: Path of the module.
        tap: Where the output is read, before an activation that is fused with the normalization.
        channels: (N,) int64 channels whose statistics are compared.
        mean: (N,) float32 β.
        sd: (N,) float32 s, above 0.
        natural: Median of `deviation` over natural images; 0 if it is not measured.
    """

    path: str
    tap: Layer
    channels: Tensor
    mean: Tensor
    sd: Tensor
    natural: float = 0.0

    def to(self, device: str, natural: float) -> "Normalization":
        """Return this normalization on a device, with the deviation of natural images."""
        channels, mean, sd = (part.to(device) for part in (self.channels, self.mean, self.sd))
        return dataclasses.replace(self, channels=channels, mean=mean, sd=sd, natural=natural)

    def deviation(self, maps: Tensor) -> Tensor:
        """Return how far the statistics of each image are from those of the training images.

        The mean over channels of (m̂ - β)² / s² + (ŝ / s - 1)², with the mean m̂ and the standard deviation ŝ over the
        positions of one image: eq. 4 of Yin et al. 2020 ("Dreaming to Distill", arXiv 1912.08795) for one image instead
        of a batch, and relative to the deviation of the channel, so that channels count alike.

        Args:
            maps: (B, C, H, W) output of the normalization.

        Returns:
            (B,), at least 0; 0 for maps of fewer than `MIN_POSITIONS` positions.
        """
        if maps.shape[2] * maps.shape[3] < MIN_POSITIONS:
            return maps.new_zeros(len(maps), dtype=torch.float32)
        mean, sd = (part.index_select(1, self.channels) for part in _mean_and_sd(maps))
        return (((mean - self.mean) / self.sd).pow(2) + (sd / self.sd - 1).pow(2)).mean(dim=1)


class _MeanAndSd(torch.autograd.Function):
    """Mean and standard deviation over positions, with a gradient that is computed in one pass over the maps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(maps.to(_accumulated(maps)), dim=(2, 3), correction=0)
        # The gradient of the root is infinite at 0.
        sd = variance.clamp(min=1e-12).sqrt()
        ctx.save_for_backward(maps, mean, sd)
        return mean, sd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        maps, mean, sd = ctx.saved_tensors
        # d mean / dx = 1 / n and d sd / dx = (x - mean) / (n sd)
        count = maps.shape[2] * maps.shape[3]
        slope = grads[1] / sd / count
        offset = grads[0] / count - slope * mean
        slope, offset = (part.to(maps.dtype)[:, :, None, None] for part in (slope, offset))
        return torch.addcmul(offset, slope, maps)


def _accumulated(maps: Tensor) -> torch.dtype:
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def _mean_and_sd(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of (B, C, H, W) maps over the positions, (B, C) each."""
    return _MeanAndSd.apply(maps)


@dataclasses.dataclass(frozen=True)
class NetworkPenalty:
    """Base class of penalties on activations: a sum over the normalizations before the layer of the unit.

    A penalty is measured relative to the objective, as terms on a layer are: with weight 1, a change of the penalty by
    1 is worth as much as the current absolute value of the objective.

    Attributes:
        weight: Factor of the penalty.
        layers: Layers whose units have the penalty: "all", or "pooled", those without positions, such as class logits
            and all other features behind a global pooling. "pooled" is left out where it cannot be computed (networks
            without batch normalization, ensembles), "all" is refused there.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    layers: Literal["all", "pooled"] = dataclasses.field(default="all", metadata=ADDED_LATER)

    def applies_to(self, layer: Layer) -> bool:
        """Return whether units of `layer` have the penalty."""
        return self.layers == "all" or not layer.spatial

    def value(self, deviation: Tensor, natural: float) -> Tensor:
        """Return the loss of one normalization, (B,), from its (B,) `Normalization.deviation` and the natural one."""
        raise NotImplementedError


@NETWORK_PENALTIES.add("normalization")
@dataclasses.dataclass(frozen=True)
class NormalizationStatistics(NetworkPenalty):
    """Excess of the deviation from the statistics of batch normalizations over that of the median natural image.

    The sum over the normalizations before the layer of max(0, d - n). d is the mean over channels of
    (m̂ - m)² / s² + (ŝ / s - 1)² with the mean m and the standard deviation s of the channel over the training images
    and m̂ and ŝ over the positions of the image; n is the median of d over natural images. Yin et al. 2020 ("Dreaming to
    Distill", arXiv 1912.08795), eq. 4, for single images. With `layers` "pooled" only units of layers without positions
    have the penalty, such as classes.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def value(self, deviation: Tensor, natural: float) -> Tensor:
        """Return max(0, deviation - natural), (B,)."""
        return (deviation - natural).clamp(min=0)


@dataclasses.dataclass(frozen=True)
class NaturalDeviations:
    """Deviations of natural images.

    Attributes:
        source: Digest of the images.
        images: Number of images.
        medians: (path, median of `Normalization.deviation` over the images) of each normalization.
    """

    source: str
    images: int
    medians: tuple[tuple[str, float], ...]

    def of(self, normalizations: Sequence[Normalization], device: str) -> list[Normalization]:
        """Return normalizations with their natural deviation, on a device."""
        medians = dict(self.medians)
        return [n.to(device, medians.get(n.path, 0.0)) for n in normalizations]


def weighted_penalties(
    penalties: Sequence[NetworkPenalty], deviations: Sequence[tuple[Tensor, float]]
) -> Tensor | None:
    """Return the weighted sum of penalties over normalizations, (B,); None if there is none.

    Args:
        penalties: The penalties.
        deviations: (B,) `Normalization.deviation` and `Normalization.natural` of each normalization.
    """
    losses = [p.weight * p.value(*deviation) for p in penalties for deviation in deviations]
    return torch.stack(losses).sum(0) if losses else None


def normalizations_before(model: Model, layer: Layer) -> list[Normalization]:
    """Return the batch normalizations that compute maps before the output of `layer`, in their order.

    The normalization that belongs to the layer itself is not one of them: it would hold the unit at its own mean.

    Args:
        model: The original network: the copies with folded normalizations have no statistics.
        layer: The layer of the unit.
    """
    trace = trace_of(model)
    num_calls = collections.Counter(call.path for call in trace.calls)
    end = next((call for call in trace.calls if call.key == (layer.module, layer.call)), None)
    found = []
    for call in trace.calls:
        if end is not None and call.key == end.key:
            break
        module = trace.modules[call.path]
        is_own = end is not None and (call.output == end.output or call.path == layer.module)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and num_calls[call.path] == 1 and not is_own:
            normalization = _normalization(trace, call, module)
            if normalization is not None:
                found.append(normalization)
    return found


def _normalization(trace: Trace, call: Call, module: nn.modules.batchnorm._BatchNorm) -> Normalization | None:
    """Return a normalization of maps with the statistics of its output; None if it has none that can be compared."""
    if module.running_mean is None or module.running_var is None or module.training or len(call.shape) != 4:
        return None
    if call.shape[2] * call.shape[3] < MIN_POSITIONS:
        return None
    variance = module.running_var.detach().float()
    ones = torch.ones_like(variance)
    scale = ones if module.weight is None else module.weight.detach().float().abs()
    offset = torch.zeros_like(ones) if module.bias is None else module.bias.detach().float()
    kept = ((variance > module.eps) & (scale > MIN_SCALE * scale.median())).nonzero()[:, 0]
    if not len(kept):
        return None
    sd = scale * (variance / (variance + module.eps)).sqrt()
    fused = f"{call.path}.act"
    path, side = (fused, "in") if fused in trace.modules else (call.path, "out")
    _, channels, height, width = call.shape
    # Not the path alone: it can be a layer that is read too, after the activation that is fused with it.
    name = f"normalized values of {call.path}"
    tap = Layer(name, "norm", path, 1, side, "maps", channels, height, width, call.cost)
    return Normalization(call.path, tap, kept, offset[kept], sd[kept])
