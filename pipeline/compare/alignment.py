"""Numbers of contenders beside each other: one table over all their units, and what it comes to."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.compare.metric_names import HIGHER, LOWER, MAIN, NEITHER, Measure, in_order
from pipeline.compare.runs import Contender, RunComparison
from pipeline.compare.statistics import Median, PairedTest, duel, median
from pipeline.core.metric_specs import gain
from pipeline.store.layer_view import LayerView

# What the summary calls all layers together.
ALL = "*"
# Numbers that say how a picture was drawn, not how good it is.
_LABELS = ("seed",)
_RATIOS = {MAIN: "activation", "robust_gain": "robust"}


@dataclasses.dataclass(frozen=True)
class Part:
    """The units of one layer, or of all: (n contenders, C units) arrays, NaN where a contender lacks a unit.

    `values` are by measure: of several pictures of a unit the median. `there` says who has a picture of whom, `failed`
    how many pictures of it did not rise. `difference` (C,) says how unlike the contenders' pictures of a unit are
    (`pipeline.compare.image_distance`), NaN until they were looked at.
    """

    name: str
    channels: np.ndarray
    values: Mapping[str, np.ndarray]
    natural: np.ndarray
    there: np.ndarray
    failed: np.ndarray
    difference: np.ndarray

    def of(self, measure: str) -> np.ndarray:
        """(n, C) values of a measure; NaN if this layer has none."""
        return self.values.get(measure, np.full(self.there.shape, np.nan))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Contenders, the measures that any of them has, and their layers in order."""

    contenders: tuple[Contender, ...]
    measures: tuple[Measure, ...]
    layers: tuple[Part, ...]

    @property
    def main(self) -> Measure:
        """What pages show first: achieved ÷ natural; where there are no photographs, the activation."""
        named = {measure.name: measure for measure in self.measures}
        return named.get(MAIN, named.get("activation", self.measures[0]))

    @property
    def whole(self) -> Part:
        """All layers as one, one after the other."""
        shape = (len(self.contenders), 0)
        every = self.layers
        return Part(
            ALL,
            np.concatenate([p.channels for p in every] or [np.zeros(0, np.int64)]),
            {m.name: np.concatenate([p.of(m.name) for p in every] or [np.zeros(shape)], 1) for m in self.measures},
            np.concatenate([p.natural for p in every] or [np.zeros(shape)], 1),
            np.concatenate([p.there for p in every] or [np.zeros(shape, bool)], 1),
            np.concatenate([p.failed for p in every] or [np.zeros(shape, int)], 1),
            np.concatenate([p.difference for p in every] or [np.zeros(0)]),
        )

    def median(self, part: Part, measure: Measure, at: int) -> Median:
        """The median of contender `at` over the units it has."""
        return median(part.of(measure.name)[at])

    def comparable(self, measure: Measure, one: int, other: int) -> bool:
        """Whether a measure means the same for two contenders: an activation does only beside its own objective's."""
        a, b = self.contenders[one], self.contenders[other]
        return not measure.own or (a.natural, a.objective) == (b.natural, b.objective)

    def better(self, measure: Measure, at: int) -> int:
        """1 where more is better for contender `at`, −1 where less is, 0 where nobody knows."""
        sign = {HIGHER: 1, LOWER: -1}.get(measure.better, 0)
        return -sign if measure.own and self.contenders[at].negative else sign

    def duel(self, part: Part, measure: Measure, one: int, other: int) -> PairedTest | None:
        """Contender `one` against `other` over the units that both have; None where their numbers mean other things.

        Where nobody knows what is better, the larger value wins.
        """
        if not self.comparable(measure, one, other):
            return None
        values = part.of(measure.name)
        return duel(values[one], values[other], self.better(measure, one) or 1)

    def disagreement(self, part: Part, measure: Measure) -> np.ndarray:
        """(C,) how far contenders disagree about each unit: the largest value − the least; NaN of fewer than two.

        Those count whose numbers mean the same as the first one's.
        """
        values = part.of(measure.name)[[self.comparable(measure, 0, at) for at in range(len(self.contenders))]]
        two = np.isfinite(values).sum(0) > 1
        high, low = (np.where(np.isfinite(values), values, fill) for fill in (-np.inf, np.inf))
        return np.where(two, high.max(0) - low.min(0), np.nan)

    def units(self) -> pd.DataFrame:
        """One row a unit and contender, with what it is, then what was measured.

        `picture` says whether the contender has one of this unit; of several, measures are medians, and `failed`
        counts those that did not rise. `difference` (how unlike the pictures are), `disagreement` (of the main
        measure) are of the unit, the same in the rows of all contenders; `natural` is the best photograph's response.
        """
        frames = []
        for part in self.layers:
            apart = self.disagreement(part, self.main)
            for at, contender in enumerate(self.contenders):
                told = {"contender": contender.label, "run": contender.run, "preset": contender.preset}
                numbers = {m.name: part.of(m.name)[at] for m in self.measures}
                frame = pd.DataFrame({"layer": part.name, "channel": part.channels, **told})
                frame["picture"], frame["failed"] = part.there[at], part.failed[at]
                frames.append(
                    frame.assign(difference=part.difference, disagreement=apart, natural=part.natural[at], **numbers)
                )
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Medians and pairs, for all units (layer `*`) and each layer.

        A row without `against` is a contender's own median; with it, the median of contender − against over the pairs,
        with wins, losses, ties and the sign test's p. `low` and `high` bound 95 %; `left_out` are units of the layer
        that the contender (or one of the two) has no such number of.
        """
        return pd.DataFrame(self._rows())

    def _rows(self) -> Iterator[dict[str, object]]:
        for part in (self.whole, *self.layers):
            for measure in self.measures:
                for at, contender in enumerate(self.contenders):
                    row = self._head(part, measure, at) | {"contender": contender.label, "against": ""}
                    yield row | _told(self.median(part, measure, at), len(part.channels))
                for other, one in combinations(range(len(self.contenders)), 2):
                    found = self.duel(part, measure, one, other)
                    if found is None:
                        continue
                    pair = {"contender": self.contenders[one].label, "against": self.contenders[other].label}
                    counts = {"wins": found.wins, "losses": found.losses, "ties": found.ties, "p": found.p}
                    yield self._head(part, measure, one) | pair | _told(found.difference, len(part.channels)) | counts

    def _head(self, part: Part, measure: Measure, at: int) -> dict[str, object]:
        better = {1: HIGHER, -1: LOWER, 0: NEITHER}[self.better(measure, at)]
        return {"layer": part.name, "measure": measure.name, "better": better}


def _told(found: Median, units: int) -> dict[str, object]:
    return {
        "units": found.units, "left_out": units - found.units, "median": found.value, "low": found.low,
        "high": found.high,
    }  # fmt: skip


def align(contest: RunComparison) -> Comparison:
    """Read the numbers of all contenders, unit by unit; pictures are not looked at.

    A layer or channel counts if any contender has it, in the order of the first one that does.
    """
    names = list(dict.fromkeys(name for atlas in contest.atlases for name in atlas.layers))
    parts = [part for name in names if (part := _part(contest, name)) is not None]
    every = in_order(name for part in parts for name in part.values)
    finite = [m for m in every if any(np.isfinite(part.of(m.name)).any() for part in parts)]
    return Comparison(contest.contenders, tuple(finite), tuple(parts))


def views(contest: RunComparison, layer: str) -> list[LayerView | None]:
    """Each contender's view of a layer, None where it has no pictures of it."""
    found = []
    for atlas, contender in zip(contest.atlases, contest.contenders, strict=True):
        view = atlas[layer] if layer in atlas.layers else None
        found.append(view if view is not None and contender.preset in view.presets else None)
    return found


