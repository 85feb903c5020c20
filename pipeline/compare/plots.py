"""Coordinates of the plots of a comparison, in pixels; templates render them as SVG."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.compare.alignment import Comparison, Part
from pipeline.compare.statistics import Median
from pipeline.site.number_format import number

# A measure with only positive values has a logarithmic axis if its values span more than this factor.
LOG_RANGE = 12.0
# Number of points of a scatter plot that link to a unit: those of the units that differ most. The others are one path.
LINKED = 300
# Side of a scatter plot; height of the profile, distance between its layers, and its left margin.
SIDE = 300.0
PROFILE_HEIGHT, STEP, MARGIN = 220.0, 26.0, 46.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from value `low` at pixel `start` to value `high` at pixel `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """Return the pixel of a value, clipped to the ends of the axis."""
        low, high, value = self.low, self.high, max(value, self.low)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * min(1.0, (value - low) / (high - low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """About six round values at most, as (pixel, text)."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
            values = [m * 10.0**p for p in powers for m in steps]
        else:
            step = _round((self.high - self.low) / 6)
            values = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [(self.at(v), f"{v:.6g}".replace("-", "−")) for v in values if self.low <= v <= self.high]


def axis(values: np.ndarray, start: float, end: float) -> Axis:
    """Return an axis that covers all finite `values`, with a margin at both ends."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low > 0 and high / low > LOG_RANGE:
        return Axis(low / 1.08, high * 1.08, start, end, True)
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low - margin, high + margin, start, end, False)


def _round(step: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Scatter plot of two contenders over the units that both have.

    Attributes:
        across: Label of the contender on the x axis.
        up: Label of the contender on the y axis.
        x: The x axis.
        y: The y axis.
        units: Number of units.
        above: Number of units above the line of equality.
        links: (x, y, address, text) of the units that differ most.
        dots: SVG path of all other units.
    """

    across: str
    up: str
    x: Axis
    y: Axis
    units: int
    above: int
    links: tuple[tuple[float, float, str, str], ...]
    dots: str

    @property
    def diagonal(self) -> tuple[float, float, float, float]:
        """Ends of the line of equality: x1, y1, x2, y2."""
        return self.x.start, self.y.start, self.x.end, self.y.end


def scatter(
    comparison: Comparison, parts: Sequence[Part], first: int, second: int, link: Callable[[str, int], str]
) -> Scatter | None:
    """Return the scatter plot of the main measure of contenders `first` (x) and `second` (y).

    Args:
        comparison: The comparison.
        parts: Layers whose units are shown.
        first: Index of the contender on the x axis.
        second: Index of the contender on the y axis.
        link: Function from layer and channel to the address of the unit's page.

    Returns:
        The plot, or None if the contenders are not comparable or share no unit.
    """
    measure = comparison.main
    if not comparison.comparable(measure, first, second):
        return None
    pairs = np.concatenate([part.of(measure.name)[[first, second]] for part in parts], 1)
    names = [(part.name, int(channel)) for part in parts for channel in part.channels]
    rows = np.flatnonzero(np.isfinite(pairs).all(0))
    if not len(rows):
        return None
    both = pairs[:, rows]
    x, y = axis(both, 0.0, SIDE), axis(both, SIDE, 0.0)
    distance = np.abs(np.log(both[1] / both[0]) if x.log else both[1] - both[0])
    order = np.argsort(-distance, kind="stable")
    links = []
    for i in order[:LINKED][::-1].tolist():
        layer, channel = names[rows[i]]
        a, b = both[:, i].tolist()
        label = f"{layer}:{channel}: {number(a).text} → {number(b).text}"
        links.append((round(x.at(a), 1), round(y.at(b), 1), link(layer, channel), label))
    # Rounded to half pixels, so that points on the same place are drawn once.
    unlinked = both[:, order[LINKED:]].T.tolist()
    points = dict.fromkeys((round(2 * x.at(a)) / 2, round(2 * y.at(b)) / 2) for a, b in unlinked)
    return Scatter(
        across=comparison.contenders[first].label,
        up=comparison.contenders[second].label,
        x=x,
        y=y,
        units=len(rows),
        above=int((both[1] > both[0]).sum()),
        links=tuple(links),
        dots="".join(f"M{a:g} {b:g}h0" for a, b in points),
    )


