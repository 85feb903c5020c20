"""Names of units from the labels of their dataset examples, with support, confidence and a permutation null.

The support of a name is the number of source images with the label among the unit's examples, and its confidence the
share of the examples that have it: the terms of association rules (Agrawal, Imieliński & Swami 1993, "Mining
association rules between sets of items in large databases") for the rule "if the unit is this active, the image has
this label".
"""

import dataclasses
import functools

import numpy as np
from scipy.special import betaln

from pipeline.core.seeds import seed_of

# A name needs so many source images: one image, or two, say nothing about the others.
MIN_SUPPORT = 3

# A label that fewer of the examples have does not name the unit: most of what the unit shows is something else.
MIN_CONFIDENCE = 0.5

# Expected share of names by chance among the names of a layer (false discovery rate).
FALSE_DISCOVERIES = 0.05

# Number of random draws: p values are multiples of 1 / (DRAWS + 1).
DRAWS = 9_999

# Random numbers that are drawn at a time, about, to bound memory.
DRAWN = 1 << 22


@dataclasses.dataclass(frozen=True)
class LabelNames:
    """The label that is most over-represented among the examples of each of C' units.

    Attributes:
        label: Number of the label, (C',) int32; −1 if no label has an example.
        support: Number of source images with the label among the examples, (C',) int32.
        examined: Number of source images among the examples, (C',) int32.
        p: Probability that any label is as significantly over-represented among as many random images, (C',) float64.
        q: Smallest rate of false discoveries at which the name is accepted (Benjamini & Hochberg 1995), over the units
            of the layer, (C',) float64.
    """

    label: np.ndarray
    support: np.ndarray
    examined: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @functools.cached_property
    def confidence(self) -> np.ndarray:
        """Share of the examples that have the label, (C',) float64; 0 without examples."""
        return self.support / np.maximum(self.examined, 1)

    @functools.cached_property
    def earned(self) -> np.ndarray:
        """Whether the name may be shown, (C',) bool."""
        enough = (self.support >= MIN_SUPPORT) & (self.confidence >= MIN_CONFIDENCE)
        return (self.label >= 0) & enough & (self.q <= FALSE_DISCOVERIES)


