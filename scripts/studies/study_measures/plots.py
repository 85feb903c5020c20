"""Plots of a number by layer, drawn with Pillow."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 260, 46, 60, 24
COLORS = ("#1f5fa8", "#c25a00", "#2d7d32", "#8a8a8a", "#b9a07a", "#8fae8b")


@dataclasses.dataclass(frozen=True)
class Series:
    """Values by layer.

    Attributes:
        name: Name in the legend.
        values: For each layer the values of its units; the median and the quartiles are drawn.
        filled: Whether its points are filled.
    """

    name: str
    values: Sequence[np.ndarray]
    filled: bool = True


def panel(
    title: str, labels: Sequence[str], series: Sequence[Series], dashed: float | None = None, top: float = 0.0
) -> Image.Image:
    """Return a plot of series over layers.

    Args:
        title: Its title.
        labels: Names of the layers.
        series: The series.
        dashed: Height of a dashed line.
        top: The axis reaches at least this value, so that panels can have the same one.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT + 14 * len(series)), "white")
    pen = ImageDraw.Draw(image)
    quartiles = [
        [np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else np.full(3, np.nan) for values in one.values]
        for one in series
    ]
    every = np.concatenate([*map(np.ravel, quartiles), np.array([top, 0.0 if dashed is None else dashed])])
    low, high = min(0.0, float(np.nanmin(every))), float(np.nanmax(every)) * 1.05 + 1e-9

    def x(i: int) -> float:
        return LEFT + (i + 0.5) * (WIDTH - LEFT - 10) / len(labels)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    pen.text((LEFT, 5), title, fill="black")
    pen.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - 10, HEIGHT - BOTTOM)], fill="black")
    for tick in np.linspace(low, high, 5):
        pen.text((4, y(tick) - 6), f"{tick:.2g}", fill="black")
    for i, label in enumerate(label.removeprefix("blocks.") for label in labels):
        pen.text((x(i) - 3 * len(label), HEIGHT - BOTTOM + 6 + 13 * (i % 3)), label, fill="black")
    if dashed is not None:
        for left in range(LEFT, WIDTH - 10, 8):
            pen.line([(left, y(dashed)), (left + 4, y(dashed))], fill="#8a8a8a")
    for number, (one, parts) in enumerate(zip(series, quartiles, strict=True)):
        color = COLORS[number % len(COLORS)]
        shown = [(x(i) + 4 * (number - len(series) / 2), part) for i, part in enumerate(parts) if np.isfinite(part[1])]
        pen.line([(at, y(part[1])) for at, part in shown], fill=color, width=1)
        for at, part in shown:
            pen.line([(at, y(part[0])), (at, y(part[2]))], fill=color, width=1)
            box = (at - 3, y(part[1]) - 3, at + 3, y(part[1]) + 3)
            pen.ellipse(box, fill=color if one.filled else "white", outline=color)
        pen.rectangle((LEFT, HEIGHT + 14 * number, LEFT + 8, HEIGHT + 8 + 14 * number), fill=color)
        pen.text((LEFT + 14, HEIGHT - 2 + 14 * number), one.name, fill="black")
    return image


def beside(images: Sequence[Image.Image]) -> Image.Image:
    """Return images in a row."""
    whole = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole
