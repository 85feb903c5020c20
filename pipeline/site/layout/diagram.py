"""A diagram of the network: one named box per layer, whose height shows the map size and whose width the channels."""

import dataclasses
import math
from collections.abc import Sequence

from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.layout.stages import Stage, stages_of
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
        lines: A line through each row, (start, y, end).
        angle: Angle of the names in degrees.
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    stages: tuple[tuple[float, float, str], ...]
    lines: tuple[tuple[float, float, float], ...]
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


def drawn_layers(layers: Sequence[LayerSummary], network: Sequence[NetworkLayer]) -> list[DrawnLayer]:
    """Return the layers to draw: those of the atlas, and those of the network that are of the same kinds.

    Args:
        layers: Layers of the atlas, in the order of the network.
        network: All layers of the network, in order; those of the atlas alone are drawn if some of them are missing.
    """
    known = {facts.name: facts for facts in layers}
    if not known.keys() <= {layer.name for layer in network}:
        return [DrawnLayer(facts.name, facts.kind, facts.total, facts.map_size, facts) for facts in layers]
    kinds = {facts.kind for facts in layers}
    return [
        DrawnLayer(layer.name, layer.kind, layer.channels, layer.map_size, known.get(layer.name))
        for layer in network
        if layer.name in known or layer.kind in kinds
    ]


def draw(layers: Sequence[DrawnLayer]) -> Diagram:
    """Lay out `layers` from left to right, stage by stage, in rows."""
    rows = _rows(stages_of(layers))
    crowded = max((sum(len(stage.layers) for stage in row) for row in rows), default=0)
    angle = SLANT if crowded * SLANTED_DISTANCE <= DIAGRAM_WIDTH else UPRIGHT
    font_size = FONT_SIZE if angle == SLANT else SMALL_FONT_SIZE
    longest = max((len(layer.short_name) for layer in layers), default=0) * font_size * CHARACTER
    names = longest * math.sin(math.radians(angle)) + font_size + 4
    # Names at an angle reach beyond the last box.
    room = DIAGRAM_WIDTH - (longest * math.cos(math.radians(angle)) if angle == SLANT else 0.0)
    largest = max((math.log2(max(layer.map_size) + 1) for layer in layers), default=1.0)
    boxes: list[Box] = []
    captions: list[tuple[float, float, str]] = []
    lines: list[tuple[float, float, float]] = []
    top = 0.0
    for row in rows:
        scale = _scale(row, room)
        base = top + CAPTION_HEIGHT + DEPTH
        middle, x = base + BOX_HEIGHT / 2, 0.0
        for stage in row:
            captions.append((x, top + CAPTION_HEIGHT - 6, stage.caption))
            first = x
            for layer in stage.layers:
                width = _weight(layer) * scale
                height = max(MIN_BOX_HEIGHT, BOX_HEIGHT * math.log2(max(layer.map_size) + 1) / largest)
                y = middle - height / 2
                name_x = x + width / 2 + (-font_size / 3 if angle == UPRIGHT else 0)
                faces = _faces(x, y, width, height)
                boxes.append(Box(layer, x, y, width, height, *faces, name_x, base + BOX_HEIGHT + 10))
                x += width + GAP
            x = max(x - GAP, first + CAPTION_WIDTH) + STAGE_GAP
        lines.append((0.0, middle, boxes[-1].x))
        top = base + BOX_HEIGHT + names + 10
    return Diagram(DIAGRAM_WIDTH, max(1.0, top), tuple(boxes), tuple(captions), tuple(lines), angle)


def _rows(stages: Sequence[Stage[DrawnLayer]]) -> list[list[Stage[DrawnLayer]]]:
    """Distribute stages over rows; a stage that is longer than a row is divided."""
    rows: list[list[Stage[DrawnLayer]]] = []
    count = 0
    for stage in stages:
        for start in range(0, len(stage.layers), BOXES_PER_ROW):
            part = Stage(stage.size, stage.layers[start : start + BOXES_PER_ROW])
            if not rows or len(rows[-1]) == STAGES_PER_ROW or count + len(part.layers) > BOXES_PER_ROW:
                rows.append([])
                count = 0
            rows[-1].append(part)
            count += len(part.layers)
    return rows


def _weight(layer: DrawnLayer) -> float:
    return 2 + math.log2(layer.total + 1)


def _scale(row: Sequence[Stage[DrawnLayer]], room: float) -> float:
    """Return the factor from weights to widths at which a row fills `room`, at most `MAX_SCALE`, by bisection."""
    weights = [sum(map(_weight, stage.layers)) for stage in row]
    gaps = [GAP * (len(stage.layers) - 1) for stage in row]

    def width(scale: float) -> float:
        parts = (max(CAPTION_WIDTH, weight * scale + gap) for weight, gap in zip(weights, gaps, strict=True))
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
