"""One piece of a layer, up to 240 units: its sheets of pictures and its shards of numbers. Runs in any process."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, Facts, Shown, facts_of, lists_of
from pipeline.site.data.js_shards import exact, put, text
from pipeline.site.data.unit_records import Recorder, named
from pipeline.site.media.photo_crops import Photos
from pipeline.site.media.size_budget import CHUNK, Sizes, encode
from pipeline.site.media.sprites import sheet, shrunk, side, square
from pipeline.site.output import write
from pipeline.store.reader import Atlas, LayerView, open_atlas

SUFFIX = {"webp": "webp", "avif": "avif", "jpeg": "jpg"}
STRIP_PX = 56
# Units that see less than this share of the input's side get crops of their own.
COARSE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Showing:
    """What is shown of photographs: the lists whose crops are kept, and whether whole pictures are."""

    celled: tuple[str, ...]
    whole: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """What to make: rows of a layer, `order` in the atlas; `ranks` of the layer's small pictures.

    `others` are the ranks of the layers that it is wired to, by channel.
    """

    layer: str
    order: int
    start: int
    stop: int
    ranks: np.ndarray
    strip: tuple[int, ...]
    others: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Made:
    """What came of a piece, beside its files: small pictures (n, px, px, 3) uint8, those of the strip by row, records.

    `records` are JSON, one a unit.
    """

    piece: Piece
    tiny: np.ndarray
    strip: Mapping[int, np.ndarray]
    records: list[str]


class Maker:
    """Makes pieces of the atlas at `path` below `root`. Keeps what it read of the last layer, and photographs."""

    def __init__(self, path: Path, root: Path, config: SiteConfig, sizes: Sizes) -> None:
        self._atlas = open_atlas(path)
        self._root = root
        self._config = config
        self._sizes = sizes
        self._catalogue = Catalogue.of(self._atlas)
        self._photos = Photos(self._atlas, sizes.example_px, config.licence == "blur")
        self._table = table_of(self._atlas)
        self._words: dict[tuple[int, bool], str] = {}
        self._last: tuple[LayerView, Facts, list[Shown], Recorder, np.ndarray | None] | None = None

    def close(self) -> None:
        """Close the atlas."""
        self._atlas.close()

    def make(self, piece: Piece) -> Made:
        """Write the files of `piece`."""
        if self._last is None or self._last[1].name != piece.layer:
            layer = self._atlas[piece.layer].keep()
            facts = facts_of(layer, piece.order, self._catalogue.classes)
            lists = lists_of(layer, self._config)
            recorder = Recorder(layer, facts, self._catalogue, lists, piece.ranks, self._config.similar, piece.others)
            maps = layer.heat_maps()
            self._last = layer, facts, lists, recorder, None if maps is None else maps[:]
        layer, facts, lists, recorder, maps = self._last
        rows = slice(piece.start, piece.stop)
        share = max(facts.aperture)
        showing = showing_of(self._atlas.examples_store, bool(self._table), share, self._config, self._sizes)
        media = f"media/{facts.slug}"
        thumbs = self._pictures(layer, facts, rows, media)
        cells = self._crops(layer, facts, lists, showing, rows, media, thumbs)
        self._sheets(thumbs, rows, self._sizes.per_thumb, self._sizes.thumb_px, f"{media}/a")
        units = recorder.units(rows, cells)
        records = [text(unit) for unit in units]
        self._shards(facts, lists, rows, records, showing)
        if maps is not None and self._config.licence != "ids":
            self._heat(facts, layer, lists, rows, maps)
        px = self._sizes.tiny_px
        tiny = [np.asarray(square(t, px)) if t else np.full((px, px, 3), 128, np.uint8) for t in thumbs]
        strip = {
            row: np.asarray(square(found, STRIP_PX))
            for row in piece.strip
            if rows.start <= row < rows.stop and (found := thumbs[row - rows.start]) is not None
        }
        return Made(piece, np.stack(tiny) if tiny else np.zeros((0, px, px, 3), np.uint8), strip, records)

    def photographs(self, start: int, indices: Sequence[int]) -> int:
        """Write whole pictures: a file each, or the sheet that begins with place `start`; returns how many."""
        per, px = self._sizes.per_photo, self._sizes.photo_px
        if per == 1:
            found = [(i, self._photos.whole(i, px)) for i in indices]
            for index, image in found:
                if image is not None:
                    self._save(image, f"photos/{index}", self._config.photo_format)
            return sum(image is not None for _, image in found)
        # In a sheet every picture fills a square cell; the page, which knows its shape, undoes that.
        cells = [photo and photo.resize((px, px)) for photo in (self._photos.whole(i, px) for i in indices)]
        self._save(sheet(cells, side(per), (px, px)), f"photos/s{start}", self._config.photo_format)
        return len(cells)

    def _save(self, image: Image.Image, name: str, kind: str) -> None:
        write(self._root, f"{name}.{SUFFIX[kind]}", encode(image, kind, self._sizes.quality))

    def _sheets(self, cells: Sequence[Image.Image | None], rows: slice, per: int, px: int, name: str) -> None:
        for start in range(0, len(cells), per):
            image = sheet(cells[start : start + per], side(per), (px, px))
            self._save(image, f"{name}{rows.start + start}", self._config.format)

    def _pictures(self, layer: LayerView, facts: Facts, rows: slice, media: str) -> list[Image.Image | None]:
        """Write the sheets of pictures of every key; returns a thumbnail of each unit, where it has a picture."""
        thumbs: list[Image.Image | None] = [None] * (rows.stop - rows.start)
        for number, r in enumerate(facts.rendered):
            height, width = self._sizes.picture(r.height, r.width)
            per = self._sizes.per_picture(height, width, r.variants)
            images, status = layer.stack(r.key), layer.numbers(r.key)["status"]
            for start in range(rows.start, rows.stop, per):
                stop = min(start + per, rows.stop)
                cells: list[Image.Image | None] = []
                for row in range(start, stop):
                    for variant in range(r.variants):
                        there = status[row, variant] != "missing"
                        image = shrunk(images[row, variant], height, width) if there else None
                        cells.append(image)
                        if image is not None and thumbs[row - rows.start] is None:
                            thumbs[row - rows.start] = square(image, self._sizes.thumb_px)
                image = sheet(cells, side(per * r.variants), (width, height))
                self._save(image, f"{media}/p{number}-{start}", self._config.format)
        return thumbs

    def _crops(
        self,
        layer: LayerView,
        facts: Facts,
        lists: Sequence[Shown],
        showing: Showing,
        rows: slice,
        media: str,
        thumbs: list[Image.Image | None],
    ) -> dict[tuple[int, int], int]:
        """Write the sheets of crops; returns the cell of each (row, example). Fills in what has no thumbnail yet."""
        celled = [shown for shown in lists if shown.name in showing.celled]
        each = sum(shown.count for shown in celled)
        place: dict[tuple[int, int], int] = {}
        if not each:
            if self._config.licence != "ids":
                self._stand_in(layer, lists, rows, thumbs)
            return place
        per = self._sizes.per_crops(each)
        px = self._sizes.example_px
        for start in range(rows.start, rows.stop, per):
            cells: list[Image.Image | None] = []
            for row in range(start, min(start + per, rows.stop)):
                first = len(cells)
                for shown in celled:
                    for index, y, x, pair in _places(shown, row):
                        key = (row, named(pair, index))
                        if key in place:
                            continue
                        crop = self._photos.crop(layer, index, y, x, pair)
                        if crop is not None:
                            place[key] = len(cells) - first
                            cells.append(self._photos.blurred(crop))
                cells += [None] * (first + each - len(cells))
            self._save(sheet(cells, side(per * each), (px, px)), f"{media}/x{start}", self._config.photo_format)
        self._stand_in(layer, lists, rows, thumbs)
        return place

    def _stand_in(
        self, layer: LayerView, lists: Sequence[Shown], rows: slice, thumbs: list[Image.Image | None]
    ) -> None:
        """A unit without a picture is stood for by what it saw of its best photograph."""
        best = next((shown for shown in lists if shown.name == "max"), None)
        for i, row in enumerate(range(rows.start, rows.stop)):
            if thumbs[i] is None and best is not None:
                for index, y, x, pair in _places(best, row)[:1]:
                    crop = self._photos.crop(layer, index, y, x, pair)
                    thumbs[i] = crop and square(self._photos.blurred(crop), self._sizes.thumb_px)

    def _shards(self, facts: Facts, lists: Sequence[Shown], rows: slice, records: list[str], showing: Showing) -> None:
        per = self._sizes.per_shard
        for start in range(rows.start, rows.stop, per):
            stop = min(start + per, rows.stop)
            used = np.unique(np.concatenate([shown.index[start:stop].ravel() for shown in lists] or [np.zeros(0, int)]))
            photos = ",".join(f'"{i}":{self._told(i, showing.whole)}' for i in used.tolist() if i >= 0)
            body = f'{{"units":[{",".join(records[start - rows.start : stop - rows.start])}],"photos":{{{photos}}}}}'
            write(self._root, f"data/{facts.slug}/u{start}.js", put(f"{facts.slug}/u{start}", body))

    def _told(self, index: int, whole: bool) -> str:
        """[path, label] of a photograph, and [place, width, height, left, top, right, bottom] if it is shown whole.

        As JSON, made once for all units. The box is the part that became the input, as shares of the picture.
        """
        if (index, whole) not in self._words:
            catalogue = self._catalogue
            known = index < len(catalogue.paths)
            told: list[object] = [catalogue.paths[index], catalogue.labels[index]] if known else [f"number {index}", ""]
            self._words[index, whole] = text(told + list(self._table.get(index, ())) if whole else told)
        return self._words[index, whole]

    def _heat(self, facts: Facts, layer: LayerView, lists: Sequence[Shown], rows: slice, maps: np.ndarray) -> None:
        """Write the heat-maps of what is shown, base64 of their bytes, with the responses of 0 and 255."""
        ranges = layer.heat_ranges()
        assert ranges is not None
        per = self._sizes.per_heat
        for start in range(rows.start, rows.stop, per):
            stop = min(start + per, rows.stop)
            pairs = np.unique(np.concatenate([s.pair[start:stop].ravel() for s in lists] or [np.zeros(0, int)]))
            pairs = pairs[pairs >= 0]
            low = exact(ranges[pairs])
            found = {
                str(pair): [*low[i], base64.b64encode(maps[pair].tobytes()).decode()]
                for i, pair in enumerate(pairs.tolist())
            }
            body = text({"height": maps.shape[1], "width": maps.shape[2], "maps": found})
            write(self._root, f"data/{facts.slug}/h{start}.js", put(f"{facts.slug}/h{start}", body))


def _places(shown: Shown, row: int) -> list[tuple[int, int, int, int]]:
    """(photograph, y, x, heat-map) of a unit's examples in one list."""
    found = zip(*(a[row].tolist() for a in (shown.index, shown.y, shown.x, shown.pair)), strict=True)
    return [(i, y, x, pair) for i, y, x, pair in found if i >= 0]


