"""Sheets of many small images in one file: fewer files, fewer requests and better compression."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.data.multiband import to_display_image
from pipeline.site.media.photo_crops import GREY


def side(count: int) -> int:
    """Return the number of columns that makes a sheet of `count` cells as square as possible."""
    return max(1, math.ceil(math.sqrt(count)))


def sheet(cells: Sequence[Image.Image | None], columns: int, size: tuple[int, int]) -> Image.Image:
    """Arrange cells of `size` (width, height) row by row; a cell that is None stays gray."""
    rows = max(1, math.ceil(len(cells) / columns))
    width, height = size
    image = Image.new("RGB", (columns * width, rows * height), GREY)
    for i, cell in enumerate(cells):
        if cell is not None:
            image.paste(cell, ((i % columns) * width, (i // columns) * height))
    return image


def shrunk(pixels: np.ndarray, height: int, width: int) -> Image.Image:
    """Convert (H, W, C) uint8 to an RGB image of (height, width), which must not be larger."""
    image = to_display_image(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image if image.mode == "RGB" else image.convert("RGB")


def square(image: Image.Image, px: int, resampling: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Return the central square, resized to `px` on a side."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return image.resize((px, px), resampling, box=box, reducing_gap=2.0)
