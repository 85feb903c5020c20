"""What a channel does over all photographs, in whole numbers: any split, added in any order, is the same sum.

A sum of floats depends on its order. Here every image's contribution is first rounded to a multiple of a small
unit, 2^-32 of the channel's own scale, say, and counted in units: sums of whole numbers have no order. The scale, the
centre of the squares and the range of the histogram come from a first sample of photographs (`HistogramRange`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels import spatial_stats

BINS = 254  # of a histogram, between `low` and `high`; one more at each end for what lies beyond

# So many channels are counted at a time: their table stays in the processor's own memory.
NEAR = 512

# Contributions are counted in units of 2^-bits, and one of more than 2^47 units counts as that many. Float64 sums of
# at most BLOCK of them are then sums of whole numbers below 2^53: exact.
BLOCK = 64
_BITS = {
    "shift": 32, "square": 32, "positive": 32, "rate": 32, "power": 32,
    "first": 32, "second": 28, "third": 24, "fourth": 20,
}  # fmt: skip
_MOST = 2.0**47
# The place u of a maximum counts as at most this far out, so that u⁴ stays within _MOST units.
_FAR = 107.0


@dataclasses.dataclass(frozen=True)
class HistogramRange:
    """What a first sample of photographs says of C channels; (C,) float64 each.

    `low` … `high` is the range of the histogram of per-image maxima: the sample's, half a span wider below and a
    whole one above. `centre` is the mean, `scale` a power of two not below any distance from it.
    """

    low: np.ndarray
    high: np.ndarray
    centre: np.ndarray
    scale: np.ndarray

    @classmethod
    def measured(
        cls, peaks: np.ndarray, lows: np.ndarray, means: np.ndarray, layers: Sequence[int]
    ) -> "HistogramRange":
        """From (n, C) maxima, minima and means of n images; `layers` are the channel counts of the layers in turn.

        A channel that hardly moves in the sample gets a span like that of its neighbours in the layer.
        """
        channels = peaks.shape[1]
        if not len(peaks):
            zero, one = np.zeros(channels), np.ones(channels)
            return cls(-one, one, zero, one)
        peaks, means = peaks.astype(np.float64), means.astype(np.float64)
        least, most = peaks.min(0), peaks.max(0)
        own = most - least
        # The order of images in the sample is fixed, so this float sum is too. Reductions subtract it in float32.
        centre = (means.sum(0) / len(means)).astype(np.float32).astype(np.float64)
        spans = []
        for part in np.split(own, np.cumsum(layers)[:-1]):
            moving = part[part > 0]
            typical = float(np.median(moving)) if len(moving) else 1.0
            spans.append(np.where(part > 0, np.maximum(part, typical / 8), typical))
        span = np.concatenate(spans)
        reach = np.maximum(np.maximum(most - centre, centre - lows.astype(np.float64).min(0)), span)
        return cls(least - span / 2, most + span, centre, 2.0 ** np.ceil(np.log2(reach)))

    def places(self, peaks: np.ndarray) -> np.ndarray:
        """(n, C) maxima in parts of the range: 0 at `low`, 1 at `high`; float64."""
        return (peaks - self.low) * (1 / (self.high - self.low))

    def arrays(self) -> dict[str, np.ndarray]:
        """As they go into a shard."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


_HIGHEST = ("max", "best_mean")
_LOWEST = ("min", "peak_least", "least_mean")


