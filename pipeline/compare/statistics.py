"""Medians with bootstrap intervals and paired sign tests over units."""

import dataclasses
import functools
import math

import numpy as np

DRAWS = 4000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Median:
    """A median over `units` units with the ends `low` and `high` of its interval; NaN without units."""

    units: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class PairedTest:
    """Comparison of two contenders over the units that both have.

    Attributes:
        difference: Median of first − second.
        wins: Number of units for which the first is better.
        losses: Number of units for which the first is worse.
        ties: Number of units with equal values.
        p: Two-sided p value of the sign test.
    """

    difference: Median
    wins: int
    losses: int
    ties: int
    p: float


def median(values: np.ndarray, seed: int = 0, draws: int = DRAWS, level: float = LEVEL) -> Median:
    """Return the median of the finite values with its bootstrap percentile interval.

    Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7, 1979: resample the n units with
    replacement `draws` times; the interval goes from quantile (1 − level) / 2 of the resamples' medians to
    (1 + level) / 2. A resample of sorted values x is x[⌊n u⌋] of n uniform u, so its middle value is x[⌊n u₍ₖ₎⌋] of the
    middle u₍ₖ₎, which is drawn directly. No resample is computed, so 20,000 units take as long as 20.

    Args:
        values: (n,) values.
        seed: Seed of the bootstrap.
        draws: Number of resamples.
        level: Confidence level of the interval.
    """
    ordered = np.sort(np.asarray(values, np.float64)[np.isfinite(values)])
    if not len(ordered):
        return Median(0, math.nan, math.nan, math.nan)
    first, second = _middles(len(ordered), seed, draws)
    middles = (ordered[first] + ordered[second]) / 2
    low, high = np.quantile(middles, [(1 - level) / 2, (1 + level) / 2])
    return Median(len(ordered), float(np.median(ordered)), float(low), float(high))


@functools.lru_cache(maxsize=256)
def _middles(n: int, seed: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (draws,) indices of the two middle values of bootstrap resamples of n sorted values; equal for odd n.

    The k-th smallest of n uniforms is Beta(k, n − k + 1) (David & Nagaraja, Order Statistics, 2003, §2.1), and above
    it lie n − k independent uniforms, of which the smallest is the next one.
    """
    rng = np.random.default_rng([seed, n])
    k = (n + 1) // 2
    lower = rng.beta(k, n - k + 1, draws)
    upper = lower if n % 2 else lower + (1 - lower) * rng.beta(1, n - k, draws)
    first, second = (np.minimum((n * u).astype(np.int64), n - 1) for u in (lower, upper))
    return first, second


def paired_test(
    first: np.ndarray, second: np.ndarray, better: int = 1, seed: int = 0, draws: int = DRAWS
) -> PairedTest:
    """Compare two contenders over the units for which both have a finite value.

    Units are resampled as pairs, so that the variation between units does not widen the interval of the difference.

    Args:
        first: (n,) values of the first contender.
        second: (n,) values of the second contender for the same units.
        better: 1 if higher values are better, or if neither is; −1 if lower values are better.
        seed: Seed of the bootstrap.
        draws: Number of resamples.
    """
    both = np.isfinite(first) & np.isfinite(second)
    difference = np.asarray(first, np.float64)[both] - np.asarray(second, np.float64)[both]
    wins, losses = int((better * difference > 0).sum()), int((better * difference < 0).sum())
    ties = len(difference) - wins - losses
    return PairedTest(median(difference, seed, draws), wins, losses, ties, sign_test(wins, losses))


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p value of the sign test: the probability of a split at least this uneven by chance.

    Ties are left out (Dixon & Mood, "The statistical sign test", JASA 41, 1946). NaN if all pairs are ties. The test
    assumes independent units.
    """
    # Imported here because it takes a second, and only comparisons need it.
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else math.nan
