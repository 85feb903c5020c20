"""The k best photographs of every channel: exact, and the same however the work was split.

The order is total: higher value first, then lower image index. Value and index together make one whole number,
the *key*, so that the order needs no rule for ties and sorting is sorting of integers. Photographs of one source
picture (crops of it) stand for one another: only the best of them enters a list. Lists of any ranges can be merged.
"""

from collections.abc import Sequence

import numpy as np
import torch

NONE = np.iinfo(np.int64).min  # the key of an empty place
_INDEX = 0xFFFFFFFF
DENSE = 4  # where more than one value in so many may enter a list, all are tried


def keys_of(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """float32 values of the photographs `indices` (of a shape that goes with theirs) → int64 keys, larger is better.

    The bits of a float, read as a whole number, are in the order of the floats once those of negative ones are
    turned round. Values must not be NaN.
    """
    bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)  # −0 becomes 0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (ordered.astype(np.int64) << 32) | (_INDEX - indices.astype(np.int64))


def decode(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value float32, index int32) of keys; NaN and −1 in empty places."""
    ordered = (keys >> 32).astype(np.int32)
    value = (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    empty = keys == NONE
    index = np.where(empty, -1, _INDEX - (keys & _INDEX)).astype(np.int32)
    return np.where(empty, np.float32(np.nan), value), index


def empty(channels: int, k: int) -> np.ndarray:
    """(C, k) keys of lists that nothing has entered yet."""
    return np.full((channels, k), NONE, np.int64)


def best_of(keys: np.ndarray, k: int, sources: np.ndarray | None = None) -> np.ndarray:
    """(C, k) best of (C, n) keys in any order, best first, at most one of a source.

    `sources` (images,) says which source each photograph of the dataset comes from; None where each is its own.
    """
    if sources is not None:
        keys = _once(keys, sources)
    ordered = torch.from_numpy(np.ascontiguousarray(keys)).topk(min(k, keys.shape[1]), dim=1).values.numpy()
    if ordered.shape[1] < k:
        ordered = np.concatenate([ordered, empty(len(ordered), k - ordered.shape[1])], 1)
    return ordered


def merge(lists: Sequence[np.ndarray], k: int, sources: np.ndarray | None = None) -> np.ndarray:
    """One list from several over disjoint photographs."""
    return best_of(np.concatenate(list(lists), 1), k, sources)


def extended(
    tops: np.ndarray, values: np.ndarray, indices: np.ndarray, sources: np.ndarray | None = None
) -> np.ndarray:
    """`tops` with (n, C) values of photographs `indices` merged in; channels that none can enter are left alone."""
    last, _ = decode(tops[:, -1])
    # A value equal to the last may have a lower index. Most values are below, and cost this comparison only.
    enters = np.ascontiguousarray((values >= np.where(np.isnan(last), np.float32(-np.inf), last)).T)
    found = np.flatnonzero(enters)
    if not len(found):
        return tops
    if sources is None and len(found) > enters.size // DENSE:
        return best_of(np.concatenate([tops, keys_of(np.ascontiguousarray(values.T), indices)], 1), tops.shape[1])
    channel, image = np.divmod(found, enters.shape[1])
    counts = np.count_nonzero(enters, axis=1)
    rows = np.flatnonzero(counts)
    counts = counts[rows]
    starts = np.cumsum(counts) - counts
    keys = keys_of(values[image, channel], indices[image])
    if sources is not None:
        # Crops of a picture mostly follow one another: the best of each run first, or dedupe compares them all.
        own = sources[indices[image]]
        runs = np.flatnonzero(np.r_[True, (own[1:] != own[:-1]) | (channel[1:] != channel[:-1])])
        keys, channel = np.maximum.reduceat(keys, runs), channel[runs]
        rows, starts, counts = np.unique(channel, return_index=True, return_counts=True)
    new = np.full((len(rows), counts.max()), NONE, np.int64)
    row = np.repeat(np.arange(len(rows)), counts)
    new[row, np.arange(len(keys)) - starts[row]] = keys
    merged = tops.copy()
    merged[rows] = best_of(np.concatenate([tops[rows], new], 1), tops.shape[1], sources)
    return merged


def _once(keys: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """(C, n) keys with all but the best of each source emptied; best first."""
    ordered = np.sort(keys, axis=1)[:, ::-1]
    _, index = decode(ordered)
    source = np.where(index >= 0, sources[np.maximum(index, 0)], -1 - np.arange(index.shape[1]))
    repeat = np.zeros(ordered.shape, bool)
    for column in range(1, ordered.shape[1]):
        repeat[:, column] = (source[:, :column] == source[:, column : column + 1]).any(1)
    return np.where(repeat, NONE, ordered)
