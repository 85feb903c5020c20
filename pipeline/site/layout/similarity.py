"""The most similar units of all layers: those with the highest Pearson correlation of their activations.

An activation is the maximum of the unit's map for an image, and the images are those of `Atlas.responses_index`. The
correlation is the dot product of the unit vectors of `embedding.unit_vectors`.

The search is exact. Every pair of vectors is multiplied out once, block by block and in single precision, for both of
its units. Pairs that may be among the best of a unit are kept, and those that may still be at the end are multiplied
out again, in double precision and each for itself. So neither the division into blocks nor the number of threads
changes a result.
"""

import numpy as np
from threadpoolctl import threadpool_limits

# Products of a block, 64 MB.
BLOCK = 1 << 24
# So many products are reduced to their maximum before they are compared.
FOLD = 16
# Pairs that are multiplied out again at once: their products stay in the cache of a core.
PAIRS = 128
# Correlations are rounded to so many decimals; equal ones are in the order of the units.
DECIMALS = 4
# Bound of the rounding error of a product in single precision.
ERROR = 2e-5
# A product so far below another may still be rounded to the same correlation.
MARGIN = 2 * ERROR + 10.0**-DECIMALS


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
    if not count or len(varying) < 2:
        return numbers, correlations
    own = vectors if len(varying) == len(vectors) else vectors[varying]
    # One thread: the processes that encode images use the other cores, and idle threads of a product would spin.
    with threadpool_limits(1, "blas"):
        row, other = _candidates(own, count, least)
    value = np.round(_correlations(own, row, other), DECIMALS)
    order = np.lexsort((other, -value, row))
    order = order[value[order] >= least]
    row, other, value = row[order], other[order], value[order]
    place = _places(row)
    kept = place < count
    numbers[varying[row[kept]], place[kept]] = varying[other[kept]]
    correlations[varying[row[kept]], place[kept]] = value[kept]
    return numbers, correlations


class _Best:
    """The best pairs of each unit so far.

    Attributes:
        lowest: What the product of a pair must reach, but for `MARGIN`, to be one of them, (units,).
    """

    def __init__(self, units: int, count: int, least: float) -> None:
        self.lowest = np.full(units, least, np.float32)
        self._values = np.full((units, count), -np.inf, np.float32)
        self._pairs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, first: int, folded: np.ndarray, others: int) -> None:
        """Add the products of consecutive units with others.

        Args:
            first: The first of the units.
            folded: Products (units, `FOLD`, m); those of a unit belong to the others in this order.
            others: The first of the others.
        """
        count, width = self._values.shape[1], folded.shape[2]
        lowest = self.lowest[first : first + len(folded)]
        highest = folded.max(1)
        if count <= width:
            # Each of the highest is a pair of its own, so that the last of the best is not below.
            lowest = np.maximum(lowest, np.partition(highest, width - count, axis=1)[:, width - count])
        lowest = lowest - MARGIN
        unit, group = np.nonzero(highest >= lowest[:, None])
        each, slot = np.nonzero(folded[unit, :, group] >= lowest[unit, None])
        unit, group = unit[each], group[each]
        self._merge(first + unit, others + slot * width + group, folded[unit, slot, group])

    def _merge(self, unit: np.ndarray, other: np.ndarray, value: np.ndarray) -> None:
        order = np.lexsort((-value, unit))
        unit, other, value = unit[order], other[order], value[order]
        self._pairs.append((unit.astype(np.int32), other.astype(np.int32), value))
        count, place = self._values.shape[1], _places(unit)
        kept = place < count
        changed, row = np.unique(unit[kept], return_inverse=True)
        both = np.full((len(changed), 2 * count), -np.inf, np.float32)
        both[:, :count] = self._values[changed]
        both[row, count + place[kept]] = value[kept]
        best = np.partition(both, count, axis=1)[:, count:]
        self._values[changed] = best
        self.lowest[changed] = np.maximum(self.lowest[changed], best.min(1))

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return at least the best pairs: the units and the others."""
        unit, other, value = (np.concatenate(parts) for parts in zip(*self._pairs, strict=True))
        kept = value >= self.lowest[unit] - MARGIN
        return unit[kept], other[kept]


def _candidates(vectors: np.ndarray, count: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return at least the pairs with the `count` highest correlations of each unit, units and others."""
    total = len(vectors)
    best = _Best(total, count, least)
    height = max(1, min(BLOCK // total, total) // FOLD) * FOLD
    memory = np.empty(height * (total + FOLD), np.float32)
    for start in range(0, total, height):
        stop = min(start + height, total)
        width = -(-(total - start) // FOLD) * FOLD
        products = memory[: height * width].reshape(height, width)
        products[stop - start :] = -2
        products[:, total - start :] = -2
        np.matmul(vectors[start:stop], vectors[start:].T, out=products[: stop - start, : total - start])
        np.fill_diagonal(products, -2)
        best.add(start, products[: stop - start].reshape(stop - start, FOLD, -1), start)
        if stop < total:
            # The same products for the units after this block: those of a unit are a column.
            columns = products[:, stop - start : total - start]
            best.add(stop, np.moveaxis(columns.reshape(FOLD, -1, total - stop), 2, 0), start)
    return best.pairs()


def _correlations(vectors: np.ndarray, units: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation of each pair, (pairs,) float64."""
    result = np.empty(len(units))
    for start in range(0, len(units), PAIRS):
        part = slice(start, start + PAIRS)
        # A sum over the last axis adds up each row alike, however many rows there are.
        result[part] = np.multiply(vectors[units[part]], vectors[others[part]], dtype=np.float64).sum(1)
    return result


def _places(rows: np.ndarray) -> np.ndarray:
    """Return the place of each element among those that are equal to it, in sorted `rows`: [3, 3, 7] → [0, 1, 0]."""
    first = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]]) if len(rows) else np.zeros(0, int)
    return np.arange(len(rows)) - np.repeat(first, np.diff(np.r_[first, len(rows)]))
