"""Examples from a channel's whole range, and the subset of photographs that they are drawn from.

What is drawn must not depend on who worked when, so chance is a hash of what a photograph is called: the
photographs with the lowest hashes are the *subset*, whose responses are kept for every channel.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


def chance(name: str, purpose: str) -> int:
    """A number from 0 to 2⁶⁴ − 1 that only what is named and the purpose decide."""
    text = f"{purpose}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def subset(names: Sequence[str], count: int) -> np.ndarray:
    """Indices of at most `count` of the named photographs, drawn by hash, in the order of their hashes; int32."""
    hashes = np.array([chance(name, "subset") for name in names], np.uint64)
    return np.lexsort((np.arange(len(hashes)), hashes))[:count].astype(np.int32)


def draws(channels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """(C, n) pseudo-random uint64 of each channel and photograph: splitmix64 (Steele et al. 2014) of the pair."""
    x = channels.astype(np.uint64)[:, None] << np.uint64(32) | indices.astype(np.uint64)
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def spectrum(
    peaks: np.ndarray,
    indices: np.ndarray,
    sources: np.ndarray,
    channels: np.ndarray,
    edges: Sequence[float],
    each: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`each` photographs from every quantile bin of each channel: (value float32, index int32), (C, bins, each).

    `peaks` (n, C) are the maxima of photographs `indices` (n,), which come from `sources` (n,). Photographs are
    ranked by maximum, ties by index; the one of rank r of n lies at (r + ½) / n, and `edges` (per cent) bound the
    bins. From each bin those of the lowest `draws` are taken, no source twice, and put in rising order; −1 and NaN
    where there are no more. Bins take turns, the outer ones first, so that none takes all of few sources.
    """
    count, bins = len(indices), len(edges) - 1
    shape = (len(channels), bins, each)
    value, index = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int32)
    if not count:
        return value, index
    by_index = np.argsort(indices)
    peaks, indices, sources = peaks[by_index], indices[by_index], sources[by_index]
    order = np.argsort(peaks.T, axis=1, kind="stable")  # (C, n), rising
    place = (np.arange(count) + 0.5) / count * 100
    bin_of = np.searchsorted(np.asarray(edges, np.float64), place, "right") - 1
    for row, channel in enumerate(channels):
        ranked = order[row]
        chances = draws(np.array([channel]), indices[ranked])[0]
        queues = [iter(np.flatnonzero(bin_of == b)[np.argsort(chances[bin_of == b])]) for b in range(bins)]
        used: set[int] = set()
        taken: list[list[int]] = [[] for _ in range(bins)]
        for _ in range(each):
            for b in sorted(range(bins), key=lambda b: (min(b, bins - 1 - b), b)):
                for at in queues[b]:
                    if (source := int(sources[ranked[at]])) not in used:
                        used.add(source)
                        taken[b].append(int(at))
                        break
        for b, ats in enumerate(taken):
            rows = ranked[sorted(ats)]
            value[row, b, : len(rows)], index[row, b, : len(rows)] = peaks[rows, row], indices[rows]
    return value, index
