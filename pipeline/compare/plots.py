"""Plots of a comparison as shapes in pixels, drawn when the site is built; templates turn them into SVG."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.compare.alignment import Comparison, Part
from pipeline.compare.statistics import Median
from pipeline.site.number_format import number

# A measure that spreads over more than this factor, all of it above zero, is drawn on a logarithmic axis.
WIDE = 12.0
# Dots that are links, of the units that differ most; the others are drawn as one path.
LINKED = 300
SIDE = 300.0
TALL, STEP, EDGE = 220.0, 26.0, 46.0


@dataclasses.dataclass(frozen=True)
class Axis:
    """From `low` to `high` in values, from `start` to `end` in pixels; `ticks` are (pixel, text)."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def at(self, value: float) -> float:
        """The pixel of a value, with the ends for what lies beyond them."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return self.start + (self.end - self.start) * min(1.0, (value - low) / (high - low))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """At most about six round values."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 200 else (1,)
            found = [m * 10.0**p for p in powers for m in steps]
        else:
            step = _round((self.high - self.low) / 6)
            found = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        kept = [v for v in found if self.low <= v <= self.high]
        return [(self.at(v), f"{v:.6g}".replace("-", "−")) for v in kept]


def axis(values: np.ndarray, start: float, end: float) -> Axis:
    """An axis that all finite `values` lie on, with a little room at both ends."""
    found = values[np.isfinite(values)]
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    if low > 0 and high / low > WIDE:
        return Axis(low / 1.08, high * 1.08, start, end, True)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end, False)


def _round(step: float) -> float:
    """The next of 1, 2, 5 × a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Units that two contenders have: one across, the other up; above the `diagonal` the second has more.

    `links` are (x, y, address, name), `dots` the path of all other units.
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
        """x, y at both ends of the line of equality."""
        return self.x.start, self.y.start, self.x.end, self.y.end


def scatter(
    found: Comparison, parts: Sequence[Part], one: int, other: int, link: Callable[[str, int], str]
) -> Scatter | None:
    """The units of `parts` by the main measure of contender `one` (across) and `other` (up); None without pairs."""
    measure = found.main
    if not found.comparable(measure, one, other):
        return None
    pairs = np.concatenate([part.of(measure.name)[[one, other]] for part in parts], 1)
    names = [(part.name, int(channel)) for part in parts for channel in part.channels]
    rows = np.flatnonzero(np.isfinite(pairs).all(0))
    if not len(rows):
        return None
    both = pairs[:, rows]
    x, y = axis(both, 0.0, SIDE), axis(both, SIDE, 0.0)
    apart = np.abs(np.log(both[1] / both[0]) if x.log else both[1] - both[0])
    order = np.argsort(-apart, kind="stable")
    links = []
    for i in order[:LINKED][::-1].tolist():
        layer, channel = names[rows[i]]
        a, b = both[:, i].tolist()
        told = f"{layer}:{channel}: {number(a).text} → {number(b).text}"
        links.append((round(x.at(a), 1), round(y.at(b), 1), link(layer, channel), told))
    rest = dict.fromkeys(
        (round(2 * x.at(a)) / 2, round(2 * y.at(b)) / 2) for a, b in both[:, order[LINKED:]].T.tolist()
    )
    dots = "".join(f"M{a:g} {b:g}h0" for a, b in rest)
    labels = found.contenders[one].label, found.contenders[other].label
    return Scatter(*labels, x, y, len(rows), int((both[1] > both[0]).sum()), tuple(links), dots)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A contender's median at (x, y), with the ends of its interval along the axis of values."""

    contender: int
    x: float
    y: float
    low: float
    high: float
    text: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """Medians by layer: `layers` are (x, name, marks of the contenders)."""

    width: float
    y: Axis
    layers: tuple[tuple[float, str, tuple[Mark, ...]], ...]

    @property
    def lines(self) -> list[tuple[int, str]]:
        """(contender, points of a polyline through its medians)."""
        found: dict[int, list[str]] = {}
        for _, _, marks in self.layers:
            for mark in marks:
                found.setdefault(mark.contender, []).append(f"{mark.x:.1f},{mark.y:.1f}")
        return [(at, " ".join(points)) for at, points in sorted(found.items())]


def profile(found: Comparison) -> Profile | None:
    """The main measure's medians in all layers, from the first to the last; None where there are none."""
    medians = [[found.median(part, found.main, at) for at in range(len(found.contenders))] for part in found.layers]
    ends = np.array([[m.low, m.high, m.value] for row in medians for m in row])
    if not len(ends) or not np.isfinite(ends).any():
        return None
    y = axis(ends, TALL, 0.0)
    step = max(STEP, 6.0 * len(found.contenders), 700.0 / len(found.layers))
    layers = []
    for i, (part, row) in enumerate(zip(found.layers, medians, strict=True)):
        middle = EDGE + step * (i + 0.5)
        apart = min(7.0, 0.6 * step / len(row))
        xs = [middle + apart * (at - (len(row) - 1) / 2) for at in range(len(row))]
        marks = tuple(_mark(found, at, m, xs[at], y) for at, m in enumerate(row) if m.units)
        layers.append((middle, part.name, marks))
    return Profile(EDGE + step * len(layers), y, tuple(layers))


def _mark(found: Comparison, at: int, m: Median, x: float, y: Axis) -> Mark:
    return Mark(at, x, y.at(m.value), y.at(m.low), y.at(m.high), _says(found, at, m))


def _says(found: Comparison, at: int, m: Median) -> str:
    value, low, high = (number(v).text for v in (m.value, m.low, m.high))
    return f"{found.contenders[at].label}: {value} ({low} to {high}), {m.units} unit{'s' if m.units > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Strip:
    """One measure of one layer: a line for each contender, with its median and interval along `x`."""

    title: str
    better: str
    says: str
    x: Axis
    marks: tuple[Mark, ...]
    height: float


def strips(found: Comparison, part: Part) -> list[Strip]:
    """All measures of a layer that any contender has there."""
    drawn = []
    for measure in found.measures:
        medians = [(at, found.median(part, measure, at)) for at in range(len(found.contenders))]
        medians = [(at, m) for at, m in medians if m.units]
        if not medians:
            continue
        x = axis(np.array([[m.low, m.high, m.value] for _, m in medians]), 0.0, 200.0)
        marks = tuple(
            Mark(at, x.at(m.value), 8 + 12.0 * i, x.at(m.low), x.at(m.high), _says(found, at, m))
            for i, (at, m) in enumerate(medians)
        )
        drawn.append(Strip(measure.title, measure.better, measure.says, x, marks, 12.0 * len(medians) + 4))
    return drawn