@dataclasses.dataclass(frozen=True)
class Mark:
    """A contender's median at (x, y), with the ends `low` and `high` of its interval along the axis of values."""

    contender: int
    x: float
    y: float
    low: float
    high: float
    text: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """Medians by layer.

    Attributes:
        width: Width of the plot.
        y: Axis of values.
        layers: (x, layer, marks of the contenders).
    """

    width: float
    y: Axis
    layers: tuple[tuple[float, str, tuple[Mark, ...]], ...]

    @property
    def lines(self) -> list[tuple[int, str]]:
        """(contender, points of a polyline through its medians)."""
        points: dict[int, list[str]] = {}
        for _, _, marks in self.layers:
            for mark in marks:
                points.setdefault(mark.contender, []).append(f"{mark.x:.1f},{mark.y:.1f}")
        return [(at, " ".join(texts)) for at, texts in sorted(points.items())]


def profile(comparison: Comparison) -> Profile | None:
    """Return the medians of the main measure by layer, or None if there are none."""
    contenders = range(len(comparison.contenders))
    medians = [[comparison.median(part, comparison.main, at) for at in contenders] for part in comparison.layers]
    ends = np.array([[m.low, m.high, m.value] for row in medians for m in row])
    if not len(ends) or not np.isfinite(ends).any():
        return None
    y = axis(ends, PROFILE_HEIGHT, 0.0)
    step = max(STEP, 6.0 * len(contenders), 700.0 / len(comparison.layers))
    layers = []
    for i, (part, row) in enumerate(zip(comparison.layers, medians, strict=True)):
        center = MARGIN + step * (i + 0.5)
        spacing = min(7.0, 0.6 * step / len(row))
        marks = []
        for at, median in enumerate(row):
            x = center + spacing * (at - (len(row) - 1) / 2)
            if median.units:
                low, high = y.at(median.low), y.at(median.high)
                marks.append(Mark(at, x, y.at(median.value), low, high, _mark_text(comparison, at, median)))
        layers.append((center, part.name, tuple(marks)))
    return Profile(MARGIN + step * len(layers), y, tuple(layers))


def _mark_text(comparison: Comparison, at: int, median: Median) -> str:
    value, low, high = (number(v).text for v in (median.value, median.low, median.high))
    units = f"{median.units} unit{'s' if median.units > 1 else ''}"
    return f"{comparison.contenders[at].label}: {value} ({low} to {high}), {units}"


@dataclasses.dataclass(frozen=True)
class Strip:
    """Plot of one measure of a layer: a line per contender, with its median and interval along `x`."""

    title: str
    better: str
    description: str
    x: Axis
    marks: tuple[Mark, ...]
    height: float


def strips(comparison: Comparison, part: Part) -> list[Strip]:
    """Return the plots of all measures that at least one contender has in a layer."""
    plots = []
    for measure in comparison.measures:
        medians = [(at, comparison.median(part, measure, at)) for at in range(len(comparison.contenders))]
        medians = [(at, m) for at, m in medians if m.units]
        if not medians:
            continue
        x = axis(np.array([[m.low, m.high, m.value] for _, m in medians]), 0.0, 200.0)
        marks = tuple(
            Mark(at, x.at(m.value), 8 + 12.0 * i, x.at(m.low), x.at(m.high), _mark_text(comparison, at, m))
            for i, (at, m) in enumerate(medians)
        )
        height = 12.0 * len(medians) + 4
        plots.append(Strip(measure.title, measure.better, measure.description, x, marks, height))
    return plots
