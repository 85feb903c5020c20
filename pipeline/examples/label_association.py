"""Which labels a channel goes with: over-represented ones among its top images, class selectivity, AUROC."""

import dataclasses

import numpy as np

from pipeline.examples.channel_stats import BINS

# With fewer images of a label than this its mean and its AUROC say more of those images than of the label.
LEAST = 10
TOP = 3


@dataclasses.dataclass(frozen=True)
class Association:
    """Labels of C channels, by number; −1 and NaN where there is nothing to say.

    `over` (C, 3) are the labels most over-represented among the top 1 % of images, with `count` there and `lift`
    (their share there, divided by their share of all); `best` (C,) is the label with the largest mean response, with
    `selectivity` and `auroc`. `method` is "responses", or "counts" where too few images have one label: then `over`
    and `count` are the commonest labels among the channel's best examples, and the rest is empty.
    """

    method: str
    over: np.ndarray
    count: np.ndarray
    lift: np.ndarray
    best: np.ndarray
    selectivity: np.ndarray
    auroc: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, as they go into an atlas."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}


def _nothing(method: str, channels: int) -> Association:
    def floats(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    over = np.full((channels, TOP), -1, np.int32)
    zero = np.zeros((channels, TOP), np.int32)
    best = np.full(channels, -1, np.int32)
    return Association(method, over, zero, floats(channels, TOP), best, floats(channels), floats(channels))


def enough(labels: np.ndarray) -> bool:
    """Whether at least two labels have images enough for numbers; `labels` (n,) are label numbers, −1 for none."""
    counts = np.bincount(labels[labels >= 0])
    return int((counts >= LEAST).sum()) >= 2


def by_counts(best: np.ndarray, labels: np.ndarray) -> Association:
    """From lists of best examples alone: (C, k) image indices, −1 for none, and the label number of every image."""
    found = _nothing("counts", len(best))
    for row, indices in enumerate(best):
        own = labels[indices[indices >= 0]]
        names, counts = np.unique(own[own >= 0], return_counts=True)
        order = np.lexsort((names, -counts))[:TOP]
        found.over[row, : len(order)] = names[order]
        found.count[row, : len(order)] = counts[order]
    return found


def by_responses(codes: np.ndarray, labels: np.ndarray, low: np.ndarray, high: np.ndarray) -> Association:
    """From the bins of per-image maxima, (n, C) uint8, of images with label numbers `labels` (n,), −1 for none.

    The top 1 % are the n / 100 images (rounded up) with the highest bins, ties by the order of images. Means and
    selectivity are of rectified responses at the middle of their bins. Selectivity is that of Morcos et al. (2018):
    (m − r) / (m + r), m the mean over images of the best label and r over all others. AUROC is the chance that an
    image of the best label answers higher than one of another, ties counting half.
    """
    labelled = labels >= 0
    codes, labels = codes[labelled], labels[labelled]
    sizes = np.bincount(labels)
    large = np.flatnonzero(sizes >= LEAST)
    found = _nothing("responses", codes.shape[1])
    by_label = np.argsort(labels, kind="stable")
    starts = np.cumsum([0, *sizes[:-1]])
    members = {int(name): by_label[starts[name] : starts[name] + sizes[name]] for name in large}
    present = np.flatnonzero(sizes > 0)
    for start in range(0, codes.shape[1], 64):
        columns = slice(start, start + 64)
        own = np.ascontiguousarray(codes[:, columns].T)
        _over(found, start, own, labels, sizes)
        middle = np.arange(-0.5, BINS + 1) / BINS
        values = np.maximum(low[columns, None] + (high - low)[columns, None] * middle, 0).astype(np.float32)
        sums = np.zeros((len(own), len(sizes)))
        answers = np.take_along_axis(values, own[:, by_label], 1)
        sums[:, present] = np.add.reduceat(answers, starts[present], axis=1, dtype=np.float64)
        for row, each in enumerate(sums):
            channel = start + row
            means = each[large] / sizes[large]
            if not means.max() > 0:
                continue
            best = int(large[means.argmax()])
            mean, rest = means.max(), (each.sum() - each[best]) / (len(labels) - sizes[best])
            found.best[channel] = best
            found.selectivity[channel] = (mean - rest) / (mean + rest)
            found.auroc[channel] = auroc(own[row][members[best]], own[row])
    return found


def _over(found: Association, start: int, codes: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> None:
    count = len(labels)
    top = -(-count // 100)
    # Code first, then the earlier image: whole numbers without ties.
    keys = codes.astype(np.int64) * count + (count - 1 - np.arange(count))
    chosen = count - 1 - np.partition(keys, count - top, axis=1)[:, count - top :] % count
    for row, own in enumerate(labels[chosen]):
        counts = np.bincount(own, minlength=len(sizes))
        lift = counts / top / (np.maximum(sizes, 1) / count)
        # One image of a rare label is chance: two are the least to speak of.
        names = np.flatnonzero((sizes >= LEAST) & (counts >= min(2, top)) & (lift > 1))
        best = names[np.lexsort((names, -counts[names], -lift[names]))][:TOP]
        found.over[start + row, : len(best)] = best
        found.count[start + row, : len(best)] = counts[best]
        found.lift[start + row, : len(best)] = lift[best]


def auroc(own: np.ndarray, everyone: np.ndarray) -> float:
    """Chance that one of `own` codes is above one of the others of `everyone`, ties counting half."""
    mine = np.bincount(own, minlength=BINS + 2).astype(np.float64)
    others = np.bincount(everyone, minlength=BINS + 2) - mine
    below = np.cumsum(others) - others
    pairs = mine.sum() * others.sum()
    return float((mine * (below + others / 2)).sum() / pairs) if pairs else float("nan")
