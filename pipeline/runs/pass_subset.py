"""Parts of a finished dataset pass: what it says of some of its layers and channels is the pass of a smaller run.

A pass keeps the channels of all its layers side by side, and nothing of one depends on another's. So columns are
taken out, and rows of the second look; no photograph is read. The numbers are those that a pass of the smaller run's
own would give, to the rounding of a network that is folded for other layers.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from pipeline.examples.localize import blob
from pipeline.runs import manifest
from pipeline.runs.cost_model import PlanRow
from pipeline.runs.dataset_pass import DatasetPass
from pipeline.runs.folder import RunFolder
from pipeline.runs.planner import Plan
from pipeline.store import shards

# What the pass keeps a layer, and what a photograph and channel; all else is by channel, or of the photographs alone.
LAYERS = ("tally/crowd", "tally/crowded")
PHOTOGRAPHS = ("responses/peak", "codes/bin")


class PassSubset:
    """What `lender`, the survey of a run with more layers or channels, says of those of a plan."""

    def __init__(self, made: Plan, lender: DatasetPass) -> None:
        self.lender = lender
        place = {layer.name: i for i, (layer, _) in enumerate(lender.layers)}
        starts = np.cumsum([0, *(layer.channels for layer, _ in lender.layers)])
        self._layers = [place[layer.name] for layer, _ in made.layers]
        self._columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in self._layers])
        # Places and heat-maps are known of channels that the lender shows.
        there = [set(lender.layers[i][1]) for i in self._layers]
        self.shows = all(set(channels) <= known for (_, channels), known in zip(made.layers, there, strict=True))

    @classmethod
    def of(cls, made: Plan, lender: RunFolder) -> "PassSubset | None":
        """From a run whose layers hold all of the plan's; None where they do not, or nobody knows which they are."""
        known = manifest.read(lender.path)
        if known is None or (known.weights, known.dataset) != (made.setup.weights, made.dataset_fingerprint):
            return None
        taps = {layer.name: (layer.tap, layer.channels) for layer, _ in known.layers}
        if any(taps.get(layer.name) != (layer.tap, layer.channels) for layer, _ in made.layers):
            return None
        main = made.config.render.name
        rows = tuple(PlanRow(layer, channels, (0, 0), 0.0, main) for layer, channels in known.layers)
        setup = dataclasses.replace(made.setup, layers=tuple(layer for layer, _ in known.layers))
        return cls(made, DatasetPass(dataclasses.replace(made, rows=rows, setup=setup), lender.shards, keep=False))

    def fits(self, own: DatasetPass) -> bool:
        """Whether the whole first look can be taken over: nothing of it was begun with other ranges."""
        return self.lender.covered and own.content in ("", shards.content(self._ranges()))

    def _ranges(self) -> dict[str, np.ndarray]:
        assert self.lender.scale is not None
        return {name: array[self._columns] for name, array in self.lender.scale.arrays().items()}

    def write_sweep(self, own: DatasetPass) -> int:
        """Write the first look, ranges and all pieces, into the folder of `own`; returns the number of shards."""
        ranges = self._ranges()
        content = shards.content(ranges)
        shards.write(
            own.path("ranges", "ranges", own.scale_digest), {"digest": own.scale_digest, "content": content}, ranges
        )
        for (start, end), piece in self.lender.ranges.items():
            attributes = {"digest": own.digest, "start": start, "end": end, "ranges": content}
            data = shards.image(attributes, self._cut(piece.arrays()), "lzf")
            shards.place(own.path("examples", f"{start}-{end}", own.digest), data)
        return 1 + len(self.lender.ranges)

    def _cut(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a `Sweep` for fewer layers."""
        found = dict(arrays)
        for name, array in arrays.items():
            if name in LAYERS:
                found[name] = array[self._layers]
            elif name in PHOTOGRAPHS:
                found[name] = array[:, self._columns]
            elif name.startswith(("tops/", "tally/")) and array.ndim:
                found[name] = array[self._columns]
        return found

    def write_looks(self, own: DatasetPass) -> int:
        """Write the second look into the folder of `own`, whose first is complete; returns the number of shards.

        That is 0 where the lender did not look at all that is shown here: then it is looked at again.
        """
        mine, theirs = own.table, self.lender.table
        wanted: list[np.ndarray] = []
        rows: list[np.ndarray] = []  # the row here of each row there, −1 for none
        for i, j in enumerate(self._layers):
            at = np.searchsorted(theirs.channels[j], mine.channels[i])
            pairs = mine.pairs[i].astype(np.int64)
            wanted.append(pairs[:, 0] * len(theirs.channels[j]) + at[pairs[:, 1]])
            if not np.isin(wanted[-1], _keys(theirs.pairs[j], len(theirs.channels[j]))).all():
                return 0
            if not np.isin(mine.top[i], theirs.top[j]).all():
                return 0
            rows.append(np.full(len(theirs.channels[j]), -1, np.int32))
            rows[-1][at] = np.arange(len(at))
        count = 0
        for (a, b), piece in self.lender.looks.items():
            start = int(np.searchsorted(mine.images, theirs.images[a]))
            end = int(np.searchsorted(mine.images, theirs.images[b - 1], "right"))
            if start == end:
                continue
            held = piece.arrays()
            arrays = _pictures(held, mine.images[start:end])
            for i, j in enumerate(self._layers):
                pairs = held[f"{j}/pairs"]
                kept = np.isin(_keys(pairs, len(rows[i])), wanted[i])
                for name in ("place", "range", "map"):
                    arrays[f"{i}/{name}"] = held[f"{j}/{name}"][kept]
                arrays[f"{i}/pairs"] = np.stack([pairs[kept, 0], rows[i][pairs[kept, 1]], pairs[kept, 2]], 1)
                top = np.isin(held[f"{j}/top"], mine.top[i])
                for name in ("top", "answer"):
                    arrays[f"{i}/{name}"] = held[f"{j}/{name}"][top]
                if f"{j}/jpeg" in held:
                    arrays |= _pieces(held, f"{j}/", f"{i}/", kept)
            attributes = {"digest": own.shown_digest, "start": start, "end": end}
            path = own.path("winners", f"{start}-{end}", own.shown_digest)
            shards.place(path, shards.image(attributes, arrays, "lzf"))
            count += 1
        return count


def _keys(pairs: np.ndarray, width: int) -> np.ndarray:
    """(P, 3) pairs of image and row, of `width` rows, → (P,) one number each."""
    return pairs[:, 0].astype(np.int64) * width + pairs[:, 1]


def _pictures(held: Mapping[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """The pictures of a second look that are of `images`."""
    kept = np.isin(held["shown/index"], images)
    found = {f"shown/{name}": held[f"shown/{name}"][kept] for name in ("index", "size", "box")}
    found["shown/lost"] = held["shown/lost"][np.isin(held["shown/lost"], images)]
    return found | (_pieces(held, "shown/", "shown/", kept) if "shown/jpeg" in held else {})


def _pieces(held: Mapping[str, np.ndarray], old: str, new: str, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Those JPEGs of a row of them that are `kept`."""
    offset, data = held[f"{old}offset"], held[f"{old}jpeg"]
    return blob(new, [data[offset[i] : offset[i + 1]].tobytes() for i in np.flatnonzero(kept).tolist()])
