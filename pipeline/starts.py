"""Photographs that an `image` canvas begins with: a file's, or each unit's own best dataset example."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.canvases import Start, frame
from pipeline.errors import AtlasError, first_line
from pipeline.files import File
from pipeline.presets import RenderConfig, Size

if TYPE_CHECKING:
    from pipeline.atlas import Atlas

Unit = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Begin:
    """A photograph as PNG, and the place in it, as shares of height and width, that the unit answers to most."""

    png: bytes
    centre: tuple[float, float]


def best(atlas: "Atlas", layer: str, channels: Sequence[int]) -> tuple[Begin, ...]:
    """What each channel's picture begins with: the photograph that it answers to most, around that place.

    Raises `AtlasError` where the atlas keeps no photographs.
    """
    view = atlas[layer]
    tops = view.examples("max")
    found = []
    for channel in channels:
        row = view.row(channel)
        image = None if tops is None else atlas.photo(int(tops.index[row, 0]))
        if tops is None or image is None:
            raise AtlasError(
                f"{layer}:{channel} has no photograph to begin with: render.canvas.source=best needs a dataset pass "
                "that keeps its pictures, and a unit that answers to one."
            )
        # A feature has a size in pixels of the network's input, so the photograph is brought to that scale.
        image = image.resize((view.input_size[1], view.input_size[0]), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        place = (float(tops.y[row, 0]) + 0.5) / view.map_size[0], (float(tops.x[row, 0]) + 0.5) / view.map_size[1]
        found.append(Begin(buffer.getvalue(), place))
    return tuple(found)


def pictures(
    config: RenderConfig, size: Size, channels: int, units: Sequence[Unit], begins: Mapping[int, Begin]
) -> dict[Unit, Tensor]:
    """(C, H, W) in [0, 1] for each unit, margins included; nothing for canvases that start from noise.

    `begins` holds each channel's own photograph, where the canvas asks for that.
    """
    if not isinstance(config.canvas, Start):
        return {}
    whole = (size[0] + 2 * config.margin, size[1] + 2 * config.margin)
    if not config.canvas.best:
        return dict.fromkeys(units, frame(opened(config.canvas.source, channels), whole))
    found = {}
    for unit in units:
        begin = begins[unit[0]]
        found[unit] = frame(opened(File("its best example", begin.png), channels), whole, begin.centre)
    return found


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