def hypergeometric_pmf(count: np.ndarray, total: int, marked: np.ndarray, drawn: int) -> np.ndarray:
    """Return P(X = k) for the number X of marked items among items drawn without replacement.

    It is C(marked, k) C(total − marked, drawn − k) / C(total, drawn), as in `scipy.stats.hypergeom`, which takes longer
    to load than names take to compute.

    Args:
        count: k, any shape that broadcasts with `marked`.
        total: Number of items.
        marked: How many of them are marked.
        drawn: Number of items that are drawn.
    """
    left, rest = total - marked, drawn - count
    possible = (count <= marked) & (rest >= 0) & (rest <= left)

    def log_choose(items: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return -np.log(items + 1) - betaln(items - chosen + 1, chosen + 1)

    k, other = np.where(possible, count, 0), np.where(possible, rest, 0)
    logarithm = log_choose(marked, k) + log_choose(left, other) - log_choose(np.asarray(total), np.asarray(drawn))
    return np.where(possible, np.exp(logarithm), 0.0)


class LabelNull:
    """The labels of a dataset, and what random images have of them.

    The null hypothesis is that the examples of a unit are random images. Images of one source count once, but a source
    with many images is drawn more often, as in the lists of examples.

    Args:
        labels: Label number of each image, (images,) int; −1 for none.
        sources: Source of each image, (images,) int.
    """

    def __init__(self, labels: np.ndarray, sources: np.ndarray) -> None:
        self.labels, self.sources = np.asarray(labels, np.int64), np.asarray(sources, np.int64)
        pairs = np.unique(np.stack([self.sources, self.labels]), axis=1)
        self._count = len(np.unique(self.sources))
        self._sizes = np.bincount(pairs[1][pairs[1] >= 0], minlength=int(self.labels.max(initial=-1)) + 1)
        self._tails: dict[int, np.ndarray] = {}
        self._smallest: dict[int, np.ndarray] = {}

    def tails(self, examined: int) -> np.ndarray:
        """Return hypergeometric tails, (labels, examined + 1) float64.

        (l, k) is P(X ≥ k) for X ~ Hypergeometric(sources, sources with label l, examined).
        """
        if examined not in self._tails:
            values, inverse = np.unique(self._sizes, return_inverse=True)
            counts = np.arange(examined + 1)
            pmf = hypergeometric_pmf(counts, self._count, values[:, None], examined)
            self._tails[examined] = pmf[:, ::-1].cumsum(1)[:, ::-1][inverse]
        return self._tails[examined]

    def smallest(self, examined: int) -> np.ndarray:
        """Return the smallest tail of any label among `examined` random source images, ascending, (DRAWS,)."""
        if examined not in self._smallest:
            generator = np.random.default_rng(seed_of("label names", examined, *self._sizes.tolist()))
            block = max(1, DRAWN // (8 * examined))
            parts = [
                self._smallest_of(self._draw(generator, min(block, DRAWS - start), examined))
                for start in range(0, DRAWS, block)
            ]
            self._smallest[examined] = np.sort(np.concatenate(parts))
        return self._smallest[examined]

    def _draw(self, generator: np.random.Generator, draws: int, examined: int) -> np.ndarray:
        """Return images of different sources, (draws, examined): random images, of which the first of each source."""
        found = np.full((draws, examined), -1)
        filled = np.zeros(draws, np.int64)
        # Drawn with replacement: an image of a source that was drawn before is passed over, as it would be without.
        while (filled < examined).any():
            image = generator.integers(len(self.labels), size=draws)
            sources = np.where(found >= 0, self.sources[found], -1)
            rows = np.flatnonzero((filled < examined) & ~(sources == self.sources[image][:, None]).any(1))
            found[rows, filled[rows]] = image[rows]
            filled[rows] += 1
        return found

    def _smallest_of(self, images: np.ndarray) -> np.ndarray:
        """Return the smallest tail of any label for each row of images of different sources, (rows, n) → (rows,)."""
        labels = np.sort(self.labels[images], axis=1)
        tails = self.tails(images.shape[1])
        # Number of the row's images up to each that have its label; the last of a label has the count.
        counts = np.ones_like(labels)
        for column in range(1, labels.shape[1]):
            same = labels[:, column] == labels[:, column - 1]
            counts[:, column] = np.where(same, counts[:, column - 1] + 1, 1)
        return np.where(labels >= 0, tails[np.maximum(labels, 0), counts], 1.0).min(1)

    def p_values(self, tails: np.ndarray, examined: int) -> np.ndarray:
        """Return the p values of smallest tails over all labels (minP of Westfall & Young 1993, section 2.3)."""
        null = self.smallest(examined)
        # Equal tails can differ in the last bits.
        return (1 + np.searchsorted(null, tails * (1 + 1e-9), "right")) / (1 + len(null))


def name_by_labels(examples: np.ndarray, null: LabelNull) -> LabelNames:
    """Name the units of a layer by the label that is most significantly over-represented among their examples.

    Args:
        examples: Images with the largest activations of each unit, (C', k) int; −1 for none. Images of one source
            count once for each label.
        null: The labels of the dataset.
    """
    count, size = len(examples), int(null.sources.max(initial=-1)) + 1
    label, support, examined = np.full(count, -1, np.int32), np.zeros(count, np.int32), np.zeros(count, np.int32)
    p = np.ones(count)
    if not count or not examples.shape[1]:
        return LabelNames(label, support, examined, p, false_discovery_rates(p))
    images = np.asarray(examples, np.int64)
    sources = np.sort(np.where(images >= 0, null.sources[images], -1), axis=1)
    examined[:] = _is_first(sources).sum(1)
    # One number for each pair of a label and a source, so that those of a label are beside each other.
    labels = np.where(images >= 0, null.labels[images], -1)
    pairs = np.sort(np.where(labels >= 0, labels * size + np.where(images >= 0, null.sources[images], 0), -1), axis=1)
    counted = _is_first(pairs)
    labels = np.where(pairs >= 0, pairs // max(size, 1), -1)
    counts = counted.astype(np.int64)
    for column in range(1, labels.shape[1]):
        counts[:, column] += np.where(labels[:, column] == labels[:, column - 1], counts[:, column - 1], 0)
    for number in np.unique(examined):
        rows = np.flatnonzero((examined == number) & (labels[:, -1] >= 0))
        tails = np.where(labels[rows] >= 0, null.tails(int(number))[labels[rows], counts[rows]], np.inf)
        # The most significant label; of equal ones that with the larger count, then that with the smaller number.
        ties = np.where(tails == tails.min(1, keepdims=True), counts[rows], -1)
        best = ties.argmax(1)
        chosen = np.arange(len(rows)), best
        label[rows], support[rows] = labels[rows][chosen], counts[rows][chosen]
        # Without enough support there is no name, and its p value need not be known.
        enough = support[rows] >= MIN_SUPPORT
        if enough.any():
            p[rows[enough]] = null.p_values(tails[chosen][enough], int(number))
    return LabelNames(label, support, examined, p, false_discovery_rates(p))


def _is_first(values: np.ndarray) -> np.ndarray:
    """Return which of the sorted values of each row, (rows, n), are not negative and the first of their kind."""
    first = np.ones(values.shape, bool)
    first[:, 1:] = values[:, 1:] != values[:, :-1]
    return first & (values >= 0)


def false_discovery_rates(p: np.ndarray) -> np.ndarray:
    """Return the adjusted p values of Benjamini & Hochberg (1995), (n,): the rate at which each is accepted."""
    order = np.argsort(-p, kind="stable")
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    result = np.empty(len(p))
    result[order] = np.minimum(1, np.minimum.accumulate(scaled)) if len(p) else scaled
    return result
