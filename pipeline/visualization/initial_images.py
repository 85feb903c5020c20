"""Photographs that an `image` canvas begins with: a file's, or each unit's own best dataset example."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, first_line
from pipeline.visualization.parameterizations import FromImage, frame
from pipeline.visualization.preset import Preset, Size

Unit = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class InitialImage:
    """A photograph as PNG, and the place in it, as shares of height and width, that the unit answers to most."""

    png: bytes
    centre: tuple[float, float]


def pictures(
    config: Preset, size: Size, channels: int, units: Sequence[Unit], begins: Mapping[int, InitialImage]
) -> dict[Unit, Tensor]:
    """(C, H, W) in [0, 1] for each unit, margins included; nothing for canvases that start from noise.

    `begins` holds each channel's own photograph, where the canvas asks for that.
    """
    if not isinstance(config.canvas, FromImage):
        return {}
    whole = (size[0] + 2 * config.margin, size[1] + 2 * config.margin)
    if not config.canvas.best:
        return dict.fromkeys(units, frame(opened(config.canvas.source, channels), whole))
    found = {}
    for unit in units:
        begin = begins[unit[0]]
        found[unit] = frame(opened(ConfigFile("its best example", begin.png), channels), whole, begin.centre)
    return found


def opened(file: ConfigFile, channels: int) -> np.ndarray:
    """(H, W, C) uint8 of a picture's file, upright."""
    assert file.content is not None, f"{file.path} was not read"
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            turned = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise AtlasError(f"render.canvas.source={file.path!r} is not a picture: {first_line(error)}") from None
    found = np.asarray(turned)
    return found[:, :, None] if channels == 1 else found
