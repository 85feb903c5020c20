"""The arrays of the second pass, read from its shards as they are asked for.

They are larger than the memory of the driver may be: the images that are shown of a large dataset take gigabytes.
"""

import functools
import heapq
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.examples.localizations import Localizations
from pipeline.store.shards import Shard

# Copies of images are passed on in pieces of at least so many bytes.
PIECE_BYTES = 1 << 24


class LocalizedArrays(Localizations):
    """Arrays of the second pass by name, with all parts joined; only those of one layer are in memory at a time.

    Args:
        parts: Shards of the second pass, in the order of their images.

    Raises:
        DamagedShardError: From all methods, if a shard can't be read.
    """

    def __init__(self, parts: Sequence[Shard]) -> None:
        self._parts = parts
        self._layer: tuple[str, dict[str, np.ndarray]] = "", {}
        self._shared: dict[str, dict[str, np.ndarray]] = {}

    @functools.cached_property
    def _names(self) -> list[str]:
        return self._parts[0].names() if self._parts else []

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading the array, as `Mapping` would

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        if name.endswith("/jpeg"):
            return np.concatenate(list(self.pieces(name)))
        return self._group(name.partition("/")[0])[name]

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield the part of an array in each shard."""
        for shard in self._parts:
            yield shard.get(name)[name]

    def images(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number and the JPEG bytes of each image that is shown, in their order."""
        for shard in self._parts:
            arrays = shard.get("shown/index", "shown/offset", "shown/jpeg")
            ends = arrays["shown/offset"].tolist()
            for index, start, end in zip(arrays["shown/index"].tolist(), ends, ends[1:], strict=False):
                yield index, arrays["shown/jpeg"][start:end]

    def _group(self, group: str) -> dict[str, np.ndarray]:
        """Return all small arrays of a layer, or those that all layers share."""
        if group.isdigit():
            if self._layer[0] != group:
                self._layer = "", {}
                self._layer = group, self._read(group)
            return self._layer[1]
        if group not in self._shared:
            self._shared[group] = self._read(group)
        return self._shared[group]

    def _read(self, group: str) -> dict[str, np.ndarray]:
        names = [name for name in self._names if name.startswith(f"{group}/") and not name.endswith("/jpeg")]
        return joined([shard.get(*names) for shard in self._parts])


class WithMoreImages(Localizations):
    """Arrays of the second pass, with further images among those that are shown, in the order of all of them.

    Args:
        localizations: The arrays.
        more: Arrays with the group `shown`, of other images.
    """

    def __init__(self, localizations: LocalizedArrays, more: LocalizedArrays) -> None:
        self._first, self._more = localizations, more

    def __iter__(self) -> Iterator[str]:
        return iter(self._first)

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, name: object) -> bool:
        return name in self._first

    def __getitem__(self, name: str) -> np.ndarray:
        if not name.startswith("shown/"):
            return self._first[name]
        if name == "shown/jpeg":
            return np.concatenate([np.zeros(0, np.uint8), *self.pieces(name)])
        if name == "shown/offset":
            lengths = np.concatenate([np.diff(self._first[name]), np.diff(self._more[name])])
            return np.concatenate([[0], np.cumsum(lengths[self._order])])
        both = np.concatenate([self._first[name], self._more[name]])
        return np.sort(both) if name == "shown/lost" else both[self._order]

    @functools.cached_property
    def _order(self) -> np.ndarray:
        both = np.concatenate([self._first["shown/index"], self._more["shown/index"]])
        return np.argsort(both, kind="stable")

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """Yield an array in parts that can be in memory one at a time."""
        if name != "shown/jpeg":
            yield from self._first.pieces(name)
            return
        piece: list[np.ndarray] = []
        size = 0
        for _, data in heapq.merge(self._first.images(), self._more.images(), key=lambda one: one[0]):
            piece.append(data)
            size += len(data)
            if size >= PIECE_BYTES:
                yield np.concatenate(piece)
                piece, size = [], 0
        if piece:
            yield np.concatenate(piece)


def joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the parts of arrays as one; offsets of a part continue where the part before it ended."""
    result: dict[str, np.ndarray] = {}
    for name in parts[0] if parts else ():
        arrays = [part[name] for part in parts]
        if name.endswith("/offset"):
            ends = np.cumsum([0, *(a[-1] for a in arrays)])
            arrays = [arrays[0][:1], *(a[1:] + end for a, end in zip(arrays, ends, strict=False))]
        result[name] = np.concatenate(arrays)
    return result
