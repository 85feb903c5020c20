"""Sheets of the contenders' feature visualizations, and the distances between them; each image is read once."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.compare import image_distance
from pipeline.compare.alignment import Part, views
from pipeline.compare.examples import BYTES_PER_PIXEL, groups_of
from pipeline.compare.runs import RunComparison
from pipeline.data.multiband import to_display_image
from pipeline.site.config import SiteConfig
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.size_budget import CHUNK, MARGIN, SPREADS, Sizes, divisor, encode, levels
from pipeline.site.media.sprites import sheet, shrunk, side, square
from pipeline.site.output import write
from pipeline.store.layer_view import LayerView

_SAMPLE = 12


@dataclasses.dataclass(frozen=True)
class Shape:
    """Stored feature visualizations of one contender in one layer: `variants` per unit, (height, width) in pixels."""

    variants: int
    height: int
    width: int

    def sheet(self, sizes: Sizes) -> tuple[int, int, int, int, int]:
        """Return (units per sheet, variants, columns, width, height) of the sheets."""
        height, width = sizes.picture(self.height, self.width)
        per_sheet = sizes.per_picture(height, width, self.variants)
        return per_sheet, self.variants, side(per_sheet * self.variants), width, height


@dataclasses.dataclass(frozen=True)
class LayerSheets:
    """Results of a layer's sheets: (C,) distances between the images of each unit, and a digest of the files."""

    difference: np.ndarray
    digest: str


def shapes(inputs: RunComparison, layer: str) -> list[Shape | None]:
    """Return the shape of each contender's feature visualizations of a layer, or None if it has none."""
    layer_shapes: list[Shape | None] = []
    for view, contender in zip(views(inputs, layer), inputs.contenders, strict=True):
        if view is None:
            layer_shapes.append(None)
        else:
            _, variants, height, width, _ = view.images(contender.preset).shape
            layer_shapes.append(Shape(variants, height, width))
    return layer_shapes


