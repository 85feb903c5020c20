"""Align the numbers of all contenders unit by unit, and summarize them."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.compare import effects, facets
from pipeline.compare.effects import EffectsChange, compare_effects
from pipeline.compare.runs import Contender, RunComparison
from pipeline.compare.statistics import Median, PairedTest, median, paired_test
from pipeline.core.metric_specs import (
    DATASET_MEAN,
    DATASET_PEAK,
    MAIN_METRICS,
    OBJECTIVE,
    Metric,
    find_metric,
    in_comparison_order,
    ratios,
)
from pipeline.store.layer_view import LayerView

# Name of all layers together in the summary.
ALL = "*"


@dataclasses.dataclass(frozen=True)
class Part:
    """Units of one layer, or of all layers, with the numbers of n contenders; NaN where a contender lacks a unit.

    Attributes:
        name: Name of the layer, or `ALL`.
        channels: (C,) channels.
        values: (n, C) values by measure; the median over several visualizations of a unit.
        dataset_max: (n, C) maximum activations over the dataset.
        rendered: (n, C) whether the contender has a feature visualization of the unit.
        failed: (n, C) numbers of feature visualizations whose optimization failed.
        difference: (C,) mean distance between the contenders' images of a unit (`pipeline.compare.image_distance`);
            NaN until the images have been read.
    """

    name: str
    channels: np.ndarray
    values: Mapping[str, np.ndarray]
    dataset_max: np.ndarray
    rendered: np.ndarray
    failed: np.ndarray
    difference: np.ndarray

    @property
    def shared_units(self) -> int:
        """Number of units that all contenders have a feature visualization of."""
        return int(self.rendered.all(0).sum())

    def of(self, measure: str) -> np.ndarray:
        """Return the (n, C) values of a measure; all NaN if this layer does not have it."""
        return self.values.get(measure, np.full(self.rendered.shape, np.nan))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers of all contenders.

    Attributes:
        contenders: The contenders.
        measures: Measures that at least one contender has, in display order.
        layers: Numbers by layer, in network order.
        effects: Changes of the effects of units between runs, by layer; empty unless runs have different effects.
    """

    contenders: tuple[Contender, ...]
    measures: tuple[Metric, ...]
    layers: tuple[Part, ...]
    effects: tuple[EffectsChange, ...] = ()

    @property
    def main(self) -> Metric:
        """The measure that pages show first: the activation ratio, or the activation without a dataset pass."""
        by_name = {measure.name: measure for measure in self.measures}
        return next((by_name[name] for name in (*MAIN_METRICS, "activation") if name in by_name), self.measures[0])

    @property
    def all_units(self) -> Part:
        """The units of all layers, concatenated."""
        shape = (len(self.contenders), 0)
        layers = self.layers
        values = {}
        for measure in self.measures:
            values[measure.name] = np.concatenate([p.of(measure.name) for p in layers] or [np.zeros(shape)], 1)
        return Part(
            name=ALL,
            channels=np.concatenate([p.channels for p in layers] or [np.zeros(0, np.int64)]),
            values=values,
            dataset_max=np.concatenate([p.dataset_max for p in layers] or [np.zeros(shape)], 1),
            rendered=np.concatenate([p.rendered for p in layers] or [np.zeros(shape, bool)], 1),
            failed=np.concatenate([p.failed for p in layers] or [np.zeros(shape, int)], 1),
            difference=np.concatenate([p.difference for p in layers] or [np.zeros(0)]),
        )

    def median(self, part: Part, measure: Metric, at: int) -> Median:
        """Return the median of contender `at` over the units that it has."""
        return median(part.of(measure.name)[at])

    def comparable(self, measure: Metric, first: int, second: int) -> bool:
        """Return whether a measure is comparable; activations are only between contenders with the same objective."""
        a, b = self.contenders[first], self.contenders[second]
        return measure.unit != OBJECTIVE or a.has_objectives_of(b)

    def better(self, measure: Metric, at: int) -> int:
        """Return 1 if higher values are better for contender `at`, −1 if lower ones are, and 0 if neither is."""
        sign = {"higher": 1, "lower": -1}.get(measure.better, 0)
        return -sign if measure.unit == OBJECTIVE and self.contenders[at].negative else sign

    def paired_test(self, part: Part, measure: Metric, first: int, second: int) -> PairedTest | None:
        """Compare contender `first` with `second` over the units that both have; None if not comparable.

        If neither direction is better, higher values count as wins.
        """
        if not self.comparable(measure, first, second):
            return None
        values = part.of(measure.name)
        return paired_test(values[first], values[second], self.better(measure, first) or 1)

    def disagreement(self, part: Part, measure: Metric) -> np.ndarray:
        """Return (C,) highest minus lowest value of each unit; NaN with fewer than two values.

        Only contenders whose values are comparable to those of the first one count.
        """
        values = part.of(measure.name)[[self.comparable(measure, 0, at) for at in range(len(self.contenders))]]
        enough = np.isfinite(values).sum(0) > 1
        highest = np.where(np.isfinite(values), values, -np.inf).max(0)
        lowest = np.where(np.isfinite(values), values, np.inf).min(0)
        return np.where(enough, highest - lowest, np.nan)

    def units(self) -> pd.DataFrame:
        """Return a table with one row per unit and contender.

        `picture` is whether the contender has a feature visualization of the unit. With several visualizations,
        measures are medians and `failed` is the number of failed optimizations. `difference` (distance between the
        images) and `disagreement` (of the main measure) belong to the unit and are equal in the rows of all contenders.
        `natural` is the maximum activation over the dataset.
        """
        frames = []
        for part in self.layers:
            disagreement = self.disagreement(part, self.main)
            for at, contender in enumerate(self.contenders):
                names = {"contender": contender.label, "run": contender.run, "preset": contender.preset}
                numbers = {m.name: part.of(m.name)[at] for m in self.measures}
                frame = pd.DataFrame({"layer": part.name, "channel": part.channels, **names})
                frame["picture"], frame["failed"] = part.rendered[at], part.failed[at]
                frames.append(
                    frame.assign(
                        difference=part.difference,
                        disagreement=disagreement,
                        natural=part.dataset_max[at],
                        **numbers,
                    )
                )
        return pd.concat(frames, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """Return medians and paired tests, for all units (layer `*`) and for each layer.

        A row without `against` has a contender's own median. A row with it has the median of contender − against over
        the units that both have, with wins, losses, ties and the p value of the sign test. `low` and `high` are the
        ends of the 95 % interval; `left_out` is the number of units without a value for the contender or for one of
        the two.
        """
        return pd.DataFrame(self._rows())

    def _rows(self) -> Iterator[dict[str, object]]:
        for part in (self.all_units, *self.layers):
            units = len(part.channels)
            for measure in self.measures:
                for at, contender in enumerate(self.contenders):
                    row = self._row_start(part, measure, at) | {"contender": contender.label, "against": ""}
                    yield row | _median_columns(self.median(part, measure, at), units)
                for second, first in combinations(range(len(self.contenders)), 2):
                    test = self.paired_test(part, measure, first, second)
                    if test is None:
                        continue
                    pair = {"contender": self.contenders[first].label, "against": self.contenders[second].label}
                    counts = {"wins": test.wins, "losses": test.losses, "ties": test.ties, "p": test.p}
                    yield (
                        self._row_start(part, measure, first) | pair | _median_columns(test.difference, units) | counts
                    )

    def _row_start(self, part: Part, measure: Metric, at: int) -> dict[str, object]:
        better = {1: "higher", -1: "lower", 0: "neither"}[self.better(measure, at)]
        return {"layer": part.name, "measure": measure.name, "better": better}


def _median_columns(result: Median, units: int) -> dict[str, object]:
    return {
        "units": result.units,
        "left_out": units - result.units,
        "median": result.value,
        "low": result.low,
        "high": result.high,
    }


def align(inputs: RunComparison) -> Comparison:
    """Read the numbers of all contenders unit by unit, without reading images.

    The result has every layer and channel that at least one contender has, in the order of the first one with it.
    """
    names = list(dict.fromkeys(name for atlas in inputs.atlases for name in atlas.layers))
    changes = compare_effects(inputs)
    parts = [part for name in names if (part := _part(inputs, name, bool(changes))) is not None]
    known = effects.MEASURES | facets.MEASURES
    measures = [known.get(m.name, m) for m in in_comparison_order(name for part in parts for name in part.values)]
    finite = [m for m in measures if any(np.isfinite(part.of(m.name)).any() for part in parts)]
    return Comparison(inputs.contenders, tuple(finite), tuple(parts), changes)


def views(inputs: RunComparison, layer: str) -> list[LayerView | None]:
    """Return each contender's view of a layer, or None if it has no feature visualizations of it."""
    layer_views = []
    for atlas, contender in zip(inputs.atlases, inputs.contenders, strict=True):
        view = atlas[layer] if layer in atlas.layers else None
        layer_views.append(view if view is not None and contender.preset in view.presets else None)
    return layer_views


def _part(inputs: RunComparison, name: str, with_effects: bool) -> Part | None:
    """Return the numbers of one layer, or None if no contender has feature visualizations of it.

    Args:
        inputs: The open runs.
        name: Name of the layer.
        with_effects: Whether effects of units are among the numbers.
    """
    contenders = inputs.contenders
    layer_views = views(inputs, name)
    available = [view for view in layer_views if view is not None]
    if not available:
        return None
    channels = np.unique(np.concatenate([view.channels for view in available])).astype(np.int64)
    shape = (len(layer_views), len(channels))
    dataset_max = np.full(shape, np.nan)
    best_of = {key: np.full(shape, np.nan) for key in (DATASET_MEAN, DATASET_PEAK)}
    rendered, failed = np.zeros(shape, bool), np.zeros(shape, np.int64)
    values: dict[str, np.ndarray] = {}
    facet_numbers = facets.compared_numbers(layer_views)
    for at, (view, contender) in enumerate(zip(layer_views, contenders, strict=True)):
        if view is None:
            continue
        rows = np.searchsorted(channels, view.channels)
        numbers = view.measurements(contender.preset)
        status = numbers["status"].astype(str)
        dataset_max[at, rows] = view.dataset_max(contender.preset)
        for key, best in view.dataset_best(contender.preset).items():
            best_of[key][at, rows] = best
        rendered[at, rows] = (status != "missing").any(1)
        failed[at, rows] = (status == "failed").sum(1)
        for key, array in numbers.items():
            if not _is_ratio(key) and array.ndim == 2 and array.dtype.kind in "fiu":
                values.setdefault(key, np.full(shape, np.nan))[at, rows] = _median_over_variants(array, status)
        of_unit = facet_numbers[at] | (effects.numbers_of(view) if with_effects else {})
        for key, array in of_unit.items():
            values.setdefault(key, np.full(shape, np.nan))[at, rows] = array
    _fill_dataset_max(dataset_max, contenders)
    for best in best_of.values():
        _fill_dataset_max(best, contenders)
    _add_ratios(values, best_of, contenders)
    compared = {key: array for key, array in values.items() if _is_compared(key)}
    return Part(name, channels, compared, dataset_max, rendered, failed, np.full(len(channels), np.nan))


def _add_ratios(
    values: dict[str, np.ndarray], best_of: Mapping[str, np.ndarray], contenders: Sequence[Contender]
) -> None:
    """Add the ratios to the (n, C) numbers of n contenders, from their numbers and best activations (n, C)."""
    for at, contender in enumerate(contenders):
        numbers = {key: array[at] for key, array in values.items()}
        best = {key: array[at] for key, array in best_of.items()}
        for key, ratio in ratios(numbers, best, contender.negative).items():
            values.setdefault(key, np.full((len(contenders), len(ratio)), np.nan))[at] = ratio


def _is_compared(name: str) -> bool:
    """Return whether an array is a measure of quality."""
    metric = find_metric(name)
    return metric is None or metric.comparison_order is not None


def _is_ratio(name: str) -> bool:
    """Return whether an array is a ratio: these are computed again, with the best activations of all runs' datasets."""
    metric = find_metric(name)
    return metric is not None and metric.source == "ratio"


def _median_over_variants(array: np.ndarray, status: np.ndarray) -> np.ndarray:
    """Reduce (C', V) numbers to (C',) medians over the visualizations that exist and have a finite number."""
    values = np.where(status == "missing", np.nan, array.astype(np.float64))
    return np.ma.median(np.ma.masked_invalid(values), axis=1).filled(np.nan)


def _fill_dataset_max(dataset_max: np.ndarray, contenders: Sequence[Contender]) -> None:
    """Fill gaps of runs without a dataset pass from other runs, which share the network and the dataset."""
    for at, contender in enumerate(contenders):
        for other, source in enumerate(contenders):
            if source.reference == contender.reference:
                gaps = np.isnan(dataset_max[at])
                dataset_max[at, gaps] = dataset_max[other, gaps]