@dataclasses.dataclass(frozen=True)
class ChannelAccumulator:
    """Sums over `images` photographs, of C channels in L layers; (C,) int64 unless said otherwise.

    Over positions: `shift` and `square` (means of d and d² in scales, d the distance to the centre), `positive`
    (share above zero). Over images: `fired` (those with a maximum above zero), `first` … `fourth` (powers of u, ten
    times the maximum's place in the range less four tenths: in about standard deviations, and no further out than
    107), `rate` and `power` (the rectified maximum and its square, in scales), `histogram` (C, 256). `crowd` (L,)
    sums population sparsity over the `crowded` (L,) images in which anything of the layer fired. The extremes are
    float32.
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

    @classmethod
    def empty(cls, layers: Sequence[int]) -> "ChannelAccumulator":
        """Of no photograph; `layers` are the channel counts of the layers in turn."""
        channels = sum(layers)
        values: dict[str, Any] = {name: np.zeros(channels, np.int64) for name in (*_BITS, "fired")}
        values |= {name: np.zeros(len(layers), np.int64) for name in ("crowd", "crowded")}
        values |= {name: np.full(channels, -np.inf, np.float32) for name in _HIGHEST}
        values |= {name: np.full(channels, np.inf, np.float32) for name in _LOWEST}
        return cls(images=0, histogram=np.zeros((channels, BINS + 2), np.int32), **values)

    def __add__(self, other: "ChannelAccumulator") -> "ChannelAccumulator":
        joined = {}
        for field in dataclasses.fields(self):
            join = np.maximum if field.name in _HIGHEST else np.minimum if field.name in _LOWEST else np.add
            joined[field.name] = join(getattr(self, field.name), getattr(other, field.name))
        return ChannelAccumulator(**{**joined, "images": self.images + other.images})

    def arrays(self) -> dict[str, np.ndarray]:
        """As they go into a shard."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ChannelAccumulator":
        """The inverse of `arrays`."""
        return cls(**{**{f.name: arrays[f.name] for f in dataclasses.fields(cls)}, "images": int(arrays["images"])})


def tally(
    peaks: np.ndarray,
    lows: np.ndarray,
    shifts: np.ndarray,
    squares: np.ndarray,
    positives: np.ndarray,
    ranges: HistogramRange,
    layers: Sequence[int],
    compile: bool = False,
) -> tuple[ChannelAccumulator, np.ndarray]:
    """The sums of n images, (n, C) float32 each as `reduction` gives them, and the codes of their maxima, (n, C)."""
    count = spatial_stats.compiled(counted) if compile else counted
    values = [torch.from_numpy(np.ascontiguousarray(a)) for a in (peaks, lows, shifts, squares, positives)]
    within = [torch.from_numpy(a) for a in (1 / ranges.scale, ranges.low, 1 / (ranges.high - ranges.low))]
    sums = np.zeros((len(_BITS), peaks.shape[1]), np.int64)
    found = []
    for blocks in zip(*(v.split(BLOCK) for v in values), strict=True):
        codes, added, *ends = count(*blocks, *within)
        sums += added.long().numpy()
        found.append((codes, *ends))
    parts = list(zip(*found, strict=True))
    codes = torch.cat(parts[0]).numpy()
    highest, lowest, fired = (torch.stack(part) for part in parts[1:])
    (most, best), (least, peak_least, worst) = highest.amax(0).numpy(), lowest.amin(0).numpy()
    starts = np.cumsum([0, *layers[:-1]])
    fires = np.maximum(peaks, np.float32(0)).astype(np.float64)
    total, squared = np.add.reduceat(fires, starts, axis=1), np.add.reduceat(fires * fires, starts, axis=1)
    crowd = sparsity(total, squared, np.asarray(layers, np.float64))
    best_mean, least_mean = ((ranges.centre + end).astype(np.float32) for end in (best, worst))
    added = ChannelAccumulator(
        images=len(peaks),
        fired=fired.sum(0).numpy(),
        histogram=_histogram(codes),
        crowd=np.rint(np.nan_to_num(crowd) * 2.0**32).sum(0).astype(np.int64),
        crowded=np.isfinite(crowd).sum(0),
        max=most,
        best_mean=best_mean,
        min=least,
        peak_least=peak_least,
        least_mean=least_mean,
        **dict(zip(_BITS, sums, strict=True)),
    )
    return added, codes


def bins_of(places: Tensor) -> Tensor:
    """Places in the range (0 at its low end, 1 at its high) → bins, uint8: 0 below it, 1 … 254 inside, 255 above."""
    return ((places * BINS).floor().clamp(-1, BINS) + 1).to(torch.uint8)


