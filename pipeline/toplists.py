"""The k best photographs of every channel: exact, and the same however the work was split.

The order is total: higher value first, then lower image index. Photographs of one source picture (crops of
it) stand for one another: only the best of them enters a list. Lists of any ranges can be merged.
"""

import dataclasses

import numpy as np
from torch import Tensor

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class TopList:
    """(C, k) arrays, best first; `index` is −1 where there are fewer than k photographs."""

    value: np.ndarray
    index: np.ndarray
    source: np.ndarray
    y: np.ndarray
    x: np.ndarray

    @classmethod
    def empty(cls, channels: int, k: int) -> "TopList":
        """Lists that nothing has entered yet."""
        shape = (channels, k)
        none = np.full(shape, EMPTY, np.int32)
        place = np.zeros(shape, np.int16)
        return cls(np.full(shape, -np.inf, np.float32), none, none.copy(), place, place.copy())

    def arrays(self) -> dict[str, np.ndarray]:
        """The five arrays by name, as they go into a shard."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def best_of(candidates: TopList, k: int) -> TopList:
    """The k best of (C, n) candidates in any order, at most one of a source."""
    # lexsort's last key is the first to count. Empty places have value −inf and go last.
    order = np.lexsort((candidates.index, -candidates.value), axis=-1)
    ordered = {name: np.take_along_axis(a, order, -1) for name, a in candidates.arrays().items()}
    source = ordered["source"]
    same = (source[:, :, None] == source[:, None, :]) & (source != EMPTY)[:, :, None]
    # A candidate is a repeat if a better one (an earlier column) has the same source.
    repeat = np.tril(same, -1).any(-1)
    if repeat.any():
        keep = np.argsort(repeat, axis=-1, kind="stable")
        ordered = {name: np.take_along_axis(a, keep, -1) for name, a in ordered.items()}
        gone = np.take_along_axis(repeat, keep, -1)
        ordered["value"] = np.where(gone, np.float32(-np.inf), ordered["value"])
        for name in ("index", "source"):
            ordered[name] = np.where(gone, np.int32(EMPTY), ordered[name])
    return TopList(**{name: np.ascontiguousarray(a[:, :k]) for name, a in ordered.items()})


def merge(lists: list[TopList], k: int) -> TopList:
    """One list from several over disjoint photographs."""
    stacked = {n: np.concatenate([t.arrays()[n] for t in lists], -1) for n in lists[0].arrays()}
    return best_of(TopList(**stacked), k)


def candidates(maps: Tensor, indices: np.ndarray, sources: np.ndarray) -> TopList:
    """A batch's (B, C, H, W) maps as (C, B) candidates: each photograph by its spatial maximum and its place."""
    batch, channels, _, width = maps.shape
    # Of several equal maxima torch.max gives the first, in row order.
    value, at = maps.flatten(2).max(-1)
    at = at.T.cpu().numpy()
    row = np.broadcast_to(indices.astype(np.int32), (channels, batch))
    source = np.broadcast_to(sources.astype(np.int32), (channels, batch))
    y, x = np.divmod(at, width)
    return TopList(value.float().T.cpu().numpy(), row, source, y.astype(np.int16), x.astype(np.int16))


def keep_top(tops: TopList, new: TopList, k: int) -> TopList:
    """`tops` with a batch of candidates merged in; channels that no candidate can enter are left alone."""
    threshold = tops.value[:, -1:]
    # A candidate equal to the last has a higher index when images come in order, but need not in general.
    enters = (new.value >= threshold).any(-1)
    if not enters.any():
        return tops
    rows = np.flatnonzero(enters)
    part = merge([_rows(tops, rows), _rows(new, rows)], k)
    arrays = tops.arrays()
    for name, array in part.arrays().items():
        arrays[name][rows] = array
    return TopList(**arrays)


def _rows(tops: TopList, rows: np.ndarray) -> TopList:
    return TopList(**{name: a[rows] for name, a in tops.arrays().items()})
