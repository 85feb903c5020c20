"""Exact statistics of channels over a dataset: sums of integers, which do not depend on splits or order.

A sum of floats depends on the order of its terms. Therefore the contribution of each image is first rounded to a
multiple of a small unit (for most sums 2^-32 of the channel's scale) and counted in units: sums of integers are exact.
The scale, the center of the squares and the range of the histogram are measured on a first sample of images
(`HistogramRange`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels import spatial_stats
from pipeline.kernels.transfers import CPU, upload

# Bins of a histogram between `low` and `high`. There is one more at each end, for values outside this range.
BINS = 254

# Histograms of so many channels are counted at a time: their table fits into the processor's cache.
HISTOGRAM_CHANNELS = 512

# Contributions are counted in units of 2^-bits and clipped to 2^47 units. A float64 sum of at most `BLOCK` of them is
# a sum of integers below 2^53, and therefore exact.
BLOCK = 64
_UNIT_BITS = {
    "shift": 32,
    "square": 32,
    "positive": 32,
    "rate": 32,
    "power": 32,
    "first": 32,
    "second": 28,
    "third": 24,
    "fourth": 20,
}
_MAX_UNITS = 2.0**47

# The standardized maximum u is clipped to ± this, so that u⁴ is at most _MAX_UNITS units.
_MAX_STANDARDIZED = 107.0

# A kurtosis that may be wrong by more is not reported.
_KURTOSIS_ERROR = 0.01


@dataclasses.dataclass(frozen=True)
class HistogramRange:
    """Ranges and scales of C channels, measured on a first sample of images; (C,) float64 each.

    Attributes:
        low: Lower end of the histogram of per-image maxima: half a span below the smallest maximum of the sample.
        high: Upper end of the histogram: one span above the largest maximum of the sample.
        centre: Mean activation.
        scale: Power of two, at least the distance of any activation of the sample from `centre`.
    """

    low: np.ndarray
    high: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def from_sample(
        cls, peaks: np.ndarray, lows: np.ndarray, means: np.ndarray, layers: Sequence[int]
    ) -> "HistogramRange":
        """Measure ranges on a sample of n images.

        The span of a channel is the range of its maxima in the sample. A channel whose maxima hardly vary in the
        sample gets a span derived from the median span of its layer.

        Args:
            peaks: Maximum of each image and channel, (n, C).
            lows: Minimum of each image and channel, (n, C).
            means: Spatial mean of each image and channel, (n, C).
            layers: Number of channels of each layer.
        """
        channels = peaks.shape[1]
        if not len(peaks):
            zero, one = np.zeros(channels), np.ones(channels)
            return cls(-one, one, zero, one)
        peaks, means = peaks.astype(np.float64), means.astype(np.float64)
        smallest, largest = peaks.min(0), peaks.max(0)
        # The order of images in the sample is fixed, and with it this float sum. The reduction subtracts the center in
        # float32.
        centre = (means.sum(0) / len(means)).astype(np.float32).astype(np.float64)
        spans = []
        for span in np.split(largest - smallest, np.cumsum(layers)[:-1]):
            positive = span[span > 0]
            typical = float(np.median(positive)) if len(positive) else 1.0
            spans.append(np.where(span > 0, np.maximum(span, typical / 8), typical))
        span = np.concatenate(spans)
        distance = np.maximum(np.maximum(largest - centre, centre - lows.astype(np.float64).min(0)), span)
        return cls(smallest - span / 2, largest + span, centre, 2.0 ** np.ceil(np.log2(distance)))

    def normalize(self, peaks: np.ndarray) -> np.ndarray:
        """Map maxima (n, C) to positions in the range, 0 at `low` and 1 at `high`; float64."""
        return (peaks - self.low) * (1 / (self.high - self.low))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


_MAXIMA = ("max", "best_mean")
_MINIMA = ("min", "peak_least", "least_mean")


@dataclasses.dataclass(frozen=True)
class ChannelAccumulator:
    """Sums over images, for C channels in L layers. Accumulators of disjoint sets of images are added with `+`.

    Sums are (C,) int64 in units of 2^-bits (`_UNIT_BITS`), extremes (C,) float32. In the descriptions, d is the
    difference to `HistogramRange.centre`, in scales. u is the standardized maximum of an image: 10 times its position
    in the histogram range, less 4, which is about the number of standard deviations, clipped to ±107.

    Attributes:
        images: Number of images.
        shift: Sum of the spatial means of d.
        square: Sum of the spatial means of d².
        positive: Sum of the share of positions with a positive activation.
        fired: Number of images with a positive maximum.
        first: Sum of u.
        second: Sum of u².
        third: Sum of u³.
        fourth: Sum of u⁴.
        rate: Sum of the rectified maxima, in scales.
        power: Sum of the squares of the rectified maxima, in scales.
        histogram: Histogram of the maxima, (C, BINS + 2) int32.
        crowd: Sum of the population sparsity of each layer, (L,), in units of 2^-32.
        crowded: Number of images for which the population sparsity is defined, (L,): those with a positive maximum in
            any channel of the layer.
        max: Largest activation.
        best_mean: Largest spatial mean.
        min: Smallest activation.
        peak_least: Smallest maximum of an image.
        least_mean: Smallest spatial mean.
    """

    images: int
    shift: np.ndarray
    square: np.ndarray
    positive: np.ndarray
    fired: np.ndarray
    first: np.ndarray
    second: np.ndarray
    third: np.ndarray
    fourth: np.ndarray
    rate: np.ndarray
    power: np.ndarray
    histogram: np.ndarray
    crowd: np.ndarray
    crowded: np.ndarray
    max: np.ndarray
    best_mean: np.ndarray
    min: np.ndarray
    peak_least: np.ndarray
    least_mean: np.ndarray

    def __add__(self, other: "ChannelAccumulator") -> "ChannelAccumulator":
        combined = {}
        for field in dataclasses.fields(self):
            if field.name in _MAXIMA:
                combine = np.maximum
            elif field.name in _MINIMA:
                combine = np.minimum
            else:
                combine = np.add
            combined[field.name] = combine(getattr(self, field.name), getattr(other, field.name))
        return ChannelAccumulator(**{**combined, "images": self.images + other.images})

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ChannelAccumulator":
        """Create from the result of `arrays`."""
        return cls(**{**{f.name: arrays[f.name] for f in dataclasses.fields(cls)}, "images": int(arrays["images"])})


class RunningSums:
    """Accumulates the reduced activations of images on one device, of which nothing is read before `total`.

    Args:
        ranges: Ranges and scales of the channels.
        layers: Number of channels of each layer.
        compile: Whether to use the compiled loop, on the CPU.
        device: Device of the activations.
    """

    def __init__(
        self,
        ranges: HistogramRange,
        layers: Sequence[int],
        compile: bool = False,
        device: torch.device = CPU,
    ) -> None:
        channels = sum(layers)
        self._ranges = ranges
        # A compiler for a GPU may contract products and sums, which changes the rounding of contributions.
        self._sum_block: Callable[..., Any] = (
            spatial_stats.compile_or_fallback(block_sums) if compile and device.type == "cpu" else block_sums
        )
        scaling = np.stack([1 / ranges.scale, ranges.low, 1 / (ranges.high - ranges.low)])
        self._scaling = upload(scaling, device)
        self._images = 0
        self._sums = torch.zeros(len(_UNIT_BITS), channels, dtype=torch.int64, device=device)
        self._fired = torch.zeros(channels, dtype=torch.int64, device=device)
        self._maxima = torch.full((len(_MAXIMA), channels), -torch.inf, device=device)
        self._minima = torch.full((len(_MINIMA), channels), torch.inf, device=device)
        self._histogram = torch.zeros(channels, BINS + 2, dtype=torch.int32, device=device)
        self._population = PopulationSparsity(layers, device)
        self._crowd = torch.zeros(len(layers), dtype=torch.int64, device=device)
        self._crowded = torch.zeros(len(layers), dtype=torch.int64, device=device)

    def add(self, reduced: Tensor, dense: bool = False) -> Tensor:
        """Add n images.

        Args:
            reduced: Maximum, minimum, mean d, mean d² and share of positive positions, (5, n, C) float32, as
                `spatial_stats.Reducer` returns them.
            dense: Whether to count bins by an operation of the device.

        Returns:
            The histogram bins of the maxima, (n, C) uint8.
        """
        bins = []
        for block in zip(*(row.split(BLOCK) for row in reduced), strict=True):
            block_bins, sums, maxima, minima, fired = self._sum_block(*block, self._scaling)
            self._sums += sums.long()
            self._fired += fired
            torch.maximum(self._maxima, maxima, out=self._maxima)
            torch.minimum(self._minima, minima, out=self._minima)
            crowd = self._population(block[spatial_stats.MAXIMUM])
            self._crowd += (crowd.nan_to_num() * 2.0**32).round().sum(0).long()
            self._crowded += crowd.isfinite().sum(0)
            bins.append(block_bins)
        self._images += reduced.shape[1]
        joined = torch.cat(bins)
        (_count_on_device if dense else _count)(self._histogram, joined)
        return joined

    def total(self) -> ChannelAccumulator:
        """Return the accumulator of all images so far."""

        def array(values: Tensor) -> np.ndarray:
            return values.to("cpu", copy=True).numpy()

        largest, largest_shift = array(self._maxima)
        smallest, smallest_peak, smallest_shift = array(self._minima)
        return ChannelAccumulator(
            images=self._images,
            fired=array(self._fired),
            histogram=array(self._histogram),
            crowd=array(self._crowd),
            crowded=array(self._crowded),
            max=largest,
            best_mean=(self._ranges.centre + largest_shift).astype(np.float32),
            min=smallest,
            peak_least=smallest_peak,
            least_mean=(self._ranges.centre + smallest_shift).astype(np.float32),
            **dict(zip(_UNIT_BITS, array(self._sums), strict=True)),
        )


def bins_of(positions: Tensor) -> Tensor:
    """Return uint8 bins of positions in the histogram range: 0 below 0, 1 to `BINS` in [0, 1), `BINS` + 1 above."""
    return ((positions * BINS).floor().clamp(-1, BINS) + 1).to(torch.uint8)


def block_sums(
    peaks: Tensor, lows: Tensor, shifts: Tensor, squares: Tensor, positives: Tensor, scaling: Tensor
) -> tuple[Tensor, ...]:
    """Compute the sums of a block of at most `BLOCK` images.

    Each contribution is rounded by itself, and sums are never rounded, so that neither the order of images nor the
    number of threads matters.

    Args:
        peaks: Maximum of each image and channel, (n, C) float32, as all of the following.
        lows: Minimum.
        shifts: Mean d, with d the difference to the center.
        squares: Mean d².
        positives: Share of positive positions.
        scaling: 1 / scale, the lower end of the histogram range, and 1 / its length, (3, C) float64.

    Returns:
        Histogram bins of the maxima, (n, C) uint8; sums in units and in the order of `_UNIT_BITS`, (9, C) float64; the
        largest `peaks` and `shifts`, (2, C); the smallest `lows`, `peaks` and `shifts`, (3, C); the number of images
        with a positive maximum, (C,).
    """
    inverse_scale, low, inverse_length = scaling[0], scaling[1], scaling[2]
    peak = peaks.double()
    rate = peak.clamp(min=0) * inverse_scale
    position = (peak - low) * inverse_length
    standardized = (position * 10 - 4).clamp(-_MAX_STANDARDIZED, _MAX_STANDARDIZED)
    second = standardized * standardized
    contributions = {
        "shift": shifts.double() * inverse_scale,
        "square": squares.double() * inverse_scale * inverse_scale,
        "positive": positives.double(),
        "rate": rate,
        "power": rate * rate,
        "first": standardized,
        "second": second,
        "third": second * standardized,
        "fourth": second * second,
    }
    sums = [
        (contributions[name] * 2.0**bits).clamp(-_MAX_UNITS, _MAX_UNITS).round().sum(0)
        for name, bits in _UNIT_BITS.items()
    ]
    maxima = [peaks.amax(0), shifts.amax(0)]
    minima = [lows.amin(0), peaks.amin(0), shifts.amin(0)]
    return bins_of(position), torch.stack(sums), torch.stack(maxima), torch.stack(minima), (peaks > 0).sum(0)


def _count(histogram: Tensor, bins: Tensor) -> None:
    """Add the bins (n, C) of each channel to its histogram, (C, BINS + 2) int32, on the CPU."""
    counts, codes = histogram.numpy(), bins.numpy()
    for start in range(0, len(counts), HISTOGRAM_CHANNELS):
        part = counts[start : start + HISTOGRAM_CHANNELS]
        flat = np.arange(len(part)) * (BINS + 2) + codes[:, start : start + HISTOGRAM_CHANNELS]
        part += np.bincount(flat.ravel(), minlength=part.size).reshape(part.shape)


def _count_on_device(histogram: Tensor, bins: Tensor) -> None:
    """As `_count`, by one operation of any device: sums of integers are exact in any order."""
    columns = bins.T.long()
    histogram.scatter_add_(1, columns, histogram.new_ones(()).expand_as(columns))


class PopulationSparsity:
    """Sparsity over the rectified maxima of all channels of a layer, for L layers at once.

    Args:
        layers: Number of channels of each layer.
        device: Device of the maxima.
    """

    def __init__(self, layers: Sequence[int], device: torch.device = CPU) -> None:
        starts = np.cumsum([0, *layers]).tolist()
        order = sorted(range(len(layers)), key=lambda i: layers[i])
        # Layers with the same number of channels are summed together.
        self._groups = [
            [(starts[i], starts[i] + channels) for i in group]
            for channels, group in itertools.groupby(order, key=lambda i: layers[i])
        ]
        self._order = upload(np.argsort(order), device)
        self._count = upload(np.array(layers, np.float64), device)

    def __call__(self, peaks: Tensor) -> Tensor:
        """Return the sparsity, (n, L) float64, from maxima (n, C) float32; NaN where no maximum is positive."""
        total, squares = [], []
        for spans in self._groups:
            rates = torch.stack([peaks[:, start:end] for start, end in spans], 1).clamp_(min=0).double()
            squares.append(_sum_in_fixed_order(rates * rates))
            total.append(_sum_in_fixed_order(rates))
        total_by_layer, squares_by_layer = (torch.cat(x, 1).index_select(1, self._order) for x in (total, squares))
        return sparsity(total_by_layer, squares_by_layer, self._count)


def _sum_in_fixed_order(values: Tensor) -> Tensor:
    """Return the sums over the last axis of a tensor, which it overwrites.

    One half is added to the other until one value is left: the order of the terms, and with it the rounding, does not
    depend on the device, the number of threads, or the other axes.
    """
    count = values.shape[-1]
    while count > 1:
        half = (count + 1) // 2
        values[..., : count - half] += values[..., half:count]
        count = half
    return values[..., 0]


Numbers = TypeVar("Numbers", np.ndarray, Tensor)


def sparsity(total: Numbers, squares: Numbers, count: Numbers | float) -> Numbers:
    """Return Treves–Rolls sparsity in the form of Vinje and Gallant (2000): (1 − (Σr/n)² / (Σr²/n)) / (1 − 1/n).

    It is 0 if all rates are equal, 1 if only one rate is positive, and NaN if none is.

    Args:
        total: Sum of the rates r ≥ 0 of a channel.
        squares: Sum of the squares of these rates.
        count: Number n of rates.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 - total * total / (count * squares)) / (1 - 1 / count)


