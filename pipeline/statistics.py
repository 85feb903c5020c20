"""What a channel does over all photographs: sums that can be added in any split.

Sums are float64. Ranges are merged in the order of their photographs, so that the last bit does not depend
on which worker finished first.
"""

import dataclasses

import numpy as np
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tally:
    """Running sums of C channels over n photographs.

    `total` is the sum of spatial means; `positive` of the shares of positions above zero (what a ReLU would
    let through); `maximum` the largest response anywhere; `best_mean` the largest spatial mean of one photograph.
    """

    images: int
    total: np.ndarray
    positive: np.ndarray
    maximum: np.ndarray
    best_mean: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "Tally":
        """Of no photograph."""
        zero, least = np.zeros(channels), np.full(channels, -np.inf, np.float32)
        return cls(0, zero, zero.copy(), least, least.copy())

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.images + other.images,
            self.total + other.total,
            self.positive + other.positive,
            np.maximum(self.maximum, other.maximum),
            np.maximum(self.best_mean, other.best_mean),
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """As they go into a shard."""
        return {k: np.asarray(getattr(self, k)) for k in ("images", "total", "positive", "maximum", "best_mean")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Tally":
        """The inverse of `arrays`."""
        return cls(int(arrays["images"]), *(arrays[k] for k in ("total", "positive", "maximum", "best_mean")))

    def statistics(self) -> dict[str, np.ndarray]:
        """(C,) float32 each: mean, max, nonzero (share of positions above zero), best_mean."""
        n = max(self.images, 1)
        named = {
            "mean": self.total / n,
            "max": self.maximum,
            "nonzero": self.positive / n,
            "best_mean": self.best_mean,
        }
        return {k: v.astype(np.float32) for k, v in named.items()}


def tally(maps: Tensor) -> Tally:
    """The sums of one batch of (B, C, H, W) maps, reduced on their device."""
    flat = maps.float().flatten(2)
    mean = flat.mean(-1)
    positive = (flat > 0).float().mean(-1)
    return Tally(
        flat.shape[0],
        mean.double().sum(0).cpu().numpy(),
        positive.double().sum(0).cpu().numpy(),
        flat.amax(dim=(0, 2)).cpu().numpy(),
        mean.amax(0).cpu().numpy(),
    )
