"""Units as the pages and programs read them: plain data, every number as `atlas.h5` holds it.

`docs/site.md` and `api/v1/schema.json` say what each key means.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.site.context.layer_summary import Catalogue, Facts, Shown
from pipeline.site.data.js_shards import exact, rounded
from pipeline.site.layout import embedding
from pipeline.store.reader import LayerView

BARS = 64
# What was measured of the main picture that a layer's grid sorts and filters by; `ratio` beside it is its gain.
SORTED = (
    "robust_gain", "transfer", "agreement", "rank", "spectral_distance", "high_frequency", "checkerboard", "saturated",
)  # fmt: skip


def bars(counts: np.ndarray) -> np.ndarray:
    """(C', n) counts of even bins as (C', 64): neighbours are added up, and a rest joins the last."""
    each = -(-counts.shape[1] // BARS)
    padded = np.pad(counts, ((0, 0), (0, each * BARS - counts.shape[1])))
    return padded.reshape(len(counts), BARS, each).sum(2)


def columns(layer: LayerView, facts: Facts, catalogue: Catalogue) -> dict[str, Any]:
    """What a layer's grid sorts and filters by, one list a column in the order of its channels."""
    stats = layer.stats()
    found: dict[str, Any] = {}
    for key in ("max", "mean", "sparsity", "nonzero"):
        if key in stats:
            found[key] = rounded(stats[key])
    if facts.rendered:
        main = facts.rendered[0].key
        numbers = layer.numbers(main)
        found["ratio"] = rounded(numbers["gain"][:, 0])
        # What no unit has (agreement, with one picture each) is nothing to sort by.
        found |= {k: rounded(numbers[k][:, 0]) for k in SORTED if k in numbers and np.isfinite(numbers[k][:, 0]).any()}
        found["status"] = [str(s) for s in worst(numbers["status"])]
    names, used = labels_of(layer, facts, catalogue)
    if used:
        found["label"], found["labels"] = names, used
    return found


def worst(status: np.ndarray) -> list[str]:
    """(C', V) statuses → the one that a reader must know of, per unit."""
    rank = {"missing": 3, "failed": 2, "retried": 1}
    return [max(map(str, row), key=lambda s: rank.get(s, 0)) for row in status]


def labels_of(layer: LayerView, facts: Facts, catalogue: Catalogue) -> tuple[list[int], list[str]]:
    """A word for each unit: its class in a classifier, else the label most over-represented among its photographs.

    Returns places in a list of words, −1 for none, and that list.
    """
    if facts.classifier:
        words = [catalogue.classes[c] for c in facts.channels]
    else:
        held = layer.labels()
        over = held.over[:, 0] if held is not None else np.full(len(facts.channels), -1)
        words = [catalogue.names[i] if 0 <= i < len(catalogue.names) else "" for i in over.tolist()]
    used = sorted({word for word in words if word})
    place = {word: i for i, word in enumerate(used)}
    return [place.get(word, -1) for word in words], used


_ABSENT = object()