def standard_deviation(total: ChannelAccumulator, ranges: HistogramRange) -> np.ndarray:
    """Return the standard deviation of each channel over all positions of all images, (C,) float64."""
    n = max(total.images, 1)
    shift, square = (getattr(total, name) / 2.0 ** _UNIT_BITS[name] / n for name in ("shift", "square"))
    return ranges.scale * np.sqrt(np.maximum(square - shift**2, 0))


def _excess_kurtosis(mean: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the excess kurtosis m₄ / m₂² − 3 of the standardized maxima, (C,), from their raw moments.

    Each moment may be wrong by half a unit (`_UNIT_BITS`). The bound of the error that follows is, to first order, the
    sum over the moments of half a unit times the size of the derivative; beyond `_KURTOSIS_ERROR` the result is NaN.
    """
    first, second, third, fourth = (mean[name] for name in ("first", "second", "third", "fourth"))
    half = {name: 2.0 ** -(bits + 1) for name, bits in _UNIT_BITS.items()}
    variance = second - first**2
    central = fourth - 4 * third * first + 6 * second * first**2 - 3 * first**4
    central_error = (
        half["fourth"]
        + half["third"] * np.abs(4 * first)
        + half["second"] * 6 * first**2
        + half["first"] * np.abs(-4 * third + 12 * second * first - 12 * first**3)
    )
    variance_error = half["second"] + half["first"] * np.abs(2 * first)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = central_error / variance**2 + 2 * np.abs(central) / np.abs(variance) ** 3 * variance_error
        return np.where((variance > 0) & (error <= _KURTOSIS_ERROR), central / variance**2 - 3, np.nan)


def channel_statistics(
    total: ChannelAccumulator, ranges: HistogramRange, rectified: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute the statistics of each channel that an atlas stores.

    `nonzero`, `fired`, `sparsity` and `inactive` compare activations with 0, which means something only before and
    behind a rectifier (`pipeline.layers.rectifiers`). Elsewhere they are left out: NaN, and not inactive. The channel's
    median in place of 0 would say nothing either: half of all positions lie above it by definition.

    Args:
        total: Sums over all images, of C channels.
        ranges: Ranges and scales of the channels.
        rectified: Whether zero is a threshold of the values of each channel, (C,) bool.

    Returns:
        Arrays (C,) by name, float32 unless stated otherwise:

        - over all positions of all images: `mean`, `sd`, `max`, `min`, and `nonzero`, the share of positive values;
        - over the spatial means of images: the largest `best_mean` and the smallest `least_mean`;
        - over the maxima of images: `fired`, the share of positive ones, lifetime `sparsity` of the rectified maxima,
          and excess `kurtosis`, NaN where the maxima vary so little that rounding may change it by more than
          `_KURTOSIS_ERROR`;
        - `inactive`, bool: whether no activation was positive.
    """
    n = max(total.images, 1)
    mean = {name: getattr(total, name) / 2.0**bits / n for name, bits in _UNIT_BITS.items()}
    values = {
        "mean": ranges.centre + ranges.scale * mean["shift"],
        "sd": standard_deviation(total, ranges),
        "max": total.max,
        "min": total.min,
        "nonzero": mean["positive"],
        "fired": total.fired / n,
        "best_mean": total.best_mean,
        "least_mean": total.least_mean,
        "sparsity": sparsity(mean["rate"] * n, mean["power"] * n, np.array(float(n)))
        if n > 1
        else np.full(len(total.max), np.nan),
        "kurtosis": _excess_kurtosis(mean),
    }
    for name in ("nonzero", "fired", "sparsity"):
        values[name] = np.where(rectified, values[name], np.nan)
    statistics = {name: value.astype(np.float32) for name, value in values.items()}
    return {**statistics, "inactive": rectified & ~(total.max > 0)}
