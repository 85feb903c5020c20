"""What the page of an activation atlas shows: sheets of its cells, crops of their nearest samples, and their data."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.data.js_shards import rounded_decimals, shard_script, to_json
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.photo_crops import DatasetImages, ExamplePlace
from pipeline.site.media.size_budget import encode
from pipeline.site.media.sprites import sheet, shrunk, side
from pipeline.site.output import write
from pipeline.store.activation_atlas import ActivationAtlas
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas

# Cells in one sheet of visualizations, and in one of crops.
PER_SHEET = 64
PER_CROPS = 32
# Largest side of a cell, and side of a crop in pixels; nearest samples that are shown.
CELL_PX, CROP_PX = 128, 72
NEAREST = 4
# Largest side of the image of all cells, and of a cell in it, in pixels.
PREVIEW_PX, PREVIEW_CELL = 960, 48
# Estimated size in bytes of a cell with its crops.
CELL_BYTES = 12_000


def files_for(cells: int) -> int:
    """Return the number of files of an activation atlas of so many cells: its page, data, preview and sheets."""
    return 3 + math.ceil(cells / PER_SHEET) + math.ceil(cells / PER_CROPS) if cells else 0


def preview_size(grid: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the image of all cells of a grid of (rows, columns), in pixels."""
    px = max(4, min(PREVIEW_CELL, PREVIEW_PX // max(grid)))
    return grid[1] * px, grid[0] * px


class ActivationAtlasFiles:
    """Writer of the media and data of activation atlases.

    Args:
        root: Folder of the site.
        atlas: The atlas.
        catalogue: Paths and labels of the dataset images, and classes.
        config: Configuration of the site.
        quality: Encoder quality.
    """

    def __init__(self, root: Path, atlas: Atlas, catalogue: Catalogue, config: SiteConfig, quality: int) -> None:
        self._root, self._atlas, self._catalogue = root, atlas, catalogue
        self._config, self._quality = config, quality
        self._images = DatasetImages(atlas, CROP_PX, blur=config.licence == "blur")

    def write(self, facts: LayerSummary) -> None:
        """Write everything but the page of a layer's activation atlas."""
        view = self._atlas[facts.name]
        found = view.activation_atlas()
        assert found is not None
        px = min(CELL_PX, max(found.images.shape[1:3]))
        cells = [shrunk(image, px, px) for image in found.images]
        for start in range(0, len(cells), PER_SHEET):
            image = sheet(cells[start : start + PER_SHEET], side(PER_SHEET), (px, px))
            self._image(facts, f"s{start}", image)
        self._image(facts, "preview", _preview(found, cells))
        record = self._record(found, self._crops(facts, view, found)) | {"name": facts.name, "px": px}
        write(self._root, f"data/{facts.atlas_slug}.js", shard_script(facts.atlas_slug, to_json(record)))

    def _image(self, facts: LayerSummary, name: str, image: Image.Image, kind: str | None = None) -> None:
        kind = kind or self._config.format
        data = encode(image, kind, self._quality)
        write(self._root, f"media/{facts.atlas_slug}/{name}.{SUFFIX[kind]}", data)

    def _crops(self, facts: LayerSummary, view: LayerView, found: ActivationAtlas) -> np.ndarray:
        """Write the crops of the nearest samples that the atlas stores; return which there are, (K, NEAREST) bool."""
        nearest = found.nearest[:, :NEAREST]
        there = np.zeros(nearest.shape, bool)
        if self._config.licence == "ids":
            return there
        for start in range(0, len(nearest), PER_CROPS):
            rows: list[Image.Image | None] = []
            for cell in range(start, min(start + PER_CROPS, len(nearest))):
                for k, number in enumerate(nearest[cell].tolist()):
                    crop = self._crop(view, found, number) if number >= 0 else None
                    there[cell, k] = crop is not None
                    rows.append(crop)
            if any(row is not None for row in rows):
                self._image(facts, f"n{start}", sheet(rows, 4 * NEAREST, (CROP_PX, CROP_PX)), self._config.photo_format)
        return there

    def _crop(self, view: LayerView, found: ActivationAtlas, number: int) -> Image.Image | None:
        place = ExamplePlace(int(found.image[number]), int(found.y[number]), int(found.x[number]), -1, -1)
        crop = self._images.crop(view, place)
        return None if crop is None else self._images.blurred(crop)

    def _record(self, found: ActivationAtlas, crops: np.ndarray) -> dict[str, Any]:
        """Return what the script of the page needs."""
        classes, counts = _class_counts(found), found.count.tolist()
        names = self._catalogue.classes
        used = sorted({number for cell in classes for number, _ in cell})
        activation = rounded_decimals(found.activation)
        return {
            "grid": list(found.grid),
            "sheet": [PER_SHEET, side(PER_SHEET)],
            "crops": [PER_CROPS, NEAREST, 4 * NEAREST],
            "classes": {str(number): names[number] if number < len(names) else str(number) for number in used},
            "cells": [
                {
                    "row": int(found.row[i]),
                    "column": int(found.column[i]),
                    "count": counts[i],
                    "activation": activation[i],
                    "failed": bool(found.failed[i]),
                    "classes": classes[i],
                    "nearest": self._nearest(found, i, crops[i]),
                }
                for i in range(len(counts))
            ],
        }

    def _nearest(self, found: ActivationAtlas, cell: int, crops: np.ndarray) -> list[list[Any]]:
        """Return path, label and whether there is a crop of each sample that is nearest to the mean of a cell."""
        paths, labels = self._catalogue.paths, self._catalogue.labels
        result = []
        for number, crop in zip(found.nearest[cell, :NEAREST].tolist(), crops.tolist(), strict=True):
            if number >= 0:
                image = int(found.image[number])
                result.append([paths[image], labels[image], crop])
        return result


def _class_counts(found: ActivationAtlas) -> list[list[list[int]]]:
    """Return (class, number of samples) of all classes of each cell, the most frequent first."""
    result: list[list[list[int]]] = [[] for _ in range(len(found.count))]
    known = (found.cell >= 0) & (found.top >= 0)
    pairs = np.stack([found.cell[known], found.top[known]], axis=1)
    for (cell, number), count in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
        result[int(cell)].append([int(number), int(count)])
    return [sorted(cell, key=lambda one: (-one[1], one[0])) for cell in result]


def _preview(found: ActivationAtlas, cells: list[Image.Image]) -> Image.Image:
    """Return an image of all cells at their places on white."""
    size = preview_size(found.grid)
    px = size[0] // found.grid[1]
    image = Image.new("RGB", size, "white")
    for cell, row, column in zip(cells, found.row.tolist(), found.column.tolist(), strict=True):
        image.paste(cell.resize((px, px), Image.Resampling.BILINEAR), (column * px, row * px))
    return image