def showing_of(store: str, boxes: bool, share: float, config: SiteConfig, sizes: Sizes) -> Showing:
    """What of the photographs a layer's units are shown with: by licence and by what the atlas holds (`store`).

    `boxes` says whether it knows which part of a picture became the input, `share` how much of its side units see.
    """
    if config.licence == "ids" or store == "ids":
        return Showing((), False)
    if config.licence == "crop" or store == "crops" or not boxes:
        return Showing(("max", "min", "spectrum"), False)
    # A page cuts out of the whole pictures what a unit saw, unless that is so small that it would look coarse, or
    # pictures share files, which are heavy to look at one by one.
    return Showing(() if share > COARSE and sizes.per_photo == 1 else ("max", "min"), True)


def table_of(atlas: Atlas) -> dict[int, tuple[object, ...]]:
    """(place, width, height, left, top, right, bottom) of each photograph that the atlas shows, by its index."""
    table: pd.DataFrame = atlas.shown_photographs()
    if not len(table):
        return {}
    values = table.to_numpy(np.float64)
    width, height = values[:, 1], values[:, 2]
    shares = np.round(values[:, 3:] / np.stack([width, height] * 2, 1), 4)
    return {
        int(i): (place, int(w), int(h), *box)
        for place, (i, w, h, box) in enumerate(
            zip(values[:, 0].tolist(), width.tolist(), height.tolist(), shares.tolist(), strict=True)
        )
    }


def pieces_of(
    facts: Facts, ranks: np.ndarray, strip: tuple[int, ...], others: Mapping[str, Mapping[int, int]]
) -> list[Piece]:
    """All pieces of a layer."""
    units = len(facts.channels)
    return [
        Piece(facts.name, facts.order, start, min(start + CHUNK, units), ranks, strip, others)
        for start in range(0, units, CHUNK)
    ]
