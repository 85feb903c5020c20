"""Scores of units in the space of a foundation model, after SemanticLens.

Dreyer et al. 2025, "Mechanistic understanding and validation of large AI models with SemanticLens", Nature Machine
Intelligence (arXiv 2501.05398), section "Methods". The semantic embedding ϑ of a unit is the mean of the embeddings of
its examples. Here embeddings have length 1 before they are averaged and clustered, so that no image weighs more.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from pipeline.core.seeds import seed_of

# Starts and steps of k-means; the best start counts.
STARTS, STEPS = 10, 20

# Standard deviations above the mean of all units from which the similarity of a unit with a word stands out.
OUTSTANDING = 2.0

# Units at a time, to bound memory: examples² × STARTS numbers for each, or similarities with all other units.
UNITS, ROWS = 256, 512


def semantic_embeddings(images: np.ndarray) -> np.ndarray:
    """Return ϑ of each unit, scaled to length 1, (units, d) float32; zeros for a unit without examples.

    Args:
        images: Embeddings of the examples of each unit, (units, k, d) of length 1; zeros for none.
    """
    means = images.sum(1, dtype=np.float32)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def clarity(images: np.ndarray) -> np.ndarray:
    """Return the mean cosine of all pairs of examples of each unit, (units,) float64; NaN with fewer than two.

    I_clarity = n / (n − 1) (‖mean of v / ‖v‖‖² − 1 / n), which is 1 if all examples say the same.
    """
    count = np.any(images != 0, axis=2).sum(1).astype(np.float64)
    length = (images.sum(1, dtype=np.float64) ** 2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(count > 1, (length - count) / (count * (count - 1)), np.nan)


def polysemanticity(images: np.ndarray) -> np.ndarray:
    """Return 1 − the cosine of the centers of two clusters of the examples, (units,) float64; NaN below four examples.

    The clusters are those of k-means with h = 2, the best of `STARTS`. If a cluster has a single example, the score
    is 1 − the mean cosine of the first ten examples with the mean of all, as in the authors' code.
    """
    result = np.full(len(images), np.nan)
    for start in range(0, len(images), UNITS):
        block = images[start : start + UNITS].astype(np.float64)
        there = np.any(block != 0, axis=2)
        grams = block @ block.transpose(0, 2, 1)
        result[start : start + UNITS] = [
            _polysemanticity(gram[np.ix_(rows, rows)]) if rows.sum() >= 4 else np.nan
            for gram, rows in zip(grams, there, strict=True)
        ]
    return result


def _polysemanticity(gram: np.ndarray) -> float:
    """Return the score of a unit from the products of its examples, (n, n)."""
    clusters = two_means(gram)
    sizes = np.array([(~clusters).sum(), clusters.sum()])
    if sizes.min() < 2:
        mean = gram.mean()
        cosines = gram[:10].mean(1) / np.sqrt(np.maximum(mean * np.diag(gram)[:10], 1e-24))
        return float(1 - cosines.mean())
    first, second = ~clusters, clusters
    inner = gram[np.ix_(first, second)].mean()
    lengths = gram[np.ix_(first, first)].mean() * gram[np.ix_(second, second)].mean()
    return float(1 - inner / np.sqrt(max(lengths, 1e-24)))


def two_means(gram: np.ndarray) -> np.ndarray:
    """Return the cluster of each example, (n,) bool, by k-means with two clusters on the products (n, n)."""
    count = len(gram)
    generator = np.random.default_rng(seed_of("two means", count))
    seeds = np.stack([generator.choice(count, 2, replace=False) for _ in range(STARTS)])
    squares = np.diag(gram)
    distances = (squares[:, None, None] - 2 * gram[:, seeds] + squares[seeds]).transpose(2, 1, 0)
    assigned = distances[1] < distances[0]
    for _ in range(STEPS):
        before = assigned
        sides = np.stack([~assigned, assigned]).astype(np.float64)
        weights = sides / np.maximum(sides.sum(2, keepdims=True), 1)
        products = weights @ gram
        lengths = (products * weights).sum(2, keepdims=True)
        distances = squares - 2 * products + lengths
        # A cluster that lost all examples stays empty.
        distances[sides.sum(2) == 0] = np.inf
        assigned = distances[1] < distances[0]
        if np.array_equal(before, assigned):
            break
    costs = np.minimum(distances[0], distances[1]).sum(1)
    return assigned[np.lexsort((np.arange(STARTS), np.round(costs, 9)))[0]]


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The most similar other unit of each unit.

    Attributes:
        unit: Number of the unit, (n,) int64; −1 for none.
        similarity: Cosine of the semantic embeddings, (n,) float32; NaN for none.
    """

    unit: np.ndarray
    similarity: np.ndarray

    @property
    def mean(self) -> float:
        """Mean similarity: I_redundancy of SemanticLens for the units of one network; NaN without any."""
        known = self.similarity[np.isfinite(self.similarity)]
        return float(known.mean()) if len(known) else float("nan")


def nearest(units: np.ndarray, others: np.ndarray | None = None) -> Nearest:
    """Return the most similar unit among `others` for each of `units`, or among all other `units`.

    Args:
        units: Semantic embeddings, (n, d) of length 1; zeros for units without examples, which are near to nothing.
        others: Those of another network in the same space, (m, d).
    """
    among = units if others is None else others
    unknown = ~np.any(among != 0, axis=1)
    unit, similarity = np.full(len(units), -1, np.int64), np.full(len(units), np.nan, np.float32)
    for rows in _rows(len(units)):
        cosines = units[rows] @ among.T
        cosines[:, unknown] = -np.inf
        if others is None:
            cosines[np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)] = -np.inf
        if cosines.shape[1]:
            best = cosines.argmax(1)
            value = cosines[np.arange(len(best)), best]
            known = np.isfinite(value) & np.any(units[rows] != 0, axis=1)
            unit[rows], similarity[rows] = np.where(known, best, -1), np.where(known, value, np.nan)
    return Nearest(unit, similarity)


def ranked(queries: np.ndarray, units: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the units that are most similar to each query: numbers (q, count) int64 and cosines (q, count) float32.

    Numbers are −1 and cosines NaN beyond the units that have examples.
    """
    numbers, cosines = np.full((len(queries), count), -1, np.int64), np.full((len(queries), count), np.nan, np.float32)
    known = np.flatnonzero(np.any(units != 0, axis=1))
    found = min(count, len(known))
    for rows in _rows(len(queries)):
        similarity = queries[rows] @ units[known].T
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :found]
        numbers[rows, :found] = known[best]
        cosines[rows, :found] = np.take_along_axis(similarity, best, 1)
    return numbers, cosines


def outstanding(queries: np.ndarray, units: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `ranked` units without those that do not stand out.

    Cosines of texts with images differ little, and some unit is the nearest to any word. A unit stands out for a query
    if its cosine is at least `OUTSTANDING` standard deviations above the mean over all units.
    """
    numbers, cosines = ranked(queries, units, count)
    known = units[np.any(units != 0, axis=1)].astype(np.float64)
    if not len(known):
        return numbers, cosines
    centered = known - known.mean(0)
    mean = queries @ known.mean(0)
    # The variance of the cosines is that of the units along the query.
    deviation = np.sqrt(np.maximum(((queries @ (centered.T @ centered / len(known))) * queries).sum(1), 0))
    below = ~(cosines >= (mean + OUTSTANDING * deviation)[:, None])
    return np.where(below, -1, numbers), np.where(below, np.float32(np.nan), cosines)


def _rows(count: int) -> Iterator[slice]:
    for start in range(0, count, ROWS):
        yield slice(start, min(start + ROWS, count))
