"""A diagram of the network: one box per layer, whose height shows the map size and whose width the channels."""

import dataclasses
import math
from collections.abc import Sequence

from pipeline.site.context.layer_summary import LayerSummary

# Lengths in the units of the diagram's coordinates.
DIAGRAM_WIDTH = 1000.0
BOX_HEIGHT = 150.0  # of the layer with the largest map
MIN_BOX_HEIGHT = 16.0
MAX_SCALE = 14.0
GAP = 5.0
DEPTH = 7.0
CAPTION_HEIGHT = 26
CAPTION_DISTANCE = 62  # least distance of two captions in a row

LAYERS_PER_ROW = 27
KINDS = ("conv", "linear", "block", "norm", "attention")


@dataclasses.dataclass(frozen=True)
class Box:
    """A layer in the diagram.

    Attributes:
        facts: The layer.
        x: Left edge of the front face.
        y: Top edge of the front face.
        width: Width of the front face.
        height: Height of the front face.
        top: Points of the top face, for an SVG polygon.
        side: Points of the right face, for an SVG polygon.
    """

    facts: LayerSummary
    x: float
    y: float
    width: float
    height: float
    top: str
    side: str

    @property
    def hue(self) -> str:
        """CSS class of the box's color: the kind of the layer, or "other"."""
        return self.facts.kind if self.facts.kind in KINDS else "other"


@dataclasses.dataclass(frozen=True)
class Diagram:
    """Boxes in rows.

    Attributes:
        width: Width of the diagram.
        height: Height of the diagram.
        boxes: One box per layer.
        stages: Captions with the map size, (x, y, text), below the boxes where it changes.
        lines: A line through each row, (start, y, end).
    """

    width: float
    height: float
    boxes: tuple[Box, ...]
    stages: tuple[tuple[float, float, str], ...]
    lines: tuple[tuple[float, float, float], ...]

    @property
    def hues(self) -> list[str]:
        """CSS classes of the boxes, in order of appearance."""
        return list(dict.fromkeys(box.hue for box in self.boxes))


def draw(layers: Sequence[LayerSummary]) -> Diagram:
    """Lay out `layers` from left to right, in rows of at most `LAYERS_PER_ROW`."""
    rows = max(1, math.ceil(len(layers) / LAYERS_PER_ROW))
    per_row = math.ceil(len(layers) / rows) if layers else 1
    boxes: list[Box] = []
    stages: list[tuple[float, float, str]] = []
    lines: list[tuple[float, float, float]] = []
    largest = max((math.log2(max(facts.map_size) + 1) for facts in layers), default=1.0)
    top = 0.0
    for row in range(rows):
        row_layers = layers[row * per_row : (row + 1) * per_row]
        weights = [2 + math.log2(facts.total + 1) for facts in row_layers]
        free = DIAGRAM_WIDTH - DEPTH - GAP * (len(row_layers) - 1)
        # The boxes of a short row are not enlarged to fill its width.
        scale = min(free / max(1e-9, sum(weights)), MAX_SCALE)
        x, middle = 0.0, top + DEPTH + BOX_HEIGHT / 2
        previous_caption = ""
        for facts, weight in zip(row_layers, weights, strict=True):
            width = weight * scale
            height = max(MIN_BOX_HEIGHT, BOX_HEIGHT * math.log2(max(facts.map_size) + 1) / largest)
            y = middle - height / 2
            boxes.append(Box(facts, x, y, width, height, *_faces(x, y, width, height)))
            caption = f"{facts.map_size[0]} × {facts.map_size[1]}"
            if caption != previous_caption:
                if not stages or stages[-1][1] != top or x - stages[-1][0] > CAPTION_DISTANCE:
                    stages.append((x, top, caption))
                previous_caption = caption
            x += width + GAP
        lines.append((0.0, middle, x - GAP))
        top += BOX_HEIGHT + 2 * DEPTH + CAPTION_HEIGHT
    below_boxes = tuple((x, y + BOX_HEIGHT + 2 * DEPTH + 12, text) for x, y, text in stages)
    return Diagram(DIAGRAM_WIDTH, max(1.0, top), tuple(boxes), below_boxes, tuple(lines))


def _faces(x: float, y: float, width: float, height: float) -> tuple[str, str]:
    """Return the points of the top face and of the right face."""
    right, back, up = x + width, x + width + DEPTH, y - DEPTH
    top = f"{x:.1f},{y:.1f} {x + DEPTH:.1f},{up:.1f} {back:.1f},{up:.1f} {right:.1f},{y:.1f}"
    side = f"{right:.1f},{y:.1f} {back:.1f},{up:.1f} {back:.1f},{up + height:.1f} {right:.1f},{y + height:.1f}"
    return top, side
