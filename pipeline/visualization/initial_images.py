"""Images that visualizations start from or are compared with: a file, or the best dataset example of each unit."""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, first_line
from pipeline.data.image_loading import failure_reason, preprocess, read_image
from pipeline.images.parameterizations import FromImage, frame
from pipeline.models.config import Preprocessing
from pipeline.visualization.preset import ChannelVariant, Preset, Size

# Why a unit that no dataset image activates has no visualization by a preset that starts from dataset examples.
NO_EXAMPLE = "it has no dataset example to start from, as no dataset image activates it"

# Begins a setting that names an image of the dataset by its path in it.
DATASET_PREFIX = "dataset:"

# Pillow's modes of images without color.
GRAY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L")


@dataclasses.dataclass(frozen=True)
class InitialImage:
    """A dataset example that a visualization starts from.

    Attributes:
        png: The image, as the bytes of a PNG file.
        centre: (y, x) of the position with the highest activation, as fractions of height and width.
        missing: Whether this is a gray image instead, because no dataset image activates the unit.
    """

    png: bytes
    centre: tuple[float, float]
    missing: bool = False


def load_initial_images(
    preset: Preset,
    size: Size,
    recipe: Preprocessing,
    units: Sequence[ChannelVariant],
    begins: Mapping[int, InitialImage],
) -> dict[ChannelVariant, Tensor]:
    """Return the initial image of each unit.

    Args:
        preset: The preset.
        size: (height, width) of the finished images in pixels.
        recipe: Preprocessing of the network.
        units: The units.
        begins: Best dataset example of each channel; empty unless the units start from it.

    Returns:
        (C, H, W) in [0, 1] for each unit, margins included; empty for units that start from noise.
    """
    canvas_size = (size[0] + 2 * preset.margin, size[1] + 2 * preset.margin)
    if isinstance(preset.canvas, FromImage) and not preset.canvas.best:
        return dict.fromkeys(units, frame(decode_source(preset.canvas, recipe), canvas_size))
    images: dict[ChannelVariant, Tensor] = {}
    if not begins:
        return images
    for unit in units:
        channel, _ = unit
        example = begins[channel]
        images[unit] = frame(
            decode_image(ConfigFile("its best example", example.png), recipe.channels), canvas_size, example.centre
        )
    return images


def load_target_image(preset: Preset, size: Size, recipe: Preprocessing) -> Tensor | None:
    """Return the photograph that the objective compares with, (C, H, W) in [0, 1] with margins; None without one.

    Args:
        preset: The preset.
        size: (height, width) of the finished images in pixels.
        recipe: Preprocessing of the network.
    """
    file = preset.objective.target_image
    if file is None:
        return None
    photograph = preprocess_photograph(file, recipe, "render.objective.target")
    return frame(photograph, (size[0] + 2 * preset.margin, size[1] + 2 * preset.margin))


def decode_source(canvas: FromImage, recipe: Preprocessing) -> np.ndarray:
    """Return the image file that a canvas starts from, (H, W, C) uint8.

    Raises:
        AtlasError: If the file is not a valid image.
    """
    if canvas.preprocess or is_dataset_image(canvas.source):
        return preprocess_photograph(canvas.source, recipe, "render.canvas.source")
    return decode_image(canvas.source, recipe.channels)


def is_dataset_image(file: ConfigFile) -> bool:
    """Return whether a setting names an image of the dataset, as `dataset:PATH`, instead of a file."""
    return file.path.startswith(DATASET_PREFIX)


def dataset_image_file(path: str, levels: np.ndarray) -> ConfigFile:
    """Return the value of a setting `dataset:PATH` with its content.

    Args:
        path: Path of the image in the dataset.
        levels: (C, H, W) preprocessed image, levels from 0 to 255.
    """
    pixels = np.rint(levels).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    # A format without compression: the digest of the content must not depend on the version of a compressor.
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PPM")
    return ConfigFile(f"{DATASET_PREFIX}{path}", buffer.getvalue())


def preprocess_photograph(file: ConfigFile, recipe: Preprocessing, setting: str) -> np.ndarray:
    """Decode an image file and resize and crop it as the dataset images are.

    Args:
        file: The file, with its content. An image of the dataset is preprocessed already.
        recipe: Preprocessing of the network.
        setting: The setting that names the file, for error messages.

    Returns:
        (H, W, C) uint8 of the network's input size.

    Raises:
        AtlasError: If the file is not a valid image, or has no color and the network takes colors.
    """
    assert file.content is not None, f"{file.path} was not read"
    if is_dataset_image(file):
        return decode_image(file, recipe.channels)
    try:
        with Image.open(io.BytesIO(file.content)) as opened:
            mode = opened.mode
        image = read_image(io.BytesIO(file.content), recipe.channels)
        levels = preprocess(image, recipe)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AtlasError(f"{setting}={file.path!r} is not an image: {failure_reason(error)}.") from None
    if recipe.channels == 3 and mode in GRAY_MODES:
        raise AtlasError(
            f"{setting}={file.path!r} is gray, and the network takes colors: its activations for an image without "
            "color are not typical. Save it as RGB if that is what you want."
        )
    return np.rint(levels).astype(np.uint8).transpose(1, 2, 0)


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
