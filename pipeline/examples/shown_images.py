"""The dataset images that an atlas shows: sizes, regions, and JPEG copies or crops."""

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from pipeline.data import crops, image_loading, multiband
from pipeline.data.datasets import Dataset
from pipeline.data.image_loading import Loaded
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.finding import Layer
from pipeline.models.config import Preprocessing

# Longest side of the copy from which crops are cut, if only crops are stored.
CROP_SOURCE_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """A small copy of a source image.

    Attributes:
        size: (width, height) of the source image.
        box: Region of the source image that became the network's input, in its pixels.
        image: The copy; as small as `store` allows.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    image: Image.Image

    @classmethod
    def of(
        cls,
        image: Image.Image | multiband.Bands,
        box: tuple[int, int, int, int] | None,
        recipe: Preprocessing,
        config: ExamplesConfig,
    ) -> "SourceImage":
        """Copy a decoded image, of which the region `box` (None: all of it) is the dataset image."""
        _, _, input_box = image_loading.input_box(image.size, box, recipe)
        side = {"images": config.side, "crops": CROP_SOURCE_SIDE}.get(config.store, 1)
        copy = image.copy() if isinstance(image, Image.Image) else image.to_display_image()
        copy.thumbnail((side, side), Image.Resampling.LANCZOS)
        return cls(image.size, input_box, copy)


def source_copier(
    dataset: Dataset, recipe: Preprocessing, config: ExamplesConfig
) -> Callable[[int, Image.Image | multiband.Bands], SourceImage]:
    """Return a function that copies a decoded image, given its number, as `extra` of `image_loading.load_images`."""
    return lambda number, image: SourceImage.of(image, dataset.images[number].box, recipe, config)


class ShownImages:
    """Sizes, input regions and JPEGs of the images of a second pass."""

    def __init__(self) -> None:
        self._indices: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._boxes: list[tuple[float, float, float, float]] = []
        self._jpegs: list[bytes] = []

    def add(self, items: Sequence[Loaded], config: ExamplesConfig) -> None:
        """Add a batch of images, whose `extra` is a `SourceImage`."""
        for item in items:
            source_image: SourceImage = item.extra
            self._indices.append(item.index)
            self._sizes.append(source_image.size)
            self._boxes.append(source_image.box)
            if config.store == "images":
                self._jpegs.append(encode_jpeg(source_image.image, config.jpeg_quality))

    def arrays(self, failed: Sequence[tuple[int, str]], store: str) -> dict[str, np.ndarray]:
        """Return the arrays `shown/…` of `localize`."""
        arrays = {
            "shown/index": np.array(self._indices, np.int32),
            "shown/size": np.array(self._sizes, np.int32).reshape(-1, 2),
            "shown/box": np.array(self._boxes, np.float32).reshape(-1, 4),
            "shown/lost": np.array([index for index, _ in failed], np.int32),
        }
        if store == "images":
            arrays |= concatenate_bytes("shown/", self._jpegs)
        return arrays


def receptive_field_jpeg(
    layer: Layer, unit: Sequence[int], source_image: SourceImage, recipe: Preprocessing, config: ExamplesConfig
) -> bytes:
    """Return the receptive field of a unit (row, column) as JPEG; the whole input if the unit sees all of it."""
    input_size = recipe.size
    box = (0, 0, input_size[1], input_size[0])
    if layer.field is not None:
        box = crops.receptive_field_box(
            unit[0], unit[1], layer.field.size, layer.field.stride, layer.field.offset, input_size
        )
    image = source_image.image
    region = image.crop(crops.to_source_box(box, input_size, source_image.box, source_image.size, image.size))
    region.thumbnail((config.crop_side, config.crop_side), Image.Resampling.LANCZOS)
    return encode_jpeg(region, config.jpeg_quality)


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """Return an image as JPEG bytes, without metadata."""
    with io.BytesIO() as buffer:
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        return buffer.getvalue()


def concatenate_bytes(prefix: str, pieces: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Concatenate byte strings.

    Returns:
        `<prefix>jpeg`, all bytes, and `<prefix>offset`, (n + 1,): where each string begins, and where the last ends.
    """
    offset = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    return {f"{prefix}jpeg": np.frombuffer(b"".join(pieces), np.uint8), f"{prefix}offset": offset}
