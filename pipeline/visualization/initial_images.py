"""Initial images: a file or the best dataset example of each unit, for the `image` canvas and for silent units."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, first_line
from pipeline.images.parameterizations import FromImage, frame
from pipeline.visualization.preset import ChannelVariant, Preset, Size


@dataclasses.dataclass(frozen=True)
class InitialImage:
    """A dataset example that a visualization starts from.

    Attributes:
        png: The image, as the bytes of a PNG file.
        centre: (y, x) of the position with the highest activation, as fractions of height and width.
    """

    png: bytes
    centre: tuple[float, float]


def load_initial_images(
    preset: Preset, size: Size, channels: int, units: Sequence[ChannelVariant], begins: Mapping[int, InitialImage]
) -> dict[ChannelVariant, Tensor]:
    """Return the initial image of each unit.

    Args:
        preset: The preset.
        size: (height, width) of the finished images in pixels.
        channels: Number of input channels of the network.
        units: The units.
        begins: Best dataset example of each channel; empty unless the units start from it.

    Returns:
        (C, H, W) in [0, 1] for each unit, margins included; empty for units that start from noise.
    """
    canvas_size = (size[0] + 2 * preset.margin, size[1] + 2 * preset.margin)
    if isinstance(preset.canvas, FromImage) and not preset.canvas.best:
        return dict.fromkeys(units, frame(decode_image(preset.canvas.source, channels), canvas_size))
    images: dict[ChannelVariant, Tensor] = {}
    if not begins:
        return images
    for unit in units:
        channel, _ = unit
        example = begins[channel]
        images[unit] = frame(
            decode_image(ConfigFile("its best example", example.png), channels), canvas_size, example.centre
        )
    return images


def decode_image(file: ConfigFile, channels: int) -> np.ndarray:
    """Decode an image file and rotate it upright.

    Args:
        file: The file, with its content.
        channels: 1 for grey; otherwise the image is converted to RGB.

    Returns:
        (H, W, C) uint8.

    Raises:
        AtlasError: If the file is not a valid image.
    """
    assert file.content is not None, f"{file.path} was not read"
    try:
        with Image.open(io.BytesIO(file.content)) as image:
            upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise AtlasError(f"render.canvas.source={file.path!r} is not an image: {first_line(error)}") from None
    pixels = np.array(upright)  # a copy, because Pillow's own is read-only
    return pixels[:, :, None] if channels == 1 else pixels
