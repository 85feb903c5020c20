"""A diagram of the network: one named box per layer, whose height shows the map size and whose width the channels.

Parallel branches are lanes below each other, which share the height of the diagram; arcs are residual connections and
others that pass layers by.
"""

import dataclasses
import math
from collections.abc import Sequence

from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.layout.branches import Branches, Flow, branches_of, chain
from pipeline.site.layout.stages import Size, Stage, stages_of
from pipeline.store.reader import NetworkLayer

# Lengths in the units of the diagram's coordinates.
DIAGRAM_WIDTH = 1000.0
BOX_HEIGHT = 110.0  # of the layer with the largest map
MIN_BOX_HEIGHT = 12.0
MAX_SCALE = 11.0
GAP, STAGE_GAP = 4.0, 14.0
DEPTH = 6.0
CAPTION_HEIGHT = 18.0
CAPTION_WIDTH = 62.0  # least width of a stage
ARC_HEIGHT = 20.0  # space for arcs above the boxes
LANE_GAP = 7.0
NAME_WIDTH = 11.0  # of an upright name
# Names are written at an angle if there is enough space between them, else upright.
SLANTED_DISTANCE = 34.0
SLANT, UPRIGHT = 40, 90
FONT_SIZE, SMALL_FONT_SIZE = 11.0, 9.0  # as in atlas.css
CHARACTER = 0.6  # width of a character of the monospaced font, in font sizes
NAME_LENGTH = 24

BOXES_PER_ROW = 64
STAGES_PER_ROW = 13
KINDS = ("conv", "linear", "block", "norm", "attention")


@dataclasses.dataclass(frozen=True)
class DrawnLayer:
    """A layer of the network.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer.
        total: Number of its channels.
        map_size: (height, width) of its activation map.
        facts: Its summary if it is in the atlas, else None.
    """

    name: str
    kind: str
    total: int
    map_size: tuple[int, int]
    facts: LayerSummary | None

    @property
    def hollow(self) -> bool:
        """Whether the atlas has no visualizations of it."""
        return self.facts is None or not self.facts.rendered

    @property
    def short_name(self) -> str:
        """Its name, shortened in the middle if it is long."""
        half = NAME_LENGTH // 2
        return self.name if len(self.name) <= NAME_LENGTH else f"{self.name[: half - 1]}…{self.name[-half:]}"


@dataclasses.dataclass(frozen=True)
class Box:
    """A layer in the diagram.

    Attributes:
        layer: The layer.
        x: Left edge of the front face.
        y: Top edge of the front face.
        width: Width of the front face.
        height: Height of the front face.
        top: Points of the top face, for an SVG polygon.
        side: Points of the right face, for an SVG polygon.
        name_x: Where its name begins.
        name_y: Where its name begins.
    """

    layer: DrawnLayer
    x: float
    y: float
    width: float
    height: float
    top: str
    side: str
    name_x: float
    name_y: float

    @property
    def hue(self) -> str:
        """CSS class of the box's color: the kind of the layer, or "other"."""
        return self.layer.kind if self.layer.kind in KINDS else "other"


