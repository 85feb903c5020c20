"""The most similar units of all layers: those with the highest Pearson correlation of their activations.

An activation is the maximum of the unit's map for an image, and the images are those of `Atlas.responses_index`. The
correlation is the dot product of the unit vectors of `embedding.unit_vectors`.

The search is exact. Most pairs are ruled out by a bound, a product of short vectors: with P the projection to leading
axes and r the length of the rest of a vector, v · w ≤ Pv · Pw + r(v) r(w). Only pairs whose bound reaches the lowest of
a unit's best correlations so far are multiplied out, in double precision and each for itself. So neither the division
into blocks nor the number of threads changes a result. A unit that the bound leaves too many candidates of is compared
with all others.
"""

import numpy as np

# Axes of the bound, and vectors that they are computed from.
AXES = 64
FITTED = 2048
ITERATIONS = 3
# Elements of a block of bounds, 64 MB.
BLOCK = 1 << 24
# Every so many columns of a block are reduced to their maximum before they are compared.
FOLD = 16
# A unit with more candidates than this is compared with all others at once.
MOST_CANDIDATES = 384
# Pairs that are multiplied out at once.
PAIRS = 4096
# Correlations are rounded to so many decimals; equal ones are in the order of the units.
DECIMALS = 4
# Bound of the rounding errors of products in single precision, and of the squared lengths of rests.
ERROR, SQUARED_ERROR = 2e-5, 4e-6


def most_similar(vectors: np.ndarray, count: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the units with the highest correlation to each unit, best first.

    Args:
        vectors: Unit vectors of all units, (units, n) float32; units that never change are zero vectors, which are
            similar to none.
        count: Number of similar units per unit, k.
        least: Least correlation of a similar unit, above 0.

    Returns:
        Numbers of the units, (units, k) int32, −1 where there are fewer; and their correlations, (units, k) float64,
        rounded to `DECIMALS` decimals, 0 where there are fewer.
    """
    numbers = np.full((len(vectors), count), -1, np.int32)
    correlations = np.zeros((len(vectors), count))
    varying = np.flatnonzero(vectors.any(1))
    if count and len(varying) > 1:
        search = _Search(vectors if len(varying) == len(vectors) else vectors[varying], count, least)
        for start in range(0, len(varying), search.rows_per_block):
            rows = np.arange(start, min(start + search.rows_per_block, len(varying)))
            row, other, value = search.pairs(rows)
            place = _places(row)
            kept = place < count
            own = varying[row[kept]]
            numbers[own, place[kept]] = varying[other[kept]]
            correlations[own, place[kept]] = value[kept]
    return numbers, correlations


class _Search:
    """Search among vectors of length 1."""

    def __init__(self, vectors: np.ndarray, count: int, least: float) -> None:
        self._vectors = vectors
        self._count = min(count, len(vectors) - 1)
        self._least = least
        axes = _leading_axes(vectors[:: max(1, len(vectors) // FITTED)])
        short = vectors @ axes
        rest = np.sqrt(np.maximum(1 - np.square(short).sum(1), 0) + SQUARED_ERROR)
        # With the length of the rest as one more component, the dot product is the bound.
        self._short = np.concatenate([short, rest[:, None]], 1)
        # Blocks are folded, and filled up with bounds that nothing reaches. New memory for each would take longer.
        self._width = -(-len(vectors) // FOLD)
        self._block = np.full((max(1, BLOCK // (self._width * FOLD)), self._width * FOLD), -2, np.float32)

    @property
    def rows_per_block(self) -> int:
        """The largest number of rows of `pairs`."""
        return len(self._block)

    def pairs(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return at least the best pairs of each of `rows`: rows, other rows and correlations.

        They are sorted by row, by falling correlation and by the other row.
        """
        total = len(self._vectors)
        bounds = self._block[: len(rows)]
        np.matmul(self._short[rows], self._short.T, out=bounds[:, :total])
        bounds[np.arange(len(rows)), rows] = -2
        folded = bounds.reshape(len(rows), FOLD, self._width)
        highest = folded.max(1)
        threshold = self._thresholds(rows, folded, highest)
        here, group = np.nonzero(highest >= threshold[:, None])
        crowded = np.bincount(here, minlength=len(rows)) > MOST_CANDIDATES // 4
        keep = ~crowded[here]
        here, group = here[keep], group[keep]
        each, slot = np.nonzero(folded[here, :, group] >= threshold[here, None])
        row, other = here[each], slot * self._width + group[each]
        many = np.bincount(row, minlength=len(rows)) > MOST_CANDIDATES
        crowded |= many
        keep = ~many[row]
        found = [(row[keep], other[keep]), self._compared_with_all(rows, np.flatnonzero(crowded))]
        row, other = (np.concatenate(parts) for parts in zip(*found, strict=True))
        value = np.round(self._correlations(rows[row], other), DECIMALS)
        keep = value >= self._least
        row, other, value = row[keep], other[keep], value[keep]
        order = np.lexsort((other, -value, row))
        return rows[row[order]], other[order], value[order]

    def _thresholds(self, rows: np.ndarray, folded: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """Return a lower bound of the lowest correlation of each row's best units, (rows,)."""
        count = min(self._count, self._width)
        group = np.argpartition(-highest, count - 1, axis=1)[:, :count]
        slot = np.take_along_axis(folded, group[:, None, :], 2).argmax(1)
        other = np.minimum(slot * self._width + group, len(self._vectors) - 1)
        known = np.empty(other.shape, np.float32)
        for column in range(count):
            known[:, column] = np.einsum("ij,ij->i", self._vectors[rows], self._vectors[other[:, column]])
        known[other == rows[:, None]] = -2
        lowest = known.min(1) if count == self._count else np.full(len(rows), -2.0, np.float32)
        # Half a unit of the last decimal, because pairs are ordered by rounded correlations.
        return np.maximum(lowest, self._least) - ERROR - 10.0**-DECIMALS

    def _compared_with_all(self, rows: np.ndarray, crowded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the candidates of the rows `crowded` of a block, by their products with all vectors."""
        if not len(crowded):
            return np.zeros(0, int), np.zeros(0, int)
        products = self._vectors[rows[crowded]] @ self._vectors.T
        products[np.arange(len(crowded)), rows[crowded]] = -2
        last = products.shape[1] - self._count
        lowest = np.maximum(np.partition(products, last, axis=1)[:, last], self._least)
        row, other = np.nonzero(products >= lowest[:, None] - ERROR - 10.0**-DECIMALS)
        return crowded[row], other

    def _correlations(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the correlation of each pair, (pairs,) float64."""
        result = np.empty(len(rows))
        for start in range(0, len(rows), PAIRS):
            part = slice(start, start + PAIRS)
            # A sum over the last axis adds up each row alike, however many rows there are.
            result[part] = np.multiply(self._vectors[rows[part]], self._vectors[others[part]], dtype=np.float64).sum(1)
        return result


def _leading_axes(sample: np.ndarray) -> np.ndarray:
    """Return about the axes of the largest variance of vectors (m, n), (n, axes), by subspace iteration."""
    generator = np.random.default_rng(0)
    axes = generator.normal(size=(sample.shape[1], min(AXES, *sample.shape))).astype(np.float32)
    for _ in range(ITERATIONS):
        axes, _ = np.linalg.qr(sample.T @ (sample @ axes))
    return axes


def _places(rows: np.ndarray) -> np.ndarray:
    """Return the place of each element among those that are equal to it, in sorted `rows`: [3, 3, 7] → [0, 1, 0]."""
    first = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, int)
    return np.arange(len(rows)) - np.repeat(first, np.diff(np.r_[first, len(rows)]))
