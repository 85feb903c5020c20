"""Sheets of the images of facets with their examples."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.data.facets import EXAMPLES, PER_SHEET
from pipeline.site.media.chunks import SUFFIX
from pipeline.site.media.photo_crops import DatasetImages
from pipeline.site.media.size_budget import encode
from pipeline.site.media.sprites import sheet, shrunk
from pipeline.site.output import write
from pipeline.store.facets import UnitFacets
from pipeline.store.reader import Atlas

# Side of a cell in pixels.
CELL_PX = 112

# Estimated size in bytes of a facet with its examples.
FACET_BYTES = 30_000


def files_for(facets: int) -> int:
    """Return the number of files of so many facets of a layer."""
    return math.ceil(facets / PER_SHEET)


class FacetFiles:
    """Writer of the sheets of facets.

    Args:
        root: Folder of the site.
        atlas: The atlas.
        config: Configuration of the site.
        quality: Encoder quality.
    """

    def __init__(self, root: Path, atlas: Atlas, config: SiteConfig, quality: int) -> None:
        self._root, self._atlas, self._config, self._quality = root, atlas, config, quality
        self._images = DatasetImages(atlas, CELL_PX, blur=config.licence == "blur")

    def write(self, facts: LayerSummary) -> None:
        """Write the sheets of a layer: a row for each facet, first its image, then its nearest examples."""
        found = self._atlas[facts.name].facets()
        if found is None:
            return
        for start in range(0, len(found.unit), PER_SHEET):
            cells: list[Image.Image | None] = []
            for row in range(start, min(start + PER_SHEET, len(found.unit))):
                cells.append(_cell(found.images[row]))
                cells += [self._example(found, row, k) for k in range(EXAMPLES)]
            data = encode(sheet(cells, 1 + EXAMPLES, (CELL_PX, CELL_PX)), self._config.photo_format, self._quality)
            suffix = SUFFIX[self._config.photo_format]
            write(self._root, f"media/facets-{facts.slug}/{start // PER_SHEET}.{suffix}", data)

    def _example(self, found: UnitFacets, row: int, place: int) -> Image.Image | None:
        """Return an example of a facet; None where there is none, or images must not be shown."""
        if found.thumbnails is None or self._config.licence == "ids" or found.nearest[row, place] < 0:
            return None
        return self._images.blurred(_cell(found.thumbnails[row, place]))


def _cell(pixels: np.ndarray) -> Image.Image:
    return shrunk(pixels, *pixels.shape[:2]).resize((CELL_PX, CELL_PX), Image.Resampling.BILINEAR)
