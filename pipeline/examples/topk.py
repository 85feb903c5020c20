"""Top-k lists of dataset images for every channel: exact, and independent of how the work was split.

The order is total: higher value first, then lower image index. Value and index are packed into one integer, the *key*,
so that sorting keys needs no rule for ties. Images from the same source (crops of one image) are alternatives: only
the best of them enters a list. Lists over disjoint sets of images can be merged in any order.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

EMPTY_KEY = int(np.iinfo(np.int64).min)
_INDEX_MASK = 0xFFFFFFFF

# Rebuild all lists at once when more than one in `DENSE` of the new values could enter a list; otherwise update only
# the lists of the channels concerned.
DENSE = 4


def encode(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Pack values and image indices into keys; a larger key is better.

    The bits of a float, read as an integer, are in the order of the floats once those of negative floats are inverted.

    Args:
        values: float32 values without NaN.
        indices: Image indices, of a shape that broadcasts with that of `values`.

    Returns:
        int64 keys.
    """
    bits = (values.astype(np.float32, copy=False) + np.float32(0)).view(np.int32)  # −0 becomes 0
    ordered = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return (ordered.astype(np.int64) << 32) | (_INDEX_MASK - indices.astype(np.int64))


def decode(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (values float32, image indices int32) of keys; NaN and −1 for empty entries."""
    ordered = (keys >> 32).astype(np.int32)
    value = (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    is_empty = keys == EMPTY_KEY
    index = np.where(is_empty, -1, _INDEX_MASK - (keys & _INDEX_MASK)).astype(np.int32)
    return np.where(is_empty, np.float32(np.nan), value), index


def empty(channels: int, k: int) -> np.ndarray:
    """Return the keys of empty lists, (C, k)."""
    return np.full((channels, k), EMPTY_KEY, np.int64)


def select_best(keys: np.ndarray, k: int, sources: np.ndarray | None = None) -> np.ndarray:
    """Return the k best keys of each channel, best first, at most one per source.

    Args:
        keys: Keys in any order, (C, n).
        k: Length of the lists; shorter ones are padded with empty entries.
        sources: Source of every image of the dataset, (images,); None if each image is its own source.

    Returns:
        Keys (C, k).
    """
    if sources is not None:
        keys = _deduplicate(keys, sources)
    best = torch.from_numpy(np.ascontiguousarray(keys)).topk(min(k, keys.shape[1]), dim=1).values.numpy()
    if best.shape[1] < k:
        best = np.concatenate([best, empty(len(best), k - best.shape[1])], 1)
    return best


def merge(lists: Sequence[np.ndarray], k: int, sources: np.ndarray | None = None) -> np.ndarray:
    """Merge lists over disjoint sets of images into one of length k; see `select_best`."""
    return select_best(np.concatenate(list(lists), 1), k, sources)


def update(tops: np.ndarray, values: np.ndarray, indices: np.ndarray, sources: np.ndarray | None = None) -> np.ndarray:
    """Return lists with the values of further images merged in.

    Args:
        tops: Keys of the lists so far, (C, k).
        values: Values of n images, (n, C).
        indices: Indices of the images, (n,).
        sources: Source of every image of the dataset; None if each image is its own source.

    Returns:
        Keys (C, k); `tops` itself if no value can enter a list.
    """
    last, _ = decode(tops[:, -1])
    # A value equal to the last one may have a lower index. Most values are lower, and cost only this comparison.
    is_candidate = np.ascontiguousarray((values >= np.where(np.isnan(last), np.float32(-np.inf), last)).T)
    candidates = np.flatnonzero(is_candidate)
    if not len(candidates):
        return tops
    if sources is None and len(candidates) > is_candidate.size // DENSE:
        return select_best(np.concatenate([tops, encode(np.ascontiguousarray(values.T), indices)], 1), tops.shape[1])
    channel, image = np.divmod(candidates, is_candidate.shape[1])
    counts = np.count_nonzero(is_candidate, axis=1)
    rows = np.flatnonzero(counts)
    counts = counts[rows]
    starts = np.cumsum(counts) - counts
    keys = encode(values[image, channel], indices[image])
    if sources is not None:
        # Crops of one image are mostly adjacent. Reducing each run to its best key first spares `_deduplicate` the
        # comparison of all of them.
        source = sources[indices[image]]
        runs = np.flatnonzero(np.r_[True, (source[1:] != source[:-1]) | (channel[1:] != channel[:-1])])
        keys, channel = np.maximum.reduceat(keys, runs), channel[runs]
        rows, starts, counts = np.unique(channel, return_index=True, return_counts=True)
    new = np.full((len(rows), counts.max()), EMPTY_KEY, np.int64)
    row = np.repeat(np.arange(len(rows)), counts)
    new[row, np.arange(len(keys)) - starts[row]] = keys
    merged = tops.copy()
    merged[rows] = select_best(np.concatenate([tops[rows], new], 1), tops.shape[1], sources)
    return merged


def update_dense(tops: Tensor, values: Tensor, indices: Tensor, sources: Tensor | None = None) -> Tensor:
    """As `update`, by operations whose sizes do not depend on the values, so that a GPU never waits for the CPU.

    All tensors are on one device.
    """
    keys = torch.cat([tops, encode_tensor(values, indices).T], 1)
    k = tops.shape[1]
    if sources is None:
        return keys.topk(k, dim=1).values
    source = sources[(_INDEX_MASK - (keys & _INDEX_MASK)).clamp(max=len(sources) - 1)]
    best = []
    for _ in range(k):
        top, place = keys.max(1, keepdim=True)
        best.append(top)
        # Entries of the same source are alternatives to this one. Empty ones stay empty.
        keys = keys.masked_fill(source == source.gather(1, place), EMPTY_KEY)
    return torch.cat(best, 1)


def encode_tensor(values: Tensor, indices: Tensor) -> Tensor:
    """Pack values (n, C) and image indices (n,) into keys (n, C); see `encode`."""
    bits = (values + 0.0).view(torch.int32)  # −0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_INDEX_MASK - indices)[:, None]


def _deduplicate(keys: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Return keys (C, n) in descending order, with all but the best key of each source emptied."""
    ordered = np.sort(keys, axis=1)[:, ::-1]
    _, index = decode(ordered)
    source = np.where(index >= 0, sources[np.maximum(index, 0)], -1 - np.arange(index.shape[1]))
    is_repeated = np.zeros(ordered.shape, bool)
    for column in range(1, ordered.shape[1]):
        is_repeated[:, column] = (source[:, :column] == source[:, column : column + 1]).any(1)
    return np.where(is_repeated, EMPTY_KEY, ordered)
