"""Tiles of the map: one unit a cell, each at its place, and kept while what they show is the same."""

import numpy as np
from PIL import Image
from pytest import MonkeyPatch

from pipeline.site.layout.embedding import GRID
from pipeline.site.media import map_tiles
from pipeline.site.media.map_tiles import CELL_PX, TILE, MapImages, chosen_units, write_tiles

PX, PER = 16, 4


def images(root, count: int, changed: int = -1) -> MapImages:
    """Sheets of 2 × 2 cells of one color each, the red of a unit being its number."""
    for start in range(0, count, PER):
        sheet = Image.new("RGB", (2 * PX, 2 * PX))
        for cell in range(PER):
            color = (start + cell, 200 if start + cell == changed else 100, 50)
            sheet.paste(color, (cell % 2 * PX, cell // 2 * PX, (cell % 2 + 1) * PX, (cell // 2 + 1) * PX))
        sheet.save(root / f"b{start}.png")
    sources = [f"b{i - i % PER}.png" for i in range(count)]
    digests = ["new" if i - i % PER == changed - changed % PER else "old" for i in range(count)]
    return MapImages(root, sources, [i % PER for i in range(count)], PER, PX, digests)


def test_each_cell_shows_the_unit_nearest_to_its_middle(tmp_path, monkeypatch: MonkeyPatch):
    monkeypatch.setattr(map_tiles, "MANY", 10)
    places = np.random.default_rng(0).integers(0, GRID + 1, (200, 2))
    write_tiles(images(tmp_path, 200), places, (tmp_path / "no", {}), "jpeg", 95)
    for level in map_tiles.LEVELS:
        width = (GRID + 1) / 2**level
        chosen = chosen_units(places, level)
        assert len(chosen) == len({tuple(cell) for cell in (places // width).astype(int).tolist()})
        for (column, row), unit in chosen.items():
            middle = (np.array([column, row]) + 0.5) * width
            inside = (places // width == [column, row]).all(1)
            far = ((places - middle) ** 2).sum(1)
            assert inside[unit] and far[unit] == far[inside].min()
            tile = Image.open(tmp_path / f"media/map/t{level}-{column // TILE}-{row // TILE}.jpg")
            color = tile.getpixel(((column % TILE + 0.5) * CELL_PX, (row % TILE + 0.5) * CELL_PX))
            assert abs(color[0] - unit) <= 3


def test_tiles_without_a_changed_unit_are_kept(tmp_path, monkeypatch: MonkeyPatch):
    monkeypatch.setattr(map_tiles, "MANY", 10)
    places = np.random.default_rng(0).integers(0, GRID + 1, (200, 2))
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    known = write_tiles(images(old, 200), places, (tmp_path / "no", {}), "jpeg", 95)
    written = write_tiles(images(new, 200, changed=7), places, (old, known), "jpeg", 95)
    changed = {name for name in written if written[name] != known[name]}
    assert changed and len(changed) < len(written)
    assert all((new / n).read_bytes() == (old / n).read_bytes() for n in written if n not in changed)
    assert any((new / n).read_bytes() != (old / n).read_bytes() for n in changed)


def test_a_map_with_room_for_all_units_has_no_tiles(tmp_path):
    assert map_tiles.files_for(map_tiles.MANY) == 0 and map_tiles.files_for(map_tiles.MANY + 1) == 6
