"""Image files of the site: one for each picture, and one strip with all examples of a unit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.bands import visible
from pipeline.shards import safe


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image file on a page: `src` from the site's root, and (width, height) in pixels.

    `cell` is the place in a strip, 0 on the left, where only that part is to be seen; then width and height
    are those of the cell.
    """

    src: str
    width: int
    height: int
    cell: int | None = None


class Media:
    """The folder `media/` of a site in `root`. Strips have room for `cells` crops of `side` pixels."""

    def __init__(self, root: Path, quality: int, side: int, cells: int) -> None:
        self._root = root
        self._quality = quality
        self.side = side
        self.cells = cells

    def picture(self, layer: str, channel: int, objective: str, variant: int, pixels: np.ndarray) -> Shown:
        """Save one picture, (H, W, C) uint8."""
        plain = objective == "channel" and variant == 0
        name = f"{channel}" if plain else f"{channel}-{safe(objective)}-{variant}"
        image = visible(pixels)
        return Shown(self._save(image, layer, name), image.width, image.height)

    def strip(self, layer: str, channel: int, crops: Sequence[Image.Image | None]) -> list[Shown | None]:
        """Save the crops of one unit side by side; None for each that there is no image of."""
        if all(crop is None for crop in crops):
            return [None] * len(crops)
        # Always as wide as the widest, for the stylesheet finds a cell by its share of the width.
        strip = Image.new("RGB", (self.cells * self.side, self.side), (128, 128, 128))
        for i, crop in enumerate(crops):
            if crop is not None:
                strip.paste(crop, (i * self.side, 0))
        src = self._save(strip, layer, f"{channel}-examples")
        return [None if crop is None else Shown(src, self.side, self.side, i) for i, crop in enumerate(crops)]

    @property
    def stylesheet(self) -> str:
        """CSS that shows cell i of a strip in an `img` of class `ci`.

        An `img` with a class, because it can load lazily, unlike an `image` in an SVG, and needs no inline
        style, which the pages forbid themselves.
        """
        last = max(1, self.cells - 1)
        rules = [f".c{i}{{object-position:{100 * i / last:.6g}% 0}}" for i in range(self.cells)]
        return "\n".join([".cell{aspect-ratio:1;object-fit:cover}", *rules, ""])

    def _save(self, image: Image.Image, layer: str, name: str) -> str:
        src = f"media/{safe(layer)}/{name}.webp"
        path = self._root / src
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "WEBP", quality=self._quality, method=4)
        return src
