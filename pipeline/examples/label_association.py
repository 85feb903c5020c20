"""Association of channels with labels: over-representation among the top images, class selectivity, AUROC.

The unit of all counts is the source image: crops of one image are no independent observations, and 30 crops of one dog
are one dog. The crops of a source that have the same label count as one entry, by the *mean* of their activations. Not
by the maximum: the maximum grows with the number of crops, so that labels whose images are cropped more often would
appear to activate every channel.
"""

import dataclasses
import functools

import numpy as np
from scipy import stats

from pipeline.core.hashing import hash64
from pipeline.core.seeds import seed_of
from pipeline.data.datasets import Dataset
from pipeline.examples.association import Association
from pipeline.examples.channel_stats import BINS

# Labels with fewer sources than this are ignored: mean and AUROC would describe those images rather than the label.
# Half of them must be in each half.
MIN_SOURCES = 10

# Number of over-represented labels that are stored per channel.
TOP = 3

# A label is over-represented if fewer than this share of permutations contain a label that is as significant.
SIGNIFICANCE = 0.05

# Number of permutations: p values are multiples of 1 / (PERMUTATIONS + 1).
PERMUTATIONS = 9_999

# So many channels are processed at a time, to bound memory; and so many permutations.
CHANNEL_BLOCK = 64
PERMUTATION_BLOCK = 500


