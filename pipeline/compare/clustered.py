"""Effects over units that come in layers: intervals, tests and the smallest effect that could be found.

Units of one layer resemble each other, so that a test that takes them for independent finds too much. Here the layers
are what is drawn: the statistic is the mean over layers of each layer's median, its interval comes from drawing layers
and then units within them, and its p value from the signs of whole layers.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

DRAWS = 4000
LEVEL = 0.95
# With more clusters than this the signs are drawn at random instead of tried in all combinations.
EXACT = 14
RANDOM_SIGNS = 50_000


@dataclasses.dataclass(frozen=True)
class ClusteredEffect:
    """An effect over units in clusters.

    Attributes:
        value: Mean over the clusters of the median of each.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p: Two-sided p value against an effect of 0.
        units: Number of units.
        clusters: Number of clusters.
        spread: Standard error: standard deviation of the clusters' medians, divided by the square root of their number;
            NaN for a single cluster.
    """

    value: float
    low: float
    high: float
    p: float
    units: int
    clusters: int
    spread: float


def clustered_effect(
    values: np.ndarray, clusters: Sequence[object], strata: Sequence[object] | None = None, seed: int = 0
) -> ClusteredEffect:
    """Return the effect over units in clusters with its bootstrap interval and its p value.

    The interval is the percentile interval of a two-stage bootstrap, which draws clusters within each stratum with
    replacement and then units within each of them (Davison & Hinkley, "Bootstrap Methods and their Application", 1997,
    section 3.8). The p value is that of the sign-flip test on the medians of the clusters: the share of all
    combinations of signs for which the mean is at least as far from 0 (Canay, Romano & Shaikh, "Randomization Tests
    under an Approximate Symmetry Assumption", Econometrica 85, 2017). With K clusters it is at least 2 / 2^K.

    Args:
        values: (n,) values of the units, for example differences of two presets; values that are not finite are
            left out.
        clusters: (n,) cluster of each unit.
        strata: (n,) stratum of each unit, for example its network; a cluster lies in one stratum.
        seed: Seed of the bootstrap and of random signs.
    """
    numbers = np.asarray(values, np.float64)
    kept = np.isfinite(numbers)
    strata = [""] * len(numbers) if strata is None else strata
    parts: dict[tuple[object, object], list[float]] = {}
    for value, cluster, stratum, finite in zip(numbers, clusters, strata, kept, strict=True):
        if finite:
            parts.setdefault((stratum, cluster), []).append(float(value))
    if not parts:
        return ClusteredEffect(math.nan, math.nan, math.nan, math.nan, 0, 0, math.nan)
    medians = np.array([np.median(part) for part in parts.values()])
    low, high = np.quantile(_resamples(parts, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    spread = float(medians.std(ddof=1) / math.sqrt(len(medians))) if len(medians) > 1 else math.nan
    return ClusteredEffect(
        float(medians.mean()), float(low), float(high), sign_flip_test(medians, seed), int(kept.sum()), len(medians),
        spread
    )  # fmt: skip


def _resamples(parts: dict[tuple[object, object], list[float]], seed: int) -> np.ndarray:
    """Return the statistic of each resample, (DRAWS,)."""
    rng = np.random.default_rng(seed)
    groups: dict[object, list[np.ndarray]] = {}
    for (stratum, _), part in parts.items():
        groups.setdefault(stratum, []).append(np.asarray(part))
    total = np.zeros(DRAWS)
    for group in groups.values():
        widest = max(map(len, group))
        padded = np.full((len(group), widest), np.nan)
        for i, part in enumerate(group):
            padded[i, : len(part)] = part
        counts = np.array([len(part) for part in group])
        chosen = rng.integers(len(group), size=(DRAWS, len(group)))
        within = (rng.random((DRAWS, len(group), widest)) * counts[chosen][..., None]).astype(np.int64)
        drawn = padded[chosen[..., None], within]
        # Positions beyond the size of a cluster are sorted to its end.
        drawn[np.arange(widest) >= counts[chosen][..., None]] = np.inf
        drawn.sort(axis=2)
        middle = np.stack([(counts[chosen] - 1) // 2, counts[chosen] // 2], axis=2)
        total += np.take_along_axis(drawn, middle, axis=2).mean(2).sum(1)
    return total / len(parts)


def sign_flip_test(values: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p value of the mean of (n,) values under changes of their signs; NaN without values.

    All 2^n combinations are tried for n up to 14; beyond, 50,000 random ones are drawn, and the combination that was
    observed is added to them (Phipson & Smyth 2010, "Permutation P-values should never be zero").
    """
    if not len(values):
        return math.nan
    # A tolerance: sums in another order differ in their last digits.
    observed = abs(values.sum()) * (1 - 1e-12)
    if len(values) <= EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        return float((abs(signs @ values) >= observed).mean())
    rng = np.random.default_rng(seed)
    sums = (2.0 * rng.integers(2, size=(RANDOM_SIGNS, len(values)), dtype=np.int8) - 1) @ values
    return float(((abs(sums) >= observed).sum() + 1) / (RANDOM_SIGNS + 1))


def trend(values: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """Return the mean rank correlation of ordered cluster medians with their order, and its p value.

    Args:
        values: For each stratum the (k,) medians of its clusters, in order, for example of layers by depth.
        seed: Seed of the permutations.

    Returns:
        The mean of Spearman's correlations over the strata, and the two-sided p value: the share of 20,000 random
        orders within the strata, and the observed one, whose mean is at least as far from 0.
    """
    rng = np.random.default_rng(seed)
    orders = [np.argsort(np.argsort(part)).astype(float) for part in values if len(part) > 1]
    if not orders:
        return math.nan, math.nan

    def correlation(ranks: np.ndarray) -> np.ndarray:
        positions = np.arange(ranks.shape[-1]) - (ranks.shape[-1] - 1) / 2
        return (ranks - ranks.mean(-1, keepdims=True)) @ positions / (positions @ positions)

    observed = float(np.mean([correlation(part) for part in orders]))
    shuffled = np.mean([correlation(rng.permuted(np.tile(part, (20_000, 1)), axis=1)) for part in orders], axis=0)
    extreme = (abs(shuffled) >= abs(observed) - 1e-12).sum()
    return observed, float((extreme + 1) / (len(shuffled) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number: p₍ᵢ₎ times (m − i + 1), kept ascending, at most 1.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979. NaN
    stays NaN and does not count.
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[i] = highest
    return corrected


def detectable(effect: ClusteredEffect, tests: int = 1, power: float = 0.8, level: float = 0.05) -> float:
    """Return the smallest effect that a test of this many clusters with this spread finds with probability `power`.

    (t(1 − level / (2 · tests)) + t(power)) · standard error, with Student's quantiles for K − 1 degrees of freedom
    (Bloom, "Minimum detectable effects", Evaluation Review 19, 1995). The level is divided by the number of tests, as
    the strictest of Holm's steps does. NaN for a single cluster.

    Args:
        effect: The effect as measured; its spread and number of clusters are used.
        tests: Number of tests that are corrected for together.
        power: Probability of finding the effect.
        level: Level of significance of all tests together.
    """
    from scipy.stats import t

    if effect.clusters < 2:
        return math.nan
    freedom = effect.clusters - 1
    return float((t.ppf(1 - level / (2 * tests), freedom) + t.ppf(power, freedom)) * effect.spread)