def counted(
    peaks: Tensor,
    lows: Tensor,
    shifts: Tensor,
    squares: Tensor,
    positives: Tensor,
    per: Tensor,
    low: Tensor,
    width: Tensor,
) -> tuple[Tensor, ...]:
    """(n, C) float32 of n images → codes (n, C), sums (9, C), two highest and three lowest ends, how many fired.

    Sums are float64, whole numbers of the units of `_BITS` and in its order. Ends are of the maxima and means, and of
    minima, maxima and means. `per` is 1 / scale; `low` and `width` (1 / span) place a maximum in the range. Each
    contribution is rounded by itself, and no sum is rounded at all, so that order and number of threads do not matter.
    """
    peak = peaks.double()
    rate = peak.clamp(min=0) * per
    inside = (peak - low) * width
    place = (inside * 10 - 4).clamp(-_FAR, _FAR)
    second = place * place
    contributions = {
        "shift": shifts.double() * per,
        "square": squares.double() * per * per,
        "positive": positives.double(),
        "rate": rate,
        "power": rate * rate,
        "first": place,
        "second": second,
        "third": second * place,
        "fourth": second * second,
    }
    sums = [(contributions[k] * 2.0**bits).clamp(-_MOST, _MOST).round().sum(0) for k, bits in _BITS.items()]
    highest, lowest = [peaks.amax(0), shifts.amax(0)], [lows.amin(0), peaks.amin(0), shifts.amin(0)]
    return bins_of(inside), torch.stack(sums), torch.stack(highest), torch.stack(lowest), (peaks > 0).sum(0)


def _histogram(codes: np.ndarray) -> np.ndarray:
    counts = np.empty((codes.shape[1], BINS + 2), np.int32)
    for start in range(0, len(counts), NEAR):
        part = counts[start : start + NEAR]
        flat = np.arange(len(part)) * (BINS + 2) + codes[:, start : start + NEAR]
        part[:] = np.bincount(flat.ravel(), minlength=part.size).reshape(part.shape)
    return counts


def sparsity(total: np.ndarray, squares: np.ndarray, count: np.ndarray | float) -> np.ndarray:
    """Treves–Rolls sparsity as Vinje and Gallant (2000) write it, from Σr, Σr² of `count` rates r ≥ 0.

    (1 − (Σr/n)² / (Σr²/n)) / (1 − 1/n): 0 where all answer alike, 1 where one alone does; NaN where none does.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return (1 - total**2 / (count * squares)) / (1 - 1 / np.asarray(count, np.float64))


def statistics(total: ChannelAccumulator, ranges: HistogramRange) -> dict[str, np.ndarray]:
    """What an atlas keeps of each channel, by name; (C,) float32, `inactive` bool.

    `mean`, `sd`, `max`, `min` and `nonzero` (share above zero) are over positions; `fired` is the share of images
    with any position above zero; `best_mean` and `least_mean` are of one image's spatial mean. `sparsity` (lifetime)
    and `kurtosis` (excess) are over the per-image maxima, rectified for the first.
    """
    n = max(total.images, 1)
    mean = {name: getattr(total, name) / 2.0**bits / n for name, bits in _BITS.items()}
    first, second, third, fourth = (mean[k] for k in ("first", "second", "third", "fourth"))
    variance = second - first**2
    central = fourth - 4 * third * first + 6 * second * first**2 - 3 * first**4
    with np.errstate(divide="ignore", invalid="ignore"):
        # Below 1e-9 of the sample's own variance the moments have no digits left.
        kurtosis = np.where(variance > 1e-9, central / variance**2 - 3, np.nan)
    named = {
        "mean": ranges.centre + ranges.scale * mean["shift"],
        "sd": ranges.scale * np.sqrt(np.maximum(mean["square"] - mean["shift"] ** 2, 0)),
        "max": total.max,
        "min": total.min,
        "nonzero": mean["positive"],
        "fired": total.fired / n,
        "best_mean": total.best_mean,
        "least_mean": total.least_mean,
        "sparsity": sparsity(mean["rate"] * n, mean["power"] * n, n) if n > 1 else np.full(len(total.max), np.nan),
        "kurtosis": kurtosis,
    }
    return {**{k: v.astype(np.float32) for k, v in named.items()}, "inactive": ~(total.max > 0)}