@dataclasses.dataclass(frozen=True)
class LabeledSources:
    """The labeled images of a dataset, grouped into n entries: a source image, or its crops that have one label.

    Entries are sorted by half and then by label. Both halves and the order of ties depend on nothing but the paths of
    the images, by hash.

    Attributes:
        images: Positions of the labeled images in the given list, entry by entry, (m,).
        starts: Where each entry begins in `images`, (n,).
        labels: Label number of each entry, (n,).
        half: Half of each entry, 0 or 1, (n,). All entries of a source are in one half. The sources of each label are
            divided evenly.
        rank: Random order of the entries, for ties: a permutation of 0 … n − 1, (n,).
    """

    images: np.ndarray
    starts: np.ndarray
    labels: np.ndarray
    half: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, index: np.ndarray) -> "LabeledSources":
        """Group the images `index` of a dataset."""
        photos = [dataset.images[i] for i in index.tolist()]
        hashes = {photo.source: hash64(photo.source_path, "half") for photo in photos}
        sources = np.array([photo.source for photo in photos], np.int64)
        order = np.array([hashes[photo.source] for photo in photos], np.uint64)
        return cls.group(dataset.labels[1][index], sources, order)

    @classmethod
    def group(cls, labels: np.ndarray, sources: np.ndarray, order: np.ndarray) -> "LabeledSources":
        """Group images.

        Args:
            labels: Label number of each image, (images,); −1 for none.
            sources: Source of each image, (images,).
            order: Random number of the source of each image, (images,).
        """
        images = np.flatnonzero(labels >= 0)
        images = images[np.lexsort((images, labels[images], sources[images], order[images]))]
        pairs = np.stack([sources[images], labels[images]])
        is_first = np.append(True, (pairs[:, 1:] != pairs[:, :-1]).any(0))[: len(images)]
        entry_of = np.cumsum(is_first) - 1
        entry_sources, entry_labels = pairs[:, is_first]
        # Sources sorted by their first label and then at random; every second one is in the second half.
        _, first, source_of = np.unique(entry_sources, return_index=True, return_inverse=True)
        halves = np.zeros(len(first), np.int64)
        halves[np.lexsort((first, entry_labels[first]))[1::2]] = 1
        half = halves[source_of]
        # Until here entries are in random order.
        rank = np.lexsort((np.arange(len(half)), entry_labels, half))
        position = np.empty_like(rank)
        position[rank] = np.arange(len(rank))
        images = images[np.argsort(position[entry_of], kind="stable")]
        lengths = np.bincount(entry_of, minlength=len(rank))[rank]
        return cls(images, np.cumsum(lengths) - lengths, entry_labels[rank], half[rank], rank)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Number of sources of each label in each half, (2, labels)."""
        count = int(self.labels.max(initial=-1)) + 1
        return np.bincount(self.half * count + self.labels, minlength=2 * count).reshape(2, count)

    @functools.cached_property
    def begins(self) -> np.ndarray:
        """Where the entries of each label in each half begin, (2, labels)."""
        sizes = self.sizes.ravel()
        return (np.cumsum(sizes) - sizes).reshape(self.sizes.shape)

    @functools.cached_property
    def large(self) -> np.ndarray:
        """Labels with enough sources, ascending."""
        return np.flatnonzero((self.sizes.sum(0) >= MIN_SOURCES) & (self.sizes.min(0) >= MIN_SOURCES // 2))

    @property
    def sufficient(self) -> bool:
        """Whether at least two labels have enough sources."""
        return len(self.large) >= 2

    @property
    def top(self) -> int:
        """Number of top sources: 1 % of all, rounded up."""
        return -(-len(self.labels) // 100)

    @functools.cached_property
    def tails(self) -> np.ndarray:
        """Hypergeometric tails: probability that at least k of the top sources have a label, (labels, top + 1).

        (l, k) is P(X ≥ k) for X ~ Hypergeometric(n, size of label l, top); 1 for labels with too few sources.
        """
        sizes = self.sizes.sum(0)
        tails = np.ones((len(sizes), self.top + 1))
        values, inverse = np.unique(sizes[self.large], return_inverse=True)
        probabilities = stats.hypergeom.pmf(np.arange(self.top + 1), len(self.labels), values[:, None], self.top)
        tails[self.large] = probabilities[:, ::-1].cumsum(1)[:, ::-1][inverse]
        return tails

    @functools.cached_property
    def null(self) -> np.ndarray:
        """Smallest tail of any label when labels are permuted, ascending, (PERMUTATIONS,).

        The top sources of a channel are then a random subset of all sources: the null is the same for all channels.
        """
        count = len(self.sizes[0])
        generator = np.random.default_rng(seed_of("labels", *self.sizes.sum(0).tolist()))
        smallest = []
        for start in range(0, PERMUTATIONS, PERMUTATION_BLOCK):
            block = min(PERMUTATION_BLOCK, PERMUTATIONS - start)
            drawn = np.stack(
                [generator.choice(len(self.labels), self.top, replace=False, shuffle=False) for _ in range(block)]
            )
            flat = np.arange(block)[:, None] * count + self.labels[drawn]
            counts = np.bincount(flat.ravel(), minlength=block * count).reshape(block, count)
            smallest.append(np.take_along_axis(self.tails.T, counts, 0).min(1))
        return np.sort(np.concatenate(smallest))

    def p_values(self, tails: np.ndarray) -> np.ndarray:
        """Return p values that account for the search over all labels.

        This is the single-step minP method (Westfall & Young 1993, "Resampling-Based Multiple Testing", section 2.3):
        (1 + number of permutations whose smallest tail is as small) ÷ (1 + number of permutations).
        """
        # Equal tails can differ in the last bits.
        return (1 + np.searchsorted(self.null, tails * (1 + 1e-9), "right")) / (1 + len(self.null))


def associate_by_counts(best: np.ndarray, labels: np.ndarray, sources: np.ndarray) -> Association:
    """Count the labels among the dataset examples, for datasets with few labeled images.

    Args:
        best: Image indices of the dataset examples, (C, k); −1 for none.
        labels: Label number of every image of the dataset, (images,); −1 for none.
        sources: Number of the source of every image, (images,): crops of one source that have one label count once.
    """
    association = Association.empty("counts", len(best), TOP)
    for channel, indices in enumerate(best):
        shown = indices[indices >= 0]
        entries = np.unique(np.stack([labels[shown], sources[shown]]), axis=1)
        names, counts = np.unique(entries[0][entries[0] >= 0], return_counts=True)
        order = np.lexsort((names, -counts))[:TOP]
        association.over[channel, : len(order)] = names[order]
        association.count[channel, : len(order)] = counts[order]
    return association


def associate_by_activations(
    codes: np.ndarray, sources: LabeledSources, low: np.ndarray, high: np.ndarray, rectified: bool
) -> Association:
    """Measure the association of channels with labels from histogram bins of the maximum activations.

    The value of an image is its maximum over positions, at the center of its histogram bin; the value of a source is
    the mean over its crops.

    **Over-representation.** The top 1 % are the n / 100 sources (rounded up) with the highest values, ties in random
    order. `lift` is the share of a label among them, divided by its share of all. A label counts as over-represented
    if its p value (`LabeledSources.p_values`), which accounts for the search over all labels, is at most
    `SIGNIFICANCE`. Of those, the `TOP` with the largest lift are stored. Over many channels without any relation to
    labels, one in 20 still gets a label.

    **Best label.** In each half of the sources the label with the highest mean value is chosen, and measured in the
    other half, where its advantage is not that of the choice; the results of both ways are averaged. Selectivity is
    (m − r) / (m + r), with m the mean of the label's sources and r the mean of all other sources. Morcos et al. (2018,
    "On the importance of single directions for generalization", section 3.3) take the mean over the *map* of an
    image as its value, the mean over the images of a *class*, and for r the mean over the other *classes*; here the
    value is the maximum of the map, and every source counts equally. Values are rectified where a rectifier follows;
    in other layers the ratio means nothing and is NaN, and means are of the values themselves. AUROC is the
    probability that a source of the label has a higher value than a source of another label; ties count half. It is
    0.5 for a channel that has nothing to do with labels.

    Args:
        codes: Bins of the images, (images, C) uint8.
        sources: The images, grouped by source; at least two labels must have enough sources.
        low: Lower ends of the histograms, (C,).
        high: Upper ends of the histograms, (C,).
        rectified: Whether zero is a threshold of the layer's values.
    """
    association = Association.empty("responses", codes.shape[1], TOP)
    for start in range(0, codes.shape[1], CHANNEL_BLOCK):
        columns = slice(start, start + CHANNEL_BLOCK)
        # Bins, for ranks: rectified values of different bins would be ties.
        bins = np.ascontiguousarray(codes[sources.images, columns].T)
        centers = low[columns, None] + (high - low)[columns, None] * np.arange(-0.5, BINS + 1) / BINS
        values = np.take_along_axis(np.maximum(centers, 0) if rectified else centers, bins, 1)
        levels, values = _mean_over_crops(bins.astype(np.float64), sources), _mean_over_crops(values, sources)
        for row in range(len(levels)):
            _set_over_represented(association, start + row, levels[row], sources)
        _set_best(association, start, (values, levels), sources, rectified)
    return association


def _mean_over_crops(values: np.ndarray, sources: LabeledSources) -> np.ndarray:
    """Return the means over the images of each entry, (channels, n), of values (channels, m)."""
    count = values.shape[1]
    if len(sources.starts) == count:
        return values
    return np.add.reduceat(values, sources.starts, axis=1) / np.diff(np.append(sources.starts, count))


def _set_over_represented(association: Association, channel: int, levels: np.ndarray, sources: LabeledSources) -> None:
    """Set `over`, `count`, `lift` and `p` of a channel; `levels` are the mean bins of the entries, (n,)."""
    threshold = np.partition(levels, len(levels) - sources.top)[len(levels) - sources.top]
    above, ties = np.flatnonzero(levels > threshold), np.flatnonzero(levels == threshold)
    ties = ties[np.argsort(sources.rank[ties])][: sources.top - len(above)]
    sizes = sources.sizes.sum(0)
    counts = np.bincount(sources.labels[np.append(above, ties)], minlength=len(sizes))
    present = sources.large[counts[sources.large] > 0]
    p = sources.p_values(sources.tails[present, counts[present]])
    lift = counts[present] / sources.top / (sizes[present] / len(sources.labels))
    order = np.lexsort((present, -counts[present], -lift))
    order = order[(p <= SIGNIFICANCE)[order]][:TOP]
    association.over[channel, : len(order)] = present[order]
    association.count[channel, : len(order)] = counts[present][order]
    association.lift[channel, : len(order)] = lift[order]
    association.p[channel, : len(order)] = p[order]


def _set_best(
    association: Association,
    start: int,
    measured: tuple[np.ndarray, np.ndarray],
    sources: LabeledSources,
    rectified: bool,
) -> None:
    """Set `best`, `chosen`, `selectivity` and `auroc` of the channels from `start` on.

    Args:
        association: The association to complete.
        start: The first channel.
        measured: Mean activations of the entries, rectified or not, and their mean bins, (channels, n) each.
        sources: The entries.
        rectified: Whether the activations are rectified.
    """
    values, levels = measured
    sizes, large = sources.sizes, sources.large
    present = np.flatnonzero(sizes.ravel())
    totals = np.zeros((len(values), sizes.size))
    totals[:, present] = np.add.reduceat(values, sources.begins.ravel()[present], axis=1)
    totals = totals.reshape(-1, *sizes.shape)
    means = totals[:, :, large] / sizes[:, large]
    chosen = large[means.argmax(2)]
    is_defined = (means.max(2) > 0).all(1) if rectified else np.ones(len(means), bool)
    for row in np.flatnonzero(is_defined):
        results = []
        for half in (0, 1):
            label = chosen[row, 1 - half]
            begin, size = sources.begins[half, label], sizes[half, label]
            in_half = levels[row, sources.begins[half, 0] :][: sizes[half].sum()]
            area = auroc(levels[row, begin : begin + size], np.sort(in_half))
            results.append((selectivity(totals[row, half], sizes[half], label), area))
        channel = start + row
        association.chosen[channel] = chosen[row]
        association.best[channel] = chosen[row, 0] if chosen[row, 0] == chosen[row, 1] else -1
        mean_selectivity, association.auroc[channel] = np.mean(results, 0)
        if rectified:
            association.selectivity[channel] = mean_selectivity


def selectivity(totals: np.ndarray, sizes: np.ndarray, label: int) -> float:
    """Return (m − r) / (m + r), with m the mean of a label and r the mean of all others; NaN if both are 0.

    Args:
        totals: Sum of the rectified values of each label, (labels,).
        sizes: Number of values of each label, (labels,).
        label: The label; at least one value has another.
    """
    mean = totals[label] / sizes[label]
    mean_others = (totals.sum() - totals[label]) / (sizes.sum() - sizes[label])
    return float((mean - mean_others) / (mean + mean_others)) if mean + mean_others else float("nan")


def auroc(positives: np.ndarray, ordered: np.ndarray) -> float:
    """Return the probability that a positive value is above one of the others; ties count half.

    This is U / (n₁ n₂) of Mann & Whitney (1947). NaN if there are no positives or no others.

    Args:
        positives: The positive values, (n₁,).
        ordered: All values, the positive ones included, ascending, (n₁ + n₂,).
    """
    pairs = len(positives) * (len(ordered) - len(positives))
    below, not_above = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    # A positive value is above half of the positive values on average, itself and ties counted half.
    wins = (below + not_above).sum() / 2 - len(positives) ** 2 / 2
    return float(wins / pairs) if pairs else float("nan")