def _part(contest: RunComparison, name: str) -> Part | None:
    found = views(contest, name)
    if not any(found):
        return None
    channels = np.unique(np.concatenate([view.channels for view in found if view is not None])).astype(np.int64)
    shape = (len(found), len(channels))
    natural = np.full(shape, np.nan)
    there, failed = np.zeros(shape, bool), np.zeros(shape, np.int64)
    values: dict[str, np.ndarray] = {}
    rows = [np.searchsorted(channels, view.channels) if view is not None else np.zeros(0, int) for view in found]
    held = [
        view.numbers(contender.preset) if view is not None else {}
        for view, contender in zip(found, contest.contenders, strict=True)
    ]
    for at, (view, contender) in enumerate(zip(found, contest.contenders, strict=True)):
        if view is not None:
            natural[at, rows[at]] = view.natural(contender.preset)
            status = held[at]["status"].astype(str)
            there[at, rows[at]] = (status != "missing").any(1)
            failed[at, rows[at]] = (status == "failed").sum(1)
    _lend(natural, contest.contenders)
    for at, numbers in enumerate(held):
        for key, array in numbers.items():
            if key not in _LABELS and key not in _RATIOS and array.ndim == 2 and array.dtype.kind in "fiu":
                values.setdefault(key, np.full(shape, np.nan))[at, rows[at]] = _of_unit(array, numbers["status"])
    for ratio, reached in _RATIOS.items():
        if reached in values:
            sides = zip(values[reached], natural, contest.contenders, strict=True)
            values[ratio] = np.stack([gain(own[:, None], best, c.negative)[:, 0] for own, best, c in sides])
    return Part(name, channels, values, natural, there, failed, np.full(len(channels), np.nan))


def _of_unit(array: np.ndarray, status: np.ndarray) -> np.ndarray:
    """(C', V) numbers of pictures → (C',) medians over the pictures that are there and have a finite one."""
    kept = np.where(status.astype(str) == "missing", np.nan, array.astype(np.float64))
    kept = np.ma.masked_invalid(kept)
    return np.ma.median(kept, axis=1).filled(np.nan)


def _lend(natural: np.ndarray, contenders: Sequence[Contender]) -> None:
    """A run without a dataset pass is held against what others found: network and photographs are the same."""
    for at, contender in enumerate(contenders):
        for other, lender in enumerate(contenders):
            if lender.natural == contender.natural:
                gaps = np.isnan(natural[at])
                natural[at, gaps] = natural[other, gaps]