def per_thumb(sizes: Sizes, contenders: int) -> int:
    """Return the number of units per sheet of thumbnails, which shows all contenders of a unit side by side."""
    return divisor(2 * sizes.per_thumb // contenders)


def choose(inputs: RunComparison, parts: Sequence[Part], config: SiteConfig) -> Sizes:
    """Return the best sizes that fit `max_files` and `max_bytes`, or the smallest if none does."""
    layers = [(len(part.channels), shapes(inputs, part.name)) for part in parts]
    crops = [[group.count for group in groups_of(inputs, part.name, config)] for part in parts]
    sample = _sample(inputs, parts)
    sizes = levels(config)[0]
    for level in levels(config):
        for spread in SPREADS:
            sizes = dataclasses.replace(level, spread=spread)
            counted = _files(sizes, layers, len(inputs.contenders)) + _example_files(sizes, layers, crops)
            if counted <= config.max_files:
                break
        pixels = sizes.example_px**2 * sum(
            units * sum(counts) for (units, _), counts in zip(layers, crops, strict=True)
        )
        if _bytes(sizes, layers, sample, config) + BYTES_PER_PIXEL * pixels <= MARGIN * config.max_bytes:
            break
    return sizes


def write_sheets(
    root: Path, inputs: RunComparison, part: Part, slug: str, sizes: Sizes, config: SiteConfig
) -> LayerSheets:
    """Write the sheets of one layer to `media/<slug>` below `root`.

    `p<contender>-<row>` are the feature visualizations of a contender, `a<row>` thumbnails of all contenders, and
    `b<row>` the smallest images, of the first contender that has one.
    """
    writer = _SheetWriter(root, inputs, part, slug, sizes, config)
    for first in range(0, len(part.channels), CHUNK):
        writer.write_chunk(first, min(first + CHUNK, len(part.channels)))
    return LayerSheets(image_distance.difference(writer.features), writer.digest.hexdigest())


class _SheetWriter:
    """Writer of the sheets of one layer, chunk by chunk.

    Attributes:
        features: (n contenders, C, 74) features of the images written so far; NaN for missing images.
        digest: Digest of the files written so far.
    """

    def __init__(
        self, root: Path, inputs: RunComparison, part: Part, slug: str, sizes: Sizes, config: SiteConfig
    ) -> None:
        self._root = root
        self._part = part
        self._slug = slug
        self._sizes = sizes
        self._config = config
        self._presets = [contender.preset for contender in inputs.contenders]
        self._views = views(inputs, part.name)
        self._shapes = shapes(inputs, part.name)
        self.features = np.full((len(self._views), len(part.channels), image_distance.FEATURES), np.nan)
        self.digest = hashlib.sha256()

    def write_chunk(self, first: int, last: int) -> None:
        """Write all sheets of the rows from `first` to `last`, exclusive."""
        contenders, sizes = len(self._views), self._sizes
        thumbs: list[list[Image.Image | None]] = [[None] * contenders for _ in range(first, last)]
        for at, (view, shape) in enumerate(zip(self._views, self._shapes, strict=True)):
            if view is not None and shape is not None:
                for row, thumb in self._write_visualizations(at, view, shape, range(first, last)).items():
                    thumbs[row - first][at] = thumb
        per_sheet, px = per_thumb(sizes, contenders), sizes.thumb_px
        for start in range(first, last, per_sheet):
            cells = [cell for row in thumbs[start - first : start - first + per_sheet] for cell in row]
            self._save(cells, side(per_sheet * contenders), (px, px), f"a{start}")
        per_sheet, px = sizes.per_tiny, sizes.tiny_px
        for start in range(first, last, per_sheet):
            rows = thumbs[start - first : start - first + per_sheet]
            images = [next(filter(None, row), None) for row in rows]
            cells = [image and square(image, px) for image in images]
            self._save(cells, side(per_sheet), (px, px), f"b{start}")

    def _write_visualizations(self, at: int, view: LayerView, shape: Shape, rows: range) -> dict[int, Image.Image]:
        """Write the sheets of contender `at` and compute the features; return thumbnails by row."""
        per_sheet, variants, columns, width, height = shape.sheet(self._sizes)
        images, status = view.images(self._presets[at]), view.measurements(self._presets[at])["status"]
        stored_rows = {int(channel): i for i, channel in enumerate(view.channels)}
        thumbs = {}
        for start in range(rows.start, rows.stop, per_sheet):
            cells: list[Image.Image | None] = []
            for row in range(start, min(start + per_sheet, rows.stop)):
                stored = stored_rows.get(int(self._part.channels[row]))
                shown: dict[int, Image.Image] = {}
                if stored is not None:
                    for variant in range(variants):
                        if status[stored, variant] != "missing":
                            shown[variant] = shrunk(images[stored, variant], height, width)
                cells += [shown.get(variant) for variant in range(variants)]
                if shown:
                    thumbs[row] = square(next(iter(shown.values())), self._sizes.thumb_px)
                    self.features[at, row] = np.mean([image_distance.features(image) for image in shown.values()], 0)
            self._save(cells, columns, (width, height), f"p{at}-{start}")
        return thumbs

    def _save(self, cells: Sequence[Image.Image | None], columns: int, size: tuple[int, int], name: str) -> None:
        content = encode(sheet(cells, columns, size), self._config.format, self._sizes.quality)
        self.digest.update(content)
        write(self._root, f"media/{self._slug}/{name}.{SUFFIX[self._config.format]}", content)


def _files(sizes: Sizes, layers: Sequence[tuple[int, Sequence[Shape | None]]], contenders: int) -> int:
    """Return the number of files of the site; `layers` are (units, shapes)."""
    total = 40 + 2 * len(layers)
    for units, layer_shapes in layers:
        units_per_file = [per_thumb(sizes, contenders), sizes.per_tiny, sizes.per_shard]
        units_per_file += [shape.sheet(sizes)[0] for shape in layer_shapes if shape is not None]
        total += sum(math.ceil(units / n) for n in units_per_file)
    return total


def _example_files(
    sizes: Sizes, layers: Sequence[tuple[int, Sequence[Shape | None]]], crops: Sequence[Sequence[int]]
) -> int:
    """Return the number of sheets of dataset examples; `crops` are the examples per unit of each group, by layer."""
    pairs = zip(layers, crops, strict=True)
    return sum(math.ceil(units / sizes.per_crops(count)) for (units, _), counts in pairs for count in counts)


def _sample(inputs: RunComparison, parts: Sequence[Part]) -> list[Image.Image]:
    """Return a few feature visualizations, spread over layers and contenders."""
    images = []
    contenders = range(len(inputs.contenders))
    candidates = [(part, at) for part in parts for at in contenders if part.rendered[at].any()]
    for i in range(_SAMPLE if candidates else 0):
        part, at = candidates[i * len(candidates) // _SAMPLE]
        view = views(inputs, part.name)[at]
        if view is not None and len(view.channels):
            row = (i * 7) % len(view.channels)
            images.append(to_display_image(view.images(inputs.contenders[at].preset)[row, 0]).convert("RGB"))
    return images


def _bytes(
    sizes: Sizes,
    layers: Sequence[tuple[int, Sequence[Shape | None]]],
    sample: Sequence[Image.Image],
    config: SiteConfig,
) -> float:
    """Estimate the size of the site in bytes from the encoded sample."""
    content, pixels = 0, 0
    for image in sample:
        height, width = sizes.picture(image.height, image.width)
        content += len(encode(image.resize((width, height)), config.format, sizes.quality))
        pixels += height * width
    bytes_per_pixel = content / pixels if pixels else 0.0
    total = 1e6
    for units, layer_shapes in layers:
        for shape in filter(None, layer_shapes):
            height, width = sizes.picture(shape.height, shape.width)
            image_pixels = shape.variants * height * width + 2 * sizes.thumb_px**2
            total += units * (bytes_per_pixel * image_pixels + 600)
    return total
