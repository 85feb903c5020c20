"""Tiles of the map for more units than one image each has room for: at each level a grid, and in it one unit a cell.

Level k divides the map into 2ᵏ × 2ᵏ cells. The unit of a cell is the one nearest to its middle; scripts of the page
find it by the same rule. A tile is a sheet of the cells of `TILE` × `TILE` neighbours, each at its own place.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.hashing import digest_of
from pipeline.core.machine import available_cores
from pipeline.site.layout.embedding import GRID
from pipeline.site.media.photo_crops import GREY
from pipeline.site.media.size_budget import encode
from pipeline.site.media.sprites import side
from pipeline.site.output import write

# The page shows an image of each unit in view, in the sheets of its layer, up to this number.
MANY = 1500
LEVELS = (4, 5, 6)
TILE = 32
# Side of a cell in pixels.
CELL_PX = 64
FOLDER = "media/map"


def levels_for(units: int) -> tuple[int, ...]:
    """Return the levels of the tiles of a map; none if every unit has an image at any zoom."""
    return LEVELS if units > MANY else ()


def files_for(units: int) -> int:
    """Return the largest number of tiles of a map."""
    return sum(math.ceil(2**level / TILE) ** 2 for level in levels_for(units))


def chosen_units(places: np.ndarray, level: int) -> dict[tuple[int, int], int]:
    """Return the unit of each cell, by (column, row).

    It is the one nearest to the middle of the cell, the first of those that are equally near.

    Args:
        places: Coordinates of each unit, (units, 2) int, 0 … `GRID`.
        level: The cells are 2^level in each direction.
    """
    count = 2**level
    cells = places * count // (GRID + 1)
    # Twice the distance, so that all numbers are integers, here and in the script of the page.
    far = np.abs(2 * places * count - (2 * cells + 1) * (GRID + 1)).astype(np.int64)
    order = np.lexsort((np.arange(len(places)), (far**2).sum(1)))
    chosen: dict[tuple[int, int], int] = {}
    for unit in order.tolist():
        chosen.setdefault((int(cells[unit, 0]), int(cells[unit, 1])), unit)
    return chosen


@dataclasses.dataclass(frozen=True)
class MapImages:
    """Where the small images of all units are.

    Attributes:
        root: Folder of the site.
        sources: Sheet of each unit, from the root of the site.
        cells: Cell of each unit in its sheet.
        per_sheet: Cells of a full sheet.
        px: Side of a cell in pixels.
        digests: Digest of the images of each unit's layer.
    """

    root: Path
    sources: Sequence[str]
    cells: Sequence[int]
    per_sheet: int
    px: int
    digests: Sequence[str]


def write_tiles(
    images: MapImages, places: np.ndarray, before: tuple[Path, Mapping[str, str]], kind: str, quality: int
) -> dict[str, str]:
    """Write the tiles of a map; return a digest of what each shows, by its file.

    Args:
        images: The small images.
        places: Coordinates of each unit, (units, 2) int.
        before: Folder of the previous site, and what this returned then: tiles that show the same are taken over.
        kind: Image format.
        quality: Encoder quality.
    """
    target, known = before
    suffix = "jpg" if kind == "jpeg" else kind
    digests: dict[str, str] = {}
    made: dict[str, _Tile] = {}
    for level in levels_for(len(places)):
        tiles: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for (column, row), unit in chosen_units(places, level).items():
            tiles.setdefault((column // TILE, row // TILE), []).append((column % TILE, row % TILE, unit))
        for (across, down), cells in sorted(tiles.items()):
            name = f"{FOLDER}/t{level}-{across}-{down}.{suffix}"
            shown = [[c, r, images.sources[u], images.cells[u], images.digests[u]] for c, r, u in sorted(cells)]
            digests[name] = digest_of([shown, quality, CELL_PX])
            if known.get(name) == digests[name] and (target / name).is_file():
                write(images.root, name, (target / name).read_bytes())
            else:
                made[name] = _Tile(min(TILE, 2**level) * CELL_PX, cells)
    needed = sorted({images.sources[unit] for tile in made.values() for _, _, unit in tile.cells})
    # Decoding and encoding leave the other threads alone.
    with ThreadPoolExecutor(available_cores()) as pool:
        sheets = dict(zip(needed, pool.map(lambda source: _decoded(images.root / source), needed), strict=True))
        encoded = pool.map(lambda tile: encode(tile.drawn(images, sheets), kind, quality), made.values())
        for name, data in zip(made, encoded, strict=True):
            write(images.root, name, data)
    return digests


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile to make: its side in pixels, and (column, row, unit) of each cell."""

    side_px: int
    cells: Sequence[tuple[int, int, int]]

    def drawn(self, images: MapImages, sheets: Mapping[str, Image.Image]) -> Image.Image:
        """Return the tile, from the decoded sheets of small images."""
        tile = Image.new("RGB", (self.side_px, self.side_px), GREY)
        columns, px = side(images.per_sheet), images.px
        for column, row, unit in self.cells:
            cell = images.cells[unit]
            left, top = cell % columns * px, cell // columns * px
            box = (left, top, left + px, top + px)
            small = sheets[images.sources[unit]].resize((CELL_PX, CELL_PX), Image.Resampling.BILINEAR, box)
            tile.paste(small, (column * CELL_PX, row * CELL_PX))
        return tile


def _decoded(path: Path) -> Image.Image:
    """Return a sheet of small images."""
    with Image.open(path) as opened:
        return opened.convert("RGB")
