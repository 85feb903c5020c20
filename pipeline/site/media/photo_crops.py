"""Dataset images of an atlas: cropped to a receptive field, or whole; blurred if the licence setting requires it."""

import dataclasses
from collections import OrderedDict

from PIL import Image, ImageFilter, ImageOps

from pipeline.store.reader import Atlas, LayerView

# Size of the cache of decoded dataset images in bytes; the same image is an example of many units.
CACHE_BYTES = 400_000_000
GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class ExamplePlace:
    """An example of a unit.

    Attributes:
        index: Index of the dataset image.
        y: Row of the position in the activation map.
        x: Column of the position in the activation map.
        pair: Number of the heat map; −1 for none.
        crop: Number of the stored crop; −1 for none.
    """

    index: int
    y: int
    x: int
    pair: int
    crop: int


class DatasetImages:
    """Reader of dataset images.

    Args:
        atlas: The atlas.
        side: Side of crops in pixels.
        blur: Whether to blur all images, so that only colors and coarse shapes remain.
    """

    def __init__(self, atlas: Atlas, side: int, blur: bool = False) -> None:
        self._atlas = atlas
        self._side = side
        self._blur = blur
        self._stores_crops = atlas.examples_store == "crops"
        self._cache: OrderedDict[int, Image.Image | None] = OrderedDict()
        self._cache_bytes = 0

    def crop(self, layer: LayerView, example: ExamplePlace, which: str = "max") -> Image.Image | None:
        """Return the receptive field of a position in a dataset image.

        Args:
            layer: The layer.
            example: The example.
            which: Name of the list that it is in.

        Returns:
            A square RGB image, or None if the atlas does not store it.
        """
        if self._stores_crops:
            stored = layer.crop(example.crop, which)
            return stored and self._square(stored.convert("RGB"))
        image = self._input_image(example.index)
        if image is None:
            return None
        box, size = layer.crop_box(example.y, example.x), layer.input_size
        if box is None:
            return self._square(image)
        across, down = image.width / size[1], image.height / size[0]
        left, top, right, bottom = (v * s for v, s in zip(box, (across, down) * 2, strict=True))
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        if abs((right - left) / (bottom - top) - 1) > 0.02:
            return self._square(image.crop((round(left), round(top), round(right), round(bottom))))
        exact = (max(0.0, left), max(0.0, top), min(right, image.width), min(bottom, image.height))
        return image.resize((self._side, self._side), Image.Resampling.BILINEAR, box=exact)

    def whole_image(self, index: int, longest: int) -> Image.Image | None:
        """Return the source image, its longer side at most `longest` pixels; None if the atlas does not store it."""
        source = self._atlas.source_image(index)
        if source is None:
            return None
        source.draft("RGB", (longest, longest))
        small = source.convert("RGB")
        small.thumbnail((longest, longest), Image.Resampling.BILINEAR)
        return self.blurred(small)

    def blurred(self, image: Image.Image) -> Image.Image:
        """Return `image`, blurred with a standard deviation of 1/8 of its longer side if blurring is on."""
        return image.filter(ImageFilter.GaussianBlur(max(image.size) / 8)) if self._blur else image

    def _square(self, image: Image.Image) -> Image.Image:
        # Pad instead of cropping: the receptive field includes all of the image.
        return ImageOps.pad(image, (self._side, self._side), Image.Resampling.BILINEAR, color=GREY)

    def _input_image(self, index: int) -> Image.Image | None:
        """Return the part of a dataset image that was the network's input, from the cache if possible."""
        if index not in self._cache:
            image = self._atlas.input_image(index)
            image = image and image.convert("RGB")
            self._cache[index] = image
            self._cache_bytes += image.width * image.height * 3 if image else 0
            while self._cache_bytes > CACHE_BYTES and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cache_bytes -= oldest.width * oldest.height * 3 if oldest else 0
        self._cache.move_to_end(index)
        return self._cache[index]
