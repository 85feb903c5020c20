"""Sheets of many small pictures in one file: fewer files, fewer requests, better compression."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.data.multiband import visible
from pipeline.site.media.photo_crops import GREY


def side(count: int) -> int:
    """Columns of a sheet of `count` cells: as square as may be."""
    return max(1, math.ceil(math.sqrt(count)))


def sheet(cells: Sequence[Image.Image | None], columns: int, size: tuple[int, int]) -> Image.Image:
    """Cells of `size` (width, height) row by row, `columns` to a row; grey where there is none."""
    rows = max(1, math.ceil(len(cells) / columns))
    width, height = size
    found = Image.new("RGB", (columns * width, rows * height), GREY)
    for i, cell in enumerate(cells):
        if cell is not None:
            found.paste(cell, ((i % columns) * width, (i // columns) * height))
    return found


def shrunk(pixels: np.ndarray, height: int, width: int) -> Image.Image:
    """(H, W, C) uint8 as a page shows it, in RGB, made smaller to (height, width) where it is larger."""
    image = visible(pixels)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image if image.mode == "RGB" else image.convert("RGB")


def square(image: Image.Image, px: int) -> Image.Image:
    """The middle square, `px` on a side."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return image.resize((px, px), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
