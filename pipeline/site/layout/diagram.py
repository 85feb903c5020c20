"""The network as a picture: a box a layer, as tall as its map is large and as wide as it has channels."""

import dataclasses
import math
from collections.abc import Sequence

from pipeline.site.context.layer_summary import Facts

ACROSS = 1000.0
TALL = 150.0
GAP = 5.0
PER_ROW = 27
DEPTH = 7.0


@dataclasses.dataclass(frozen=True)
class Box:
    """A layer in the diagram: its front, left top width height, in the diagram's own units, and its two other faces."""

    facts: Facts
    x: float
    y: float
    width: float
    height: float
    top: str
    side: str

    @property
    def hue(self) -> str:
        """Class of its colour, by kind."""
        known = {"conv": "conv", "linear": "linear", "block": "block", "norm": "norm", "attention": "attention"}
        return known.get(self.facts.kind, "other")


@dataclasses.dataclass(frozen=True)
class Diagram:
    """Boxes in rows; `stages` are (x, y, text) of the captions below, where the map's size changes."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    stages: tuple[tuple[float, float, str], ...]
    lines: tuple[tuple[float, float, float], ...]

    @property
    def hues(self) -> list[str]:
        """The colours in it, in order of appearance."""
        return list(dict.fromkeys(box.hue for box in self.boxes))


def draw(layers: Sequence[Facts]) -> Diagram:
    """Lay out `layers` from left to right, in as many rows as they need."""
    rows = max(1, math.ceil(len(layers) / PER_ROW))
    each = math.ceil(len(layers) / rows) if layers else 1
    boxes: list[Box] = []
    stages: list[tuple[float, float, str]] = []
    lines: list[tuple[float, float, float]] = []
    largest = max((math.log2(max(facts.map_size) + 1) for facts in layers), default=1.0)
    bottom = 0.0
    for row in range(rows):
        part = layers[row * each : (row + 1) * each]
        weights = [2 + math.log2(facts.total + 1) for facts in part]
        free = ACROSS - DEPTH - GAP * (len(part) - 1)
        # A short row does not blow its boxes up to fill the line.
        scale = min(free / max(1e-9, sum(weights)), 14.0)
        x, middle = 0.0, bottom + DEPTH + TALL / 2
        start = middle
        last = ""
        for facts, weight in zip(part, weights, strict=True):
            width = weight * scale
            height = max(16.0, TALL * math.log2(max(facts.map_size) + 1) / largest)
            y = middle - height / 2
            boxes.append(Box(facts, x, y, width, height, *_faces(x, y, width, height)))
            caption = f"{facts.map_size[0]} × {facts.map_size[1]}"
            if caption != last:
                if not stages or stages[-1][1] != bottom or x - stages[-1][0] > 62:
                    stages.append((x, bottom, caption))
                last = caption
            x += width + GAP
        lines.append((0.0, start, x - GAP))
        bottom += TALL + 2 * DEPTH + 26
    moved = tuple((x, y + TALL + 2 * DEPTH + 12, text) for x, y, text in stages)
    return Diagram(ACROSS, max(1.0, bottom), tuple(boxes), moved, tuple(lines))


def _faces(x: float, y: float, width: float, height: float) -> tuple[str, str]:
    """Top and right side, as points of polygons."""
    right, back, up = x + width, x + width + DEPTH, y - DEPTH
    top = f"{x:.1f},{y:.1f} {x + DEPTH:.1f},{up:.1f} {back:.1f},{up:.1f} {right:.1f},{y:.1f}"
    side = f"{right:.1f},{y:.1f} {back:.1f},{up:.1f} {back:.1f},{up + height:.1f} {right:.1f},{y + height:.1f}"
    return top, side