@dataclasses.dataclass(frozen=True)
class Diagram:
    """Boxes in rows.

    Attributes:
        width: Width of the diagram.
        height: Height of the diagram.
        boxes: One box per layer.
        stages: Captions with the map size, (x, y, text), above each stage.
        rows: Number of rows.
        wires: Lines from box to box, as SVG paths.
        arcs: Values that pass layers by, (SVG path, description).
        lanes: Largest number of parallel branches.
        angle: Angle of the names in degrees.
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    stages: tuple[tuple[float, float, str], ...]
    rows: int
    wires: tuple[str, ...]
    arcs: tuple[tuple[str, str], ...]
    lanes: int
    angle: int

    @property
    def hues(self) -> list[str]:
        """CSS classes of the filled boxes, in order of appearance."""
        return list(dict.fromkeys(box.hue for box in self.boxes if not box.layer.hollow))

    @property
    def absent(self) -> int:
        """Number of boxes of layers that are not in the atlas."""
        return sum(box.layer.facts is None for box in self.boxes)

    @property
    def hollow(self) -> int:
        """Number of hollow boxes."""
        return sum(box.layer.hollow for box in self.boxes)


def drawn_layers(
    layers: Sequence[LayerSummary], network: Sequence[NetworkLayer], joins: Sequence[tuple[int, ...]] = ()
) -> tuple[list[DrawnLayer], Branches]:
    """Return the layers to draw, those of the atlas and those of the network that are of the same kinds; their places.

    Args:
        layers: Layers of the atlas, in the order of the network.
        network: All layers of the network, in order; those of the atlas alone are drawn if some of them are missing.
        joins: Where values of several layers come together; see `store.reader.Atlas.network_joins`.
    """
    known = {facts.name: facts for facts in layers}
    if not known.keys() <= {layer.name for layer in network}:
        drawn = [DrawnLayer(facts.name, facts.kind, facts.total, facts.map_size, facts) for facts in layers]
        return drawn, chain(len(drawn))
    kinds = {facts.kind for facts in layers}
    numbers = [i for i, layer in enumerate(network) if layer.name in known or layer.kind in kinds]
    shown = [network[i] for i in numbers]
    drawn = [DrawnLayer(one.name, one.kind, one.channels, one.map_size, known.get(one.name)) for one in shown]
    sources = [layer.source for layer in network if layer.source is not None]
    if len(sources) < len(network):  # an old atlas
        return drawn, chain(len(drawn))
    return drawn, branches_of(Flow(tuple(sources), tuple(joins)), numbers)


@dataclasses.dataclass(frozen=True)
class _Column:
    """The boxes of parallel branches that are below each other.

    Attributes:
        members: (number of the layer, the layer, its lane), by lane.
        lanes: Number of lanes that the column is divided into.
        name_width: Width of a name.
    """

    members: tuple[tuple[int, DrawnLayer, int], ...]
    lanes: int
    name_width: float

    @property
    def map_size(self) -> Size:
        """The largest map size of its layers."""
        return max((layer.map_size for _, layer, _ in self.members), key=lambda size: (math.prod(size), size))

    def width(self, scale: float) -> float:
        """Return its width, the factor from weights to widths of boxes being `scale`."""
        least = self.name_width * len(self.members) if len(self.members) > 1 else 0.0
        return max(least, max(_weight(layer) for _, layer, _ in self.members) * scale)


def draw(layers: Sequence[DrawnLayer], branches: Branches | None = None) -> Diagram:
    """Lay out `layers` from left to right, stage by stage, in rows; without `branches`, one after the other."""
    return _Drawing(layers, branches or chain(len(layers))).diagram()


class _Drawing:
    """The layout of one diagram."""

    def __init__(self, layers: Sequence[DrawnLayer], branches: Branches) -> None:
        self._layers, self._branches = layers, branches
        lanes = _lanes_of_columns(branches)
        members: dict[int, list[tuple[int, DrawnLayer, int]]] = {}
        for i, layer in enumerate(layers):
            members.setdefault(branches.columns[i], []).append((i, layer, branches.lanes[i]))
        parts = {column: sorted(members[column], key=lambda member: member[2]) for column in sorted(members)}
        crowded = max((sum(map(len, row)) for row in _divided(list(parts.values()))), default=0)
        self._angle = SLANT if crowded * SLANTED_DISTANCE <= DIAGRAM_WIDTH else UPRIGHT
        self._font_size = FONT_SIZE if self._angle == SLANT else SMALL_FONT_SIZE
        width = SLANTED_DISTANCE if self._angle == SLANT else NAME_WIDTH
        columns = [_Column(tuple(part), lanes[column], width) for column, part in parts.items()]
        self._rows = _rows(stages_of(columns))
        self._largest = max((math.log2(max(layer.map_size) + 1) for layer in layers), default=1.0)
        self._boxes: dict[int, Box] = {}
        self._ends: dict[int, float] = {}  # right end of the column of each layer
        self._row_of: dict[int, int] = {}
        self._captions: list[tuple[float, float, str]] = []

    def diagram(self) -> Diagram:
        """Return the diagram."""
        longest = max((len(layer.short_name) for layer in self._layers), default=0) * self._font_size * CHARACTER
        slant = math.radians(self._angle)
        # Names at an angle reach beyond the last box.
        room = DIAGRAM_WIDTH - (longest * math.cos(slant) if self._angle == SLANT else 0.0)
        names = longest * math.sin(slant) + self._font_size + 4
        above = CAPTION_HEIGHT + DEPTH + (ARC_HEIGHT if self._branches.skips else 0.0)
        top = 0.0
        for number, row in enumerate(self._rows):
            self._place_row(number, row, top, top + above, _scale(row, room))
            top += above + BOX_HEIGHT + names + 10
        boxes = tuple(self._boxes[i] for i in range(len(self._layers)))
        lanes = max(self._branches.lanes, default=0) + 1
        captions, wires, arcs = tuple(self._captions), tuple(self._wires()), tuple(self._arcs())
        return Diagram(DIAGRAM_WIDTH, max(1.0, top), boxes, captions, len(self._rows), wires, arcs, lanes, self._angle)

    def _place_row(self, number: int, row: Sequence[Stage[_Column]], top: float, base: float, scale: float) -> None:
        """Place the boxes of a row, whose highest box begins at `base`."""
        x = 0.0
        for stage in row:
            self._captions.append((x, top + CAPTION_HEIGHT - 6, stage.caption))
            first = x
            for column in stage.layers:
                width = column.width(scale)
                for place, (i, layer, lane) in enumerate(column.members):
                    own = min(width, _weight(layer) * scale)
                    y, height = self._slot(column, layer, lane, base + BOX_HEIGHT / 2)
                    name_x = x + width * (place + 0.5) / len(column.members)
                    name_x -= self._font_size / 3 if self._angle == UPRIGHT else 0
                    faces = _faces(x, y, own, height)
                    self._boxes[i] = Box(layer, x, y, own, height, *faces, name_x, base + BOX_HEIGHT + 10)
                    self._ends[i], self._row_of[i] = x + width, number
                x += width + GAP
            x = max(x - GAP, first + CAPTION_WIDTH) + STAGE_GAP

    def _slot(self, column: _Column, layer: DrawnLayer, lane: int, middle: float) -> tuple[float, float]:
        """Return the top and the height of a box: in the middle, or in its part of the height."""
        height = max(MIN_BOX_HEIGHT, BOX_HEIGHT * math.log2(max(layer.map_size) + 1) / self._largest)
        if column.lanes == 1:
            return middle - height / 2, height
        tallest = max(MIN_BOX_HEIGHT, BOX_HEIGHT * math.log2(max(column.map_size) + 1) / self._largest)
        gaps = LANE_GAP * (column.lanes - 1)
        whole = max(tallest, min(BOX_HEIGHT, column.lanes * MIN_BOX_HEIGHT + gaps))
        part = (whole - gaps) / column.lanes
        height = min(height, part)
        return middle - whole / 2 + lane * (part + LANE_GAP) + (part - height) / 2, height

    def _wires(self) -> list[str]:
        """Return the lines from each box to those that read it, behind the boxes."""
        found = []
        for source, i in self._branches.wires:
            if source >= 0 and self._row_of[source] == self._row_of[i]:
                found.append(self._wire(source, self._boxes[i].x, self._middle(i)))
        readers = dict(reversed(self._branches.wires))
        for end, last in self._branches.ends:
            reader = readers.get(last)
            to = last if reader is None or self._row_of[reader] != self._row_of[last] else reader
            x = self._boxes[to].x if to != last else self._ends[last] + GAP
            if self._row_of[end] == self._row_of[last]:
                found.append(self._wire(end, x, self._middle(to)))
        return found

    def _wire(self, source: int, x: float, y: float) -> str:
        """Return a line from the right side of a box to a point, which is level up to the last few units."""
        start, end = self._boxes[source].x + self._boxes[source].width, self._middle(source)
        if abs(end - y) < 0.05:
            return f"M{start:.1f} {end:.1f}H{x:.1f}"
        # A branch that begins here bends at once, one that ends bends at its end.
        bend = min(max(x - start, 1.0), 10.0)
        half = x - bend / 2
        return f"M{start:.1f} {end:.1f}H{x - bend:.1f}C{half:.1f} {end:.1f} {half:.1f} {y:.1f} {x:.1f} {y:.1f}"

    def _arcs(self) -> list[tuple[str, str]]:
        """Return an arc over the boxes that each value passes by."""
        found = []
        for first, last in self._branches.skips:
            passed = [box for i, box in self._boxes.items() if self._is_between(first, i, last)]
            here, there = self._boxes[first], self._boxes[last]
            title = f"from {here.layer.name} past {there.layer.name}"
            x, to = self._ends[first] + GAP / 2, self._ends[last] + GAP / 2
            y, end = here.y - DEPTH, there.y - DEPTH
            if self._row_of[first] != self._row_of[last]:
                found.append(
                    (f"M{x:.1f} {y:.1f}C{x:.1f} {y - 24:.1f} {to:.1f} {end - 48:.1f} {to:.1f} {end:.1f}", title)
                )
                continue
            highest = min([y, end, *(box.y - DEPTH for box in passed)])
            # The curve reaches three quarters of the way to its control points.
            apex = highest - min(ARC_HEIGHT - 4, 8 + 0.04 * (to - x))
            control = min(y, end) - (min(y, end) - apex) / 0.75
            found.append((f"M{x:.1f} {y:.1f}C{x:.1f} {control:.1f} {to:.1f} {control:.1f} {to:.1f} {end:.1f}", title))
        return found

    def _is_between(self, first: int, i: int, last: int) -> bool:
        columns = self._branches.columns
        return columns[first] < columns[i] <= columns[last]

    def _middle(self, i: int) -> float:
        return self._boxes[i].y + self._boxes[i].height / 2


def _lanes_of_columns(branches: Branches) -> dict[int, int]:
    """Return the number of lanes of each column: that of the branches that go past it, and of all that overlap."""
    lanes = dict.fromkeys(branches.columns, 1)
    places = zip(branches.columns, branches.last, branches.lanes, strict=True)
    spans = [(column, last, lane + 1) for column, last, lane in places if lane]
    # Spans of one group of branches overlap: repeat until all of its columns have the same number.
    for first, last, count in spans:
        for column in range(first, last + 1):
            lanes[column] = max(lanes.get(column, 1), count)
    changed = True
    while changed:
        changed = False
        for first, last, _ in spans:
            most = max(lanes[column] for column in range(first, last + 1))
            for column in range(first, last + 1):
                changed |= lanes[column] < most
                lanes[column] = most
    return lanes


def _divided(parts: Sequence[Sequence[object]]) -> list[list[Sequence[object]]]:
    """Distribute columns over rows of at most `BOXES_PER_ROW` boxes, whatever their stages."""
    rows: list[list[Sequence[object]]] = []
    for part in parts:
        if not rows or sum(map(len, rows[-1])) + len(part) > BOXES_PER_ROW:
            rows.append([])
        rows[-1].append(part)
    return rows


def _rows(stages: Sequence[Stage[_Column]]) -> list[list[Stage[_Column]]]:
    """Distribute stages over rows; a stage that is longer than a row is divided."""
    rows: list[list[Stage[_Column]]] = []
    count = 0
    for stage in stages:
        start = 0
        for columns in _divided([column.members for column in stage.layers]):
            part = Stage(stage.size, stage.layers[start : start + len(columns)])
            start += len(columns)
            boxes = sum(map(len, columns))
            if not rows or len(rows[-1]) == STAGES_PER_ROW or count + boxes > BOXES_PER_ROW:
                rows.append([])
                count = 0
            rows[-1].append(part)
            count += boxes
    return rows


def _weight(layer: DrawnLayer) -> float:
    return 2 + math.log2(layer.total + 1)


def _scale(row: Sequence[Stage[_Column]], room: float) -> float:
    """Return the factor from weights to widths at which a row fills `room`, at most `MAX_SCALE`, by bisection."""

    def width(scale: float) -> float:
        parts = (
            max(CAPTION_WIDTH, sum(column.width(scale) for column in stage.layers) + GAP * (len(stage.layers) - 1))
            for stage in row
        )
        return sum(parts) + STAGE_GAP * (len(row) - 1) + DEPTH

    low, high = 0.2, MAX_SCALE
    for _ in range(40):
        scale = (low + high) / 2
        low, high = (scale, high) if width(scale) <= room else (low, scale)
    return low


def _faces(x: float, y: float, width: float, height: float) -> tuple[str, str]:
    """Return the points of the top face and of the right face."""
    depth = min(DEPTH, width / 2)
    right, back, up = x + width, x + width + depth, y - depth
    top = f"{x:.1f},{y:.1f} {x + depth:.1f},{up:.1f} {back:.1f},{up:.1f} {right:.1f},{y:.1f}"
    side = f"{right:.1f},{y:.1f} {back:.1f},{up:.1f} {back:.1f},{up + height:.1f} {right:.1f},{y + height:.1f}"
    return top, side
