"""Association of channels with labels: over-representation among the top images, class selectivity, AUROC."""

import numpy as np

from pipeline.examples.association import Association
from pipeline.examples.channel_stats import BINS

# Labels with fewer images than this are ignored: mean and AUROC would describe those images rather than the label.
MIN_IMAGES = 10

# Number of over-represented labels that are stored per channel.
TOP = 3

# So many channels are processed at a time, to bound memory.
CHANNEL_BLOCK = 64


def _empty(method: str, channels: int) -> Association:
    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    over = np.full((channels, TOP), -1, np.int32)
    count = np.zeros((channels, TOP), np.int32)
    best = np.full(channels, -1, np.int32)
    return Association(method, over, count, nan(channels, TOP), best, nan(channels), nan(channels))


def has_enough_labels(labels: np.ndarray) -> bool:
    """Return whether at least two labels have `MIN_IMAGES` images; `labels` (n,) are label numbers, −1 for none."""
    counts = np.bincount(labels[labels >= 0])
    return int((counts >= MIN_IMAGES).sum()) >= 2


def associate_by_counts(best: np.ndarray, labels: np.ndarray) -> Association:
    """Count the labels among the dataset examples, for datasets with few labeled images.

    Args:
        best: Image indices of the dataset examples, (C, k); −1 for none.
        labels: Label number of every image of the dataset, (images,); −1 for none.
    """
    association = _empty("counts", len(best))
    for channel, indices in enumerate(best):
        example_labels = labels[indices[indices >= 0]]
        names, counts = np.unique(example_labels[example_labels >= 0], return_counts=True)
        order = np.lexsort((names, -counts))[:TOP]
        association.over[channel, : len(order)] = names[order]
        association.count[channel, : len(order)] = counts[order]
    return association


def associate_by_activations(codes: np.ndarray, labels: np.ndarray, low: np.ndarray, high: np.ndarray) -> Association:
    """Measure the association of channels with labels from histogram bins of the maximum activations.

    The top 1 % are the n / 100 images (rounded up) in the highest bins, ties in the order of images. Means and
    selectivity are of rectified activations, taken at the centers of the bins. Selectivity is that of Morcos et al.
    (2018), (m − r) / (m + r), with m the mean over the images of the label with the highest mean, and r the mean over
    all other images. AUROC is the probability that an image of that label has a higher activation than an image of
    another label; ties count half.

    Args:
        codes: Bins of n images, (n, C) uint8.
        labels: Label numbers of these images, (n,); −1 for none.
        low: Lower ends of the histograms, (C,).
        high: Upper ends of the histograms, (C,).
    """
    is_labeled = labels >= 0
    codes, labels = codes[is_labeled], labels[is_labeled]
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= MIN_IMAGES)
    association = _empty("responses", codes.shape[1])
    by_label = np.argsort(labels, kind="stable")
    starts = np.cumsum([0, *sizes[:-1]])
    images_of = {int(label): by_label[starts[label] : starts[label] + sizes[label]] for label in large}
    present = np.flatnonzero(sizes > 0)
    for start in range(0, codes.shape[1], CHANNEL_BLOCK):
        columns = slice(start, start + CHANNEL_BLOCK)
        block = np.ascontiguousarray(codes[:, columns].T)
        _set_over_represented(association, start, block, labels, sizes)
        center = np.arange(-0.5, BINS + 1) / BINS
        values = np.maximum(low[columns, None] + (high - low)[columns, None] * center, 0).astype(np.float32)
        sums = np.zeros((len(block), len(sizes)))
        activations = np.take_along_axis(values, block[:, by_label], 1)
        sums[:, present] = np.add.reduceat(activations, starts[present], axis=1, dtype=np.float64)
        for row, label_sums in enumerate(sums):
            channel = start + row
            means = label_sums[large] / sizes[large]
            if not means.max() > 0:
                continue
            best = int(large[means.argmax()])
            mean = means.max()
            mean_others = (label_sums.sum() - label_sums[best]) / (len(labels) - sizes[best])
            association.best[channel] = best
            association.selectivity[channel] = (mean - mean_others) / (mean + mean_others)
            association.auroc[channel] = auroc(block[row][images_of[best]], block[row])
    return association


def _set_over_represented(
    association: Association, start: int, codes: np.ndarray, labels: np.ndarray, sizes: np.ndarray
) -> None:
    """Set `over`, `count` and `lift` of the channels from `start` on; `codes` are their bins, (channels, n)."""
    count = len(labels)
    top = -(-count // 100)
    # Higher bins first, then earlier images, packed into integers without ties.
    keys = codes.astype(np.int64) * count + (count - 1 - np.arange(count))
    top_images = count - 1 - np.partition(keys, count - top, axis=1)[:, count - top :] % count
    for row, top_labels in enumerate(labels[top_images]):
        counts = np.bincount(top_labels, minlength=len(sizes))
        lift = counts / top / (np.maximum(sizes, 1) / count)
        # A single image of a rare label may be there by chance: require two.
        candidates = np.flatnonzero((sizes >= MIN_IMAGES) & (counts >= min(2, top)) & (lift > 1))
        best = candidates[np.lexsort((candidates, -counts[candidates], -lift[candidates]))][:TOP]
        association.over[start + row, : len(best)] = best
        association.count[start + row, : len(best)] = counts[best]
        association.lift[start + row, : len(best)] = lift[best]


def auroc(positives: np.ndarray, all_codes: np.ndarray) -> float:
    """Return the probability that a code of `positives` is above one of the other codes; ties count half.

    Args:
        positives: Codes of the positive images.
        all_codes: Codes of all images, the positive ones included.
    """
    positive_counts = np.bincount(positives, minlength=BINS + 2).astype(np.float64)
    negative_counts = np.bincount(all_codes, minlength=BINS + 2) - positive_counts
    below = np.cumsum(negative_counts) - negative_counts
    pairs = positive_counts.sum() * negative_counts.sum()
    return float((positive_counts * (below + negative_counts / 2)).sum() / pairs) if pairs else float("nan")
