"""Units as the pages and programs read them: plain data, every number as `atlas.h5` holds it.

`docs/site.md` and `api/v1/schema.json` say what each key means.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.atlas import LayerView
from pipeline.site import plane
from pipeline.site.facts import Catalogue, Facts, Shown
from pipeline.site.scripts import exact, rounded

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
        self._numbers = {r.key: (layer.numbers(r.key), exact(layer.natural(r.key))) for r in facts.rendered}
        self._stats = {k: v.tolist() if v.dtype == bool else exact(v) for k, v in layer.stats().items()}
        self._labels = layer.labels()
        self._vectors = plane.spectra([layer.responses()]) if similar else None
        self._wiring = wiring_of(layer, others)
        held = layer.histogram()
        self._histogram = held
        if held is not None:
            # Bars beyond the bins that there are would stretch the picture: each is so many whole bins wide.
            each = -(-held.counts.shape[1] // BARS)
            self._bars = bars(held.counts)
            self._step = rounded((held.edges[:, -1] - held.edges[:, 0]) / held.counts.shape[1] * each, 7)
            shares = layer.spectrum_edges
            self._marks = layer.quantiles([s / 100 for s in shares]) if shares else np.zeros((len(facts.channels), 0))

    def units(self, rows: slice, cells: Mapping[tuple[int, int], int]) -> list[dict[str, Any]]:
        """Records of the units in `rows`. `cells` says in which crop a (row, pair) is shown."""
        facts, classes = self._facts, self._catalogue.classes
        found: list[dict[str, Any]] = []
        near = plane.alike(self._vectors, rows, self._similar) if self._vectors is not None else None
        for i, row in enumerate(range(rows.start, rows.stop)):
            channel = facts.channels[row]
            unit: dict[str, Any] = {"channel": channel, "tiny": int(self._ranks[row])}
            if facts.classifier:
                unit["class"] = classes[channel]
            if facts.rendered:
                unit["pictures"] = {key: self._pictures(key, row) for key in self._numbers}
            if self._stats:
                unit["stats"] = {key: values[row] for key, values in self._stats.items()}
            if self._histogram is not None:
                unit["histogram"] = self._bins(row)
            if self._lists:
                unit["examples"] = {shown.name: self._entries(shown, row, cells) for shown in self._lists}
            if self._labels is not None:
                unit["labels"] = self._words(row)
            if near is not None:
                pairs = zip(near[0][i].tolist(), np.round(near[1][i].astype(np.float64), 4).tolist(), strict=True)
                unit["similar"] = [[facts.channels[n], v, int(self._ranks[n])] for n, v in pairs if n >= 0]
            if self._wiring is not None:
                unit["wiring"] = self._wiring(row)
            found.append(unit)
        return found

    def _pictures(self, key: str, row: int) -> list[dict[str, Any]]:
        """A unit's variants with all that was measured of them; seeds are text, for they exceed a double."""
        numbers, natural = self._numbers[key]
        found: list[dict[str, Any]] = []
        for variant in range(numbers["activation"].shape[1]):
            one: dict[str, Any] = {"natural": natural[row]}
            for name, array in numbers.items():
                value = array[row, variant]
                if name == "trace":
                    one[name] = rounded(value)
                elif value is None or np.ndim(value):
                    continue
                elif isinstance(value, np.floating):
                    one[name] = float(str(np.float32(value))) if np.isfinite(value) else None
                elif name == "seed" or not isinstance(value, np.integer):
                    one[name] = str(value)
                else:
                    one[name] = int(value)
            found.append(one)
        return found

    def _bins(self, row: int) -> dict[str, Any]:
        held = self._histogram
        assert held is not None
        low, *ends = exact(np.array([held.edges[row, 0], *held.ends[row]]))
        return {
            "counts": self._bars[row].tolist(),
            "from": low,
            "step": self._step[row],
            "under": int(held.under[row]),
            "over": int(held.over[row]),
            "ends": ends,
            "quantiles": rounded(self._marks[row], 5),
        }

    def _entries(self, shown: Shown, row: int, cells: Mapping[tuple[int, int], int]) -> list[list[Any] | None]:
        """[value, photograph, y, x, heat-map, crop, left, top, right, bottom] of each example.

        The box is what the unit saw, in pixels of the network's input, and left out where that is all of it. In the
        spectrum an example's place says its bin, so one that is missing is null.
        """
        entries: list[list[Any] | None] = []
        places = zip(*(a[row].tolist() for a in (shown.index, shown.y, shown.x, shown.pair)), strict=True)
        for value, (index, y, x, pair) in zip(exact(shown.value[row]), places, strict=True):
            if index < 0:
                if shown.name == "spectrum":
                    entries.append(None)
                continue
            entry = [value, index, y, x, pair, cells.get((row, named(pair, index)), -1)]
            if not self._facts.whole:
                entry += self._layer.crop_box(y, x) or ()
            entries.append(entry)
        return entries

    def _words(self, row: int) -> dict[str, Any]:
        held, names = self._labels, self._catalogue.names
        assert held is not None
        over = zip(held.over[row].tolist(), held.count[row].tolist(), exact(held.lift[row]), strict=True)
        found: dict[str, Any] = {"over": [[names[o], count, value] for o, count, value in over if o >= 0]}
        best = int(held.best[row])
        if best >= 0:
            selectivity, auroc = exact(np.array([held.selectivity[row], held.auroc[row]]))
            found |= {"best": names[best], "selectivity": selectivity, "auroc": auroc}
        return found


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

    def of(row: int) -> dict[str, Any]:
        told = {}
        for side, wires in sides.items():
            known = ranks.get(wires.layer, {})
            triples = zip(wires.channel[row].tolist(), exact(wires.norm[row]), exact(wires.sum[row]), strict=True)
            units = [[c, norm, total, known.get(c, -1)] for c, norm, total in triples if c >= 0]
            told[side] = {"layer": wires.layer, "units": units}
        return told

    return of
