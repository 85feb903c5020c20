"""Dataset examples from all quantiles of a channel.

They are chosen among the *subset* of the images, for which the activations of every channel are stored. A draw must not
depend on which worker did what when, so random numbers are hashes (`Dataset.draw`).
"""

from collections.abc import Iterator, Sequence

import numpy as np


def pseudo_random(channels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return a uint64 for each pair of channel and image, (C, n): splitmix64 (Steele et al. 2014) of the pair."""
    x = channels.astype(np.uint64)[:, None] << np.uint64(32) | indices.astype(np.uint64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def select_quantile_examples(
    peaks: np.ndarray,
    indices: np.ndarray,
    sources: np.ndarray,
    channels: np.ndarray,
    edges: Sequence[float],
    per_bin: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Select images from every quantile bin of each channel.

    Images are ranked by maximum activation, ties by index. The image of rank r among n is at quantile (r + ½) / n.
    From each bin those with the lowest `pseudo_random` numbers are selected, no source twice for a channel. The bins
    select one image each in turn, the outer bins first, so that no bin uses up all sources.

    Args:
        peaks: Maximum activations of n images, (n, C).
        indices: Indices of the images, (n,).
        sources: Sources of the images, (n,).
        channels: Channel numbers of the columns of `peaks`, (C,).
        edges: Bounds of the bins in percent, ascending.
        per_bin: Number of images per bin.

    Returns:
        (values float32, image indices int32), (C, bins, per_bin) each, ascending by value within a bin; NaN and −1 for
        entries without an image.
    """
    count, bins = len(indices), len(edges) - 1
    shape = (len(channels), bins, per_bin)
    value, index = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int32)
    if not count:
        return value, index
    by_index = np.argsort(indices)
    peaks, indices, sources = peaks[by_index], indices[by_index], sources[by_index]
    order = np.argsort(peaks.T, axis=1, kind="stable")  # (C, n), ascending
    quantile = (np.arange(count) + 0.5) / count * 100
    bin_of_rank = np.searchsorted(np.asarray(edges, np.float64), quantile, "right") - 1
    for row, channel in enumerate(channels):
        ranked = order[row]
        randoms = pseudo_random(np.array([channel]), indices[ranked])[0]
        queues = [iter(np.flatnonzero(bin_of_rank == b)[np.argsort(randoms[bin_of_rank == b])]) for b in range(bins)]
        for b, ranks in enumerate(_draw_in_turn(queues, sources[ranked], per_bin)):
            rows = ranked[sorted(ranks)]
            value[row, b, : len(rows)], index[row, b, : len(rows)] = peaks[rows, row], indices[rows]
    return value, index


def _draw_in_turn(queues: Sequence[Iterator[int]], source_of_rank: np.ndarray, per_bin: int) -> list[list[int]]:
    """Take ranks from the queue of each bin in turn, the outer bins first, skipping sources that are in use."""
    bins = len(queues)
    used: set[int] = set()
    selected: list[list[int]] = [[] for _ in range(bins)]
    outer_first = sorted(range(bins), key=lambda b: (min(b, bins - 1 - b), b))
    for _ in range(per_bin):
        for b in outer_first:
            for rank in queues[b]:
                source = int(source_of_rank[rank])
                if source not in used:
                    used.add(source)
                    selected[b].append(int(rank))
                    break
    return selected
