"""How large pictures may be and how many share a file, so that a site fits where it is to go.

Two dials. Bytes: five levels, from the sizes of the configuration down to half of them; what a level weighs is
measured on a sample of the atlas itself. Files: a factor by which more units share a sheet or a shard; files can be
counted exactly beforehand. Both begin at the best setting and go down until the site fits.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.multiband import visible
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Facts
from pipeline.site.media import encoding
from pipeline.store.reader import Atlas

# Units of one piece of work. Every group of units that share a file divides it, so that a piece needs no other.
CHUNK = 240
DIVISORS = tuple(n for n in range(1, CHUNK + 1) if CHUNK % n == 0)
LEVELS = ((1.0, 0), (0.85, 5), (0.7, 9), (0.6, 13), (0.5, 18))
TINY = 40
SAMPLE = 12
MARGIN = 0.93


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sides in pixels, the encoder's quality, and how many units (`per_…`) or photographs share a file."""

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
        """Units in a sheet of thumbnails."""
        return divisor(48 if self.spread < 8 else 80)

    @property
    def per_tiny(self) -> int:
        """Units in a sheet of the smallest pictures."""
        return divisor(24 if self.spread < 3 else 40 if self.spread < 8 else 60)

    @property
    def per_shard(self) -> int:
        """Units in a shard of numbers."""
        return divisor(12 if self.spread == 1 else 20 if self.spread < 4 else 12 * min(5, self.spread))

    @property
    def per_heat(self) -> int:
        """Units in a shard of heat-maps."""
        return divisor(24 * min(10, self.spread))

    def picture(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in which a picture is shown: never enlarged."""
        scale = min(1.0, self.picture_px / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def per_picture(self, height: int, width: int, variants: int) -> int:
        """Units in a sheet of pictures, whose (height, width) is that of `picture`."""
        # A page shows one unit's, so these grow the slowest.
        return divisor(min(60, (75_000 + self.spread * 75_000) // (height * width * variants)))

    def per_crops(self, cells: int) -> int:
        """Units in a sheet of crops, with so many cells each."""
        return divisor(min(60, self.spread * 130_000 // max(1, cells * self.example_px**2)))


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What there is to show: facts, the crops kept of each unit by layer, photographs shown whole, and other files."""

    layers: Sequence[Facts]
    cells: Sequence[int]
    heat: Sequence[bool]
    photographs: int
    pages: int


def divisor(wanted: int) -> int:
    """The largest divisor of `CHUNK` that is not above `wanted`, and at least 1."""
    return max(n for n in DIVISORS if n <= max(1, wanted))


def files(sizes: Sizes, inventory: Inventory) -> int:
    """Number of files of a site."""
    count = inventory.pages + math.ceil(inventory.photographs / sizes.per_photo)
    for facts, cells, heat in zip(inventory.layers, inventory.cells, inventory.heat, strict=True):
        units = len(facts.channels)
        if not units:
            continue
        groups = [sizes.per_thumb, sizes.per_tiny, sizes.per_shard]
        for r in facts.rendered:
            groups.append(sizes.per_picture(*sizes.picture(r.height, r.width), r.variants))
        groups += [sizes.per_crops(cells)] if cells else []
        groups += [sizes.per_heat] if heat else []
        count += sum(math.ceil(units / n) for n in groups)
    return count


def choose(atlas: Atlas, inventory: Inventory, config: SiteConfig) -> Sizes:
    """The best sizes with which the site fits into `max_files` and `max_bytes`; the smallest if none does."""
    sample = _sample(atlas, inventory)
    sizes = levels(config)[0]
    for level in levels(config):
        for spread in (1, 2, 3, 4, 6, 8, 12, 24):
            # Whole pictures a file each are the lightest to look at, as long as they are few beside all else.
            room = 1 if inventory.photographs <= config.max_files // 3 else 4 * spread
            sizes = dataclasses.replace(level, spread=spread, per_photo=room)
            if files(sizes, inventory) <= config.max_files:
                break
        if _bytes(sizes, inventory, sample, config) <= MARGIN * config.max_bytes:
            break
    return sizes


def levels(config: SiteConfig) -> list[Sizes]:
    """All levels, the best first."""

    def side(px: int, scale: float) -> int:
        return max(16, round(px * scale / 8) * 8)

    return [
        Sizes(
            i, max(1, config.quality - less), side(config.picture_px, scale), side(config.thumb_px, max(0.7, scale)),
            side(config.example_px, scale), side(config.photo_px, scale),
        )
        for i, (scale, less) in enumerate(LEVELS)
    ]  # fmt: skip


def encode(image: Image.Image, kind: str, quality: int) -> bytes:
    """A picture as bytes of a web page; the fastest method, for a site may have a hundred thousand of them."""
    if kind == "webp":
        return encoding.encode(image, quality)
    with io.BytesIO() as buffer:
        options: dict[str, Any] = {"speed": 9} if kind == "avif" else {}
        image.save(buffer, kind.upper(), quality=quality, **options)
        return buffer.getvalue()


def _sample(atlas: Atlas, inventory: Inventory) -> dict[str, list[Image.Image]]:
    """A few pictures and photographs, spread over the atlas."""
    pictures, photos = [], []
    found = [facts for facts in inventory.layers if facts.channels]
    for i in range(SAMPLE if found else 0):
        facts = found[i * len(found) // SAMPLE]
        layer = atlas[facts.name]
        row = (i * 7) % len(layer.channels)
        if facts.rendered:
            pictures.append(visible(layer.pictures(facts.rendered[0].key)[row, 0]).convert("RGB"))
        best = layer.examples("max")
        if best is not None and best.index[row, 0] >= 0 and (photo := atlas.picture(int(best.index[row, 0]))):
            photos.append(photo.convert("RGB"))
    return {"pictures": pictures, "photos": photos}


def _bytes(sizes: Sizes, inventory: Inventory, sample: dict[str, list[Image.Image]], config: SiteConfig) -> float:
    """What the site will weigh."""

    def density(images: Sequence[Image.Image], longest: int, kind: str) -> float:
        """Bytes a pixel, without what a file costs however small it is."""
        total, pixels = 0, 0
        for image in images:
            scale = min(1.0, longest / max(image.size))
            small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            total += len(encode(small, kind, sizes.quality))
            pixels += small.width * small.height
        return total / pixels if pixels else 0.0

    sides = (sizes.picture_px, sizes.thumb_px, sizes.tiny_px)
    picture, thumb, tiny = (density(sample["pictures"], px, config.format) for px in sides)
    crop, photo = (density(sample["photos"], px, config.photo_format) for px in (sizes.example_px, sizes.photo_px))
    total = inventory.photographs * photo * sizes.photo_px**2 * 0.72 + 1e6
    for facts, cells, heat in zip(inventory.layers, inventory.cells, inventory.heat, strict=True):
        each = thumb * sizes.thumb_px**2 + tiny * sizes.tiny_px**2 + crop * cells * sizes.example_px**2
        for r in facts.rendered:
            each += picture * np.prod(sizes.picture(r.height, r.width)) * r.variants
        maps = min(14, facts.map_size[0]) * min(14, facts.map_size[1]) * 1.4 if heat else 0
        # A unit's numbers stand in a shard and in the API.
        shown = config.examples + config.least + 6 * config.per_bin
        total += len(facts.channels) * (each + 2 * (1400 + 60 * shown) + maps * shown)
    return total
