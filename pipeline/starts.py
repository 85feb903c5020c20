"""Photographs that an `image` canvas starts from."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.canvases import Start, frame
from pipeline.errors import AtlasError, first_line
from pipeline.files import File
from pipeline.presets import RenderConfig, Size

Unit = tuple[int, int]


def pictures(config: RenderConfig, size: Size, channels: int, units: Sequence[Unit]) -> dict[Unit, Tensor]:
    """(C, H, W) in [0, 1] for each unit, margins included; nothing for canvases that start from noise."""
    if not isinstance(config.canvas, Start):
        return {}
    whole = (size[0] + 2 * config.margin, size[1] + 2 * config.margin)
    return dict.fromkeys(units, frame(opened(config.canvas.source, channels), whole))


def opened(file: File, channels: int) -> np.ndarray:
    """(H, W, C) uint8 of a picture's file, upright."""
    assert file.content is not None, f"{file.path} was not read"
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            turned = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise AtlasError(f"render.canvas.source={file.path!r} is not a picture: {first_line(error)}") from None
    found = np.asarray(turned)
    return found[:, :, None] if channels == 1 else found