class Recorder:
    """Makes the records of one layer's units; everything but pictures is read once, when it is made.

    `similar` units are named beside each, from the `vectors` of `plane.spectra`, where there are any.
    """

    def __init__(
        self,
        layer: LayerView,
        facts: Facts,
        catalogue: Catalogue,
        lists: Sequence[Shown],
        ranks: np.ndarray,
        similar: int,
        others: Mapping[str, Mapping[int, int]],
    ) -> None:
        self._layer = layer
        self._facts = facts
        self._catalogue = catalogue
        self._lists = lists
        self._ranks = ranks
        self._similar = similar
        self._pictures = {r.key: _told(layer.numbers(r.key), layer.natural(r.key)) for r in facts.rendered}
        self._stats = {k: v.tolist() if v.dtype == bool else exact(v) for k, v in layer.stats().items()}
        self._labels = layer.labels()
        self._vectors = embedding.spectra([layer.responses()]) if similar else None
        self._wiring = wiring_of(layer, others)
        held = layer.histogram()
        self._histogram = held
        if held is not None:
            # Bars beyond the bins that there are would stretch the picture: each is so many whole bins wide.
            each = -(-held.counts.shape[1] // BARS)
            self._bars = bars(held.counts)
            self._lows, self._ends = exact(held.edges[:, 0]), exact(held.ends)
            self._step = rounded((held.edges[:, -1] - held.edges[:, 0]) / held.counts.shape[1] * each, 7)
            shares = layer.spectrum_edges
            marks = layer.quantiles([s / 100 for s in shares]) if shares else np.zeros((len(facts.channels), 0))
            self._marks = rounded(marks, 5)
        if self._labels is not None:
            self._lift = exact(self._labels.lift)
            self._choice = exact(np.stack([self._labels.selectivity, self._labels.auroc], -1))
        # Units see the same places again and again.
        self._box = functools.lru_cache(maxsize=1 << 16)(layer.crop_box)

    def units(self, rows: slice, cells: Mapping[tuple[int, int], int]) -> list[dict[str, Any]]:
        """Records of the units in `rows`. `cells` says in which crop a (row, pair) is shown."""
        facts, classes = self._facts, self._catalogue.classes
        found: list[dict[str, Any]] = []
        near = embedding.alike(self._vectors, rows, self._similar) if self._vectors is not None else None
        # As close as it is written, and as plain numbers: n units, then n correlations, a row a unit.
        alike = (near[0].tolist(), np.round(near[1].astype(np.float64), 4).tolist()) if near is not None else ([], [])
        entries = {shown.name: self._entries(shown, rows, cells) for shown in self._lists}
        for i, row in enumerate(range(rows.start, rows.stop)):
            channel = facts.channels[row]
            unit: dict[str, Any] = {"channel": channel, "tiny": int(self._ranks[row])}
            if facts.classifier:
                unit["class"] = classes[channel]
            if facts.rendered:
                unit["pictures"] = {key: told[row] for key, told in self._pictures.items()}
            if self._stats:
                unit["stats"] = {key: values[row] for key, values in self._stats.items()}
            if self._histogram is not None:
                unit["histogram"] = self._bins(row)
            if self._lists:
                unit["examples"] = {name: told[i] for name, told in entries.items()}
            if self._labels is not None:
                unit["labels"] = self._words(row)
            if near is not None:
                pairs = zip(alike[0][i], alike[1][i], strict=True)
                unit["similar"] = [[facts.channels[n], v, int(self._ranks[n])] for n, v in pairs if n >= 0]
            if self._wiring is not None:
                unit["wiring"] = self._wiring(row)
            found.append(unit)
        return found

    def _bins(self, row: int) -> dict[str, Any]:
        held = self._histogram
        assert held is not None
        return {
            "counts": self._bars[row].tolist(),
            "from": self._lows[row],
            "step": self._step[row],
            "under": int(held.under[row]),
            "over": int(held.over[row]),
            "ends": self._ends[row],
            "quantiles": self._marks[row],
        }

    def _entries(self, shown: Shown, rows: slice, cells: Mapping[tuple[int, int], int]) -> list[list[list[Any] | None]]:
        """[value, photograph, y, x, heat-map, crop, left, top, right, bottom] of each example of each unit in `rows`.

        The box is what the unit saw, in pixels of the network's input, and left out where that is all of it. In the
        spectrum an example's place says its bin, so one that is missing is null.
        """
        whole, gaps = self._facts.whole, shown.name == "spectrum"
        columns = (exact(shown.value[rows]), *(a[rows].tolist() for a in (shown.index, shown.y, shown.x, shown.pair)))
        found: list[list[list[Any] | None]] = []
        for row, told in zip(range(rows.start, rows.stop), zip(*columns, strict=True), strict=True):
            entries: list[list[Any] | None] = []
            for value, index, y, x, pair in zip(*told, strict=True):
                if index < 0:
                    if gaps:
                        entries.append(None)
                    continue
                entry = [value, index, y, x, pair, cells.get((row, named(pair, index)), -1)]
                if not whole:
                    entry += self._box(y, x) or ()
                entries.append(entry)
            found.append(entries)
        return found

    def _words(self, row: int) -> dict[str, Any]:
        held, names = self._labels, self._catalogue.names
        assert held is not None
        over = zip(held.over[row].tolist(), held.count[row].tolist(), self._lift[row], strict=True)
        found: dict[str, Any] = {"over": [[names[o], count, value] for o, count, value in over if o >= 0]}
        best = int(held.best[row])
        if best >= 0:
            selectivity, auroc = self._choice[row]
            found |= {"best": names[best], "selectivity": selectivity, "auroc": auroc}
        return found


def _told(numbers: Mapping[str, np.ndarray], natural: np.ndarray) -> list[list[dict[str, Any]]]:
    """What was measured of each unit's variants; seeds are text, for they exceed a double."""
    columns: dict[str, list[list[Any]]] = {}
    for name, array in numbers.items():
        if name == "trace":
            columns[name] = rounded(array)
        elif array.ndim > 2:
            continue
        elif np.issubdtype(array.dtype, np.floating):
            columns[name] = exact(array)
        elif name == "seed" or not np.issubdtype(array.dtype, np.integer):
            columns[name] = [[_ABSENT if value is None else str(value) for value in row] for row in array.tolist()]
        else:
            columns[name] = array.tolist()
    variants = numbers["activation"].shape[1]
    return [
        [
            {"natural": best} | {name: told[row][v] for name, told in columns.items() if told[row][v] is not _ABSENT}
            for v in range(variants)
        ]
        for row, best in enumerate(exact(natural))
    ]


def named(pair: int, index: int) -> int:
    """What an example is called within its unit: its heat-map's number, or one made from its photograph's."""
    return pair if pair >= 0 else -2 - index


def wiring_of(layer: LayerView, ranks: Mapping[str, Mapping[int, int]]) -> Callable[[int], dict[str, Any]] | None:
    """What each row's unit is most strongly wired to, or None where the atlas does not say.

    `ranks` are the places of small pictures by layer and channel; −1 stands for a unit that the atlas does not have.
    """
    sides = {side: found for side in ("inputs", "outputs") if (found := layer.wiring(side)) is not None}
    if not sides:
        return None
    strengths = {side: (exact(wires.norm), exact(wires.sum)) for side, wires in sides.items()}

    def of(row: int) -> dict[str, Any]:
        told = {}
        for side, wires in sides.items():
            known = ranks.get(wires.layer, {})
            triples = zip(wires.channel[row].tolist(), *(told[row] for told in strengths[side]), strict=True)
            units = [[c, norm, total, known.get(c, -1)] for c, norm, total in triples if c >= 0]
            told[side] = {"layer": wires.layer, "units": units}
        return told

    return of
