"""Choose image sizes and numbers of units per file so that a site fits the limits of its host.

Two parameters are lowered until the site fits. Bytes: five size levels, from the configured sizes down to half of
them; the size of a site is estimated from a sample of the atlas. Files: `spread`, by which more units share a sheet
or a shard; the number of files is computed exactly.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.data.multiband import to_display_image
from pipeline.images.opacity import opacity
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.store.reader import Atlas

# Units of one chunk. Every number of units per file divides it, so that no file spans two chunks.
CHUNK = 240
DIVISORS = tuple(n for n in range(1, CHUNK + 1) if CHUNK % n == 0)
# (factor of all sizes, decrease of the quality), the best first.
LEVELS = ((1.0, 0), (0.85, 5), (0.7, 9), (0.6, 13), (0.5, 18))
# Values of `Sizes.spread`, the fewest units per file first.
SPREADS = (1, 2, 3, 4, 6, 8, 12, 24)
TINY = 40
SAMPLE = 12
# The estimated size may be at most this share of the limit.
MARGIN = 0.93
# Options of Pillow for the fastest encoding of a format; a site can have 100,000 images.
FASTEST: Mapping[str, Mapping[str, int]] = {"webp": {"method": 0}, "avif": {"speed": 9}}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of images and numbers of units per file.

    Attributes:
        level: Index of the size level; 0 is the best.
        quality: Encoder quality, 1 to 100.
        picture_px: Longer side of a feature visualization in pixels.
        thumb_px: Side of a thumbnail.
        example_px: Side of a crop of a dataset image.
        photo_px: Longer side of a whole dataset image.
        spread: Factor by which more units share a file.
        per_photo: Number of whole dataset images per file.
        tiny_px: Side of the smallest images.
    """

    level: int
    quality: int
    picture_px: int
    thumb_px: int
    example_px: int
    photo_px: int
    spread: int = 1
    per_photo: int = 1
    tiny_px: int = TINY

    @property
    def per_thumb(self) -> int:
        """Units per sheet of thumbnails."""
        return divisor(48 if self.spread < 3 else 60 if self.spread < 8 else 80)

    @property
    def per_tiny(self) -> int:
        """Units per sheet of the smallest images."""
        return divisor(24 if self.spread < 3 else 40 if self.spread < 8 else 60)

    @property
    def per_shard(self) -> int:
        """Units per shard of numbers."""
        return divisor(12 if self.spread == 1 else 20 if self.spread < 4 else 12 * min(5, self.spread))

    @property
    def per_heat(self) -> int:
        """Units per shard of heat maps."""
        return divisor(24 * min(10, self.spread))

    def picture(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) at which a feature visualization is shown; it is never enlarged."""
        scale = min(1.0, self.picture_px / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def mask(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) of a transparency mask, given the size from `picture`: half of it."""
        return max(1, height // 2), max(1, width // 2)

    def per_picture(self, height: int, width: int, variants: int) -> int:
        """Return the number of units per sheet of feature visualizations, given the size from `picture`."""
        # A unit's page shows a single unit of the sheet, so these sheets grow the slowest.
        return divisor(min(60, (75_000 + self.spread * 75_000) // (height * width * variants)))

    def per_crops(self, cells: int) -> int:
        """Return the number of units per sheet of crops with `cells` crops per unit."""
        return divisor(min(60, self.spread * 130_000 // max(1, cells * self.example_px**2)))


@dataclasses.dataclass(frozen=True)
class Inventory:
    """Numbers of the things that a site has to store.

    Attributes:
        layers: Summaries of the layers.
        crops: Crops per unit, by layer.
        heat_maps: Whether heat maps are stored, by layer.
        images: Number of dataset images that are stored whole.
        other_files: Number of pages and other files.
        other_bytes: Size of files whose sizes are not chosen, in bytes.
    """

    layers: Sequence[LayerSummary]
    crops: Sequence[int]
    heat_maps: Sequence[bool]
    images: int
    other_files: int
    other_bytes: int = 0


@functools.cache
def divisor(limit: int) -> int:
    """Return the largest divisor of `CHUNK` that is at most `limit`, or 1."""
    return max(n for n in DIVISORS if n <= max(1, limit))


def files(sizes: Sizes, inventory: Inventory) -> int:
    """Return the number of files of a site."""
    count = inventory.other_files + math.ceil(inventory.images / sizes.per_photo)
    for facts, crops, heat_maps in zip(inventory.layers, inventory.crops, inventory.heat_maps, strict=True):
        units = len(facts.channels)
        if not units:
            continue
        units_per_file = [sizes.per_thumb, sizes.per_tiny, sizes.per_shard]
        for rendered in facts.rendered:
            size = sizes.picture(rendered.height, rendered.width)
            units_per_file += [sizes.per_picture(*size, rendered.variants)] * (2 if rendered.masked else 1)
        if crops:
            units_per_file.append(sizes.per_crops(crops))
        if heat_maps:
            units_per_file.append(sizes.per_heat)
        count += sum(math.ceil(units / n) for n in units_per_file)
    return count


def choose(atlas: Atlas, inventory: Inventory, config: SiteConfig) -> Sizes:
    """Return the best sizes that fit `max_files` and `max_bytes`, or the smallest if none does."""
    sample = _sample(atlas, inventory)
    sizes = levels(config)[0]
    for level in levels(config):
        for spread in SPREADS:
            # Whole images load fastest from a file each, so they share files only if they would be over a third of all.
            per_image_file = 1 if inventory.images <= config.max_files // 3 else 4 * spread
            sizes = dataclasses.replace(level, spread=spread, per_photo=per_image_file)
            if files(sizes, inventory) <= config.max_files:
                break
        if _bytes(sizes, inventory, sample, config) <= MARGIN * config.max_bytes:
            break
    return sizes


def levels(config: SiteConfig) -> list[Sizes]:
    """Return the sizes of all levels, the best first."""

    def scaled(px: int, scale: float) -> int:
        return max(16, round(px * scale / 8) * 8)

    return [
        Sizes(
            level=i,
            quality=max(1, config.quality - quality_decrease),
            picture_px=scaled(config.picture_px, scale),
            thumb_px=scaled(config.thumb_px, max(0.7, scale)),
            example_px=scaled(config.example_px, scale),
            photo_px=scaled(config.photo_px, scale),
        )
        for i, (scale, quality_decrease) in enumerate(LEVELS)
    ]


def encode(image: Image.Image, kind: str, quality: int) -> bytes:
    """Encode an image with the fastest settings of its format.

    Args:
        image: The image.
        kind: webp, avif or jpeg.
        quality: 1 to 100.
    """
    with io.BytesIO() as buffer:
        image.save(buffer, kind.upper(), quality=quality, **FASTEST.get(kind, {}))
        return buffer.getvalue()


def _sample(atlas: Atlas, inventory: Inventory) -> dict[str, list[Image.Image]]:
    """Return a few visualizations, masks and dataset images from layers spread evenly over the atlas."""
    visualizations, masks, dataset_images = [], [], []
    layers = [facts for facts in inventory.layers if facts.channels]
    for i in range(SAMPLE if layers else 0):
        facts = layers[i * len(layers) // SAMPLE]
        layer = atlas[facts.name]
        row = (i * 7) % len(layer.channels)
        if facts.rendered:
            key = facts.rendered[0].key
            visualizations.append(to_display_image(layer.images(key)[row, 0]).convert("RGB"))
            stored_masks = layer.masks(key)
            if stored_masks is not None:
                masks.append(Image.fromarray(opacity(stored_masks[row, 0])).convert("RGB"))
        best = layer.examples("max")
        if best is not None and best.index[row, 0] >= 0:
            image = atlas.source_image(int(best.index[row, 0]))
            if image:
                dataset_images.append(image.convert("RGB"))
    return {"pictures": visualizations, "masks": masks, "photos": dataset_images}


def _bytes_per_pixel(images: Sequence[Image.Image], longest: int, kind: str, quality: int) -> float:
    """Return the mean encoded size of `images` at a longer side of at most `longest` pixels."""
    total, pixels = 0, 0
    for image in images:
        scale = min(1.0, longest / max(image.size))
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        total += len(encode(small, kind, quality))
        pixels += small.width * small.height
    return total / pixels if pixels else 0.0


def _bytes(sizes: Sizes, inventory: Inventory, sample: dict[str, list[Image.Image]], config: SiteConfig) -> float:
    """Estimate the size of the site in bytes."""
    sides = (sizes.picture_px, sizes.thumb_px, sizes.tiny_px)
    picture, thumb, tiny = (_bytes_per_pixel(sample["pictures"], px, config.format, sizes.quality) for px in sides)
    mask = _bytes_per_pixel(sample["masks"], sizes.picture_px // 2, config.format, sizes.quality)
    sides = (sizes.example_px, sizes.photo_px)
    crop, photo = (_bytes_per_pixel(sample["photos"], px, config.photo_format, sizes.quality) for px in sides)
    # A whole image fills about 0.72 of a square of its longer side; pages and indices are counted as 1 MB.
    total = inventory.images * photo * sizes.photo_px**2 * 0.72 + 1e6 + inventory.other_bytes
    for facts, crops, heat_maps in zip(inventory.layers, inventory.crops, inventory.heat_maps, strict=True):
        per_unit = thumb * sizes.thumb_px**2 + tiny * sizes.tiny_px**2 + crop * crops * sizes.example_px**2
        for rendered in facts.rendered:
            size = sizes.picture(rendered.height, rendered.width)
            per_unit += picture * np.prod(size) * rendered.variants
            if rendered.masked:
                per_unit += mask * np.prod(sizes.mask(*size)) * rendered.variants
        heat_map = min(14, facts.map_size[0]) * min(14, facts.map_size[1]) * 1.4 if heat_maps else 0
        examples = config.examples + config.means + config.least + 6 * config.per_bin
        # A unit's numbers are stored twice, in a shard and in the API.
        total += len(facts.channels) * (per_unit + 2 * (1400 + 60 * examples) + heat_map * examples)
    return total
