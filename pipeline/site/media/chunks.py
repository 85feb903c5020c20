"""Write the files of one chunk of a layer, up to 240 units: sheets of images and shards of numbers.

Chunks are independent of each other, so any process can write them.
"""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.images.opacity import opacity
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary, ShownExamples, shown_lists, summarize
from pipeline.site.data.facets import facets_of
from pipeline.site.data.js_shards import shard_script, shortest_decimals, to_json
from pipeline.site.data.unit_records import Recorder, TinyPlaces, example_key
from pipeline.site.media.cards import CardWriter
from pipeline.site.media.photo_crops import GREY, DatasetImages, ExamplePlace
from pipeline.site.media.size_budget import CHUNK, Sizes, encode
from pipeline.site.media.sprites import sheet, shrunk, side, square
from pipeline.site.output import write
from pipeline.store.reader import Atlas, LayerView, open_atlas

SUFFIX = {"webp": "webp", "avif": "avif", "jpeg": "jpg"}
STRIP_PX = 56
# A receptive field smaller than this share of the input's side would look coarse if it were cut out of a whole image
# by the page, so crops are stored for such layers.
COARSE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Showing:
    """What is shown of dataset images.

    Attributes:
        celled: Lists of dataset examples whose crops are stored.
        whole_images: Whether whole images are stored.
    """

    celled: tuple[str, ...]
    whole_images: bool


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive units of a layer.

    Attributes:
        layer: Name of the layer.
        order: Index of the layer in the atlas.
        start: First row.
        stop: One past the last row.
        ranks: Positions of all units of the layer in its sheets of small images, (units,) integers.
        strip: Rows of the units that the layer's strip shows.
        wired_ranks: Ranks in the layers that this layer is connected to, by layer and channel.
    """

    layer: str
    order: int
    start: int
    stop: int
    ranks: np.ndarray
    strip: tuple[int, ...]
    wired_ranks: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ChunkResult:
    """Results of a chunk that are needed to finish its layer; all other results are in files.

    Attributes:
        chunk: The chunk.
        tiny: Small images of the units, (n, px, px, 3) uint8.
        strip: Images for the layer's strip, (px, px, 3) uint8, by row.
        records: JSON of the units' records.
    """

    chunk: Chunk
    tiny: np.ndarray
    strip: Mapping[int, np.ndarray]
    records: list[str]


@dataclasses.dataclass(frozen=True)
class _LayerInputs:
    """What all chunks of a layer read from it."""

    view: LayerView
    facts: LayerSummary
    lists: list[ShownExamples]
    recorder: Recorder
    heat_maps: np.ndarray | None
    showing: Showing

    @property
    def media(self) -> str:
        """Folder of the layer's images, from the site's root."""
        return f"media/{self.facts.slug}"


class ChunkWriter:
    """Writer of chunks of the atlas at `path` to files below `root`.

    Caches the inputs of the last layer and decoded dataset images.
    """

    def __init__(
        self, path: Path, root: Path, config: SiteConfig, sizes: Sizes, catalogue: Catalogue | None = None
    ) -> None:
        self._atlas = open_atlas(path)
        self._root = root
        self._config = config
        self._sizes = sizes
        self._catalogue = catalogue or Catalogue.of(self._atlas)
        self._images = DatasetImages(self._atlas, sizes.example_px, config.licence == "blur")
        self._table = image_table(self._atlas)
        self._cards = CardWriter(self._atlas, root, config) if config.cards == "all" else None
        self._image_entries: dict[tuple[int, bool], str] = {}
        self._layer: _LayerInputs | None = None

    def close(self) -> None:
        """Close the atlas."""
        self._atlas.close()

    def write(self, chunk: Chunk) -> ChunkResult:
        """Write the files of `chunk`."""
        layer = self._inputs(chunk)
        rows = slice(chunk.start, chunk.stop)
        thumbs = self._write_visualizations(layer, rows)
        self._write_masks(layer, rows)
        cells = self._write_crops(layer, rows, thumbs)
        self._write_sheets(thumbs, rows, self._sizes.per_thumb, self._sizes.thumb_px, f"{layer.media}/a")
        records = [to_json(unit) for unit in layer.recorder.units(rows, cells)]
        self._write_shards(layer, rows, records)
        if layer.heat_maps is not None and self._config.licence != "ids":
            self._write_heat_maps(layer, rows, layer.heat_maps)
        if self._cards is not None:
            self._cards.write_units(layer.view, layer.facts, rows)
        px = self._sizes.tiny_px
        tiny = np.zeros((len(thumbs), px, px, 3), np.uint8)
        for i, thumb in enumerate(thumbs):
            tiny[i] = np.asarray(square(thumb, px)) if thumb else GREY[0]
        strip = {}
        for row in chunk.strip:
            thumb = thumbs[row - rows.start] if rows.start <= row < rows.stop else None
            if thumb is not None:
                strip[row] = np.asarray(square(thumb, STRIP_PX))
        return ChunkResult(chunk, tiny, strip, records)

    def write_images(self, start: int, indices: Sequence[int]) -> int:
        """Write whole dataset images, one per file or as the sheet whose first position is `start`.

        Returns:
            Number of images written, or the number of cells of the sheet.
        """
        per_file, px = self._sizes.per_photo, self._sizes.photo_px
        images = ((i, self._images.whole_image(i, px)) for i in indices)
        if per_file == 1:
            count = 0
            for index, image in images:
                if image is not None:
                    self._save(image, f"photos/{index}", self._config.photo_format)
                    count += 1
            return count
        # In a sheet every image is stretched to a square cell; the page restores the aspect ratio.
        cells = [image and image.resize((px, px)) for _, image in images]
        self._save(sheet(cells, side(per_file), (px, px)), f"photos/s{start}", self._config.photo_format)
        return len(cells)

    def _inputs(self, chunk: Chunk) -> _LayerInputs:
        """Return the inputs of the chunk's layer, read once for consecutive chunks of a layer."""
        if self._layer is None or self._layer.facts.name != chunk.layer:
            view = self._atlas[chunk.layer].with_cache()
            facts = summarize(view, chunk.order, self._catalogue.classes)
            lists = shown_lists(view, self._config)
            places = TinyPlaces(chunk.ranks, chunk.wired_ranks)
            facets = facets_of(view.facets(), self._catalogue, self._config.licence != "ids")
            recorder = Recorder(view, facts, self._catalogue, lists, places, facets)
            heat_maps = view.heat_maps()
            share = max(facts.aperture)
            showing = choose_showing(self._atlas.examples_store, bool(self._table), share, self._config, self._sizes)
            self._layer = _LayerInputs(
                view, facts, lists, recorder, None if heat_maps is None else heat_maps[:], showing
            )
        return self._layer

    def _save(self, image: Image.Image, name: str, kind: str) -> None:
        write(self._root, f"{name}.{SUFFIX[kind]}", encode(image, kind, self._sizes.quality))

    def _write_sheets(
        self, cells: Sequence[Image.Image | None], rows: slice, per_sheet: int, px: int, name: str
    ) -> None:
        for start in range(0, len(cells), per_sheet):
            image = sheet(cells[start : start + per_sheet], side(per_sheet), (px, px))
            self._save(image, f"{name}{rows.start + start}", self._config.format)

    def _write_visualizations(self, layer: _LayerInputs, rows: slice) -> list[Image.Image | None]:
        """Write the sheets of feature visualizations; return a thumbnail of each unit that has one."""
        thumbs: list[Image.Image | None] = [None] * (rows.stop - rows.start)
        for number, rendered in enumerate(layer.facts.rendered):
            height, width = self._sizes.picture(rendered.height, rendered.width)
            variants = rendered.variants
            per_sheet = self._sizes.per_picture(height, width, variants)
            self._write_displays(layer, rows, number)
            images = layer.view.stack(rendered.key)
            status = layer.view.measurements(rendered.key)["status"]
            for start in range(rows.start, rows.stop, per_sheet):
                cells: list[Image.Image | None] = []
                for row in range(start, min(start + per_sheet, rows.stop)):
                    for variant in range(variants):
                        image = None
                        if status[row, variant] != "missing":
                            image = shrunk(images[row, variant], height, width)
                        cells.append(image)
                        if image is not None and thumbs[row - rows.start] is None:
                            thumbs[row - rows.start] = square(image, self._sizes.thumb_px)
                image = sheet(cells, side(per_sheet * variants), (width, height))
                self._save(image, f"{layer.media}/p{number}-{start}", self._config.format)
        return thumbs

    def _write_displays(self, layer: _LayerInputs, rows: slice, number: int) -> None:
        """Write the display images of the preset `number` at their own size, a file each."""
        display = layer.facts.rendered[number].display
        if display is None:
            return
        images = layer.view.images(display.key)
        for row in range(rows.start, rows.stop):
            channel = layer.facts.channels[row]
            if channel in display.channels:
                image = shrunk(images[row, 0], display.height, display.width)
                self._save(image, f"{layer.media}/d{number}-{channel}", self._config.format)

    def _write_masks(self, layer: _LayerInputs, rows: slice) -> None:
        """Write the opacities of the feature visualizations as sheets of gray images of half the size."""
        for number, rendered in enumerate(layer.facts.rendered):
            masks = layer.view.masks(rendered.key)
            if masks is None:
                continue
            size = self._sizes.picture(rendered.height, rendered.width)
            height, width = self._sizes.mask(*size)
            per_sheet = self._sizes.per_picture(*size, rendered.variants)
            for start in range(rows.start, rows.stop, per_sheet):
                cells = [
                    shrunk(opacity(mask)[..., None], height, width)
                    for variants in masks[start : min(start + per_sheet, rows.stop)]
                    for mask in variants
                ]
                image = sheet(cells, side(per_sheet * rendered.variants), (width, height))
                self._save(image, f"{layer.media}/m{number}-{start}", self._config.format)

    def _write_crops(
        self, layer: _LayerInputs, rows: slice, thumbs: list[Image.Image | None]
    ) -> dict[tuple[int, int], int]:
        """Write the sheets of crops of dataset examples, and fill in missing thumbnails.

        Returns:
            Cell of each crop, by (row, example).
        """
        stored_lists = [examples for examples in layer.lists if examples.name in layer.showing.celled]
        per_unit = sum(examples.count for examples in stored_lists)
        cell_of: dict[tuple[int, int], int] = {}
        if not per_unit:
            if self._config.licence != "ids":
                self._fill_thumbs(layer, rows, thumbs)
            return cell_of
        per_sheet = self._sizes.per_crops(per_unit)
        px = self._sizes.example_px
        for start in range(rows.start, rows.stop, per_sheet):
            cells: list[Image.Image | None] = []
            for row in range(start, min(start + per_sheet, rows.stop)):
                first = len(cells)
                for examples in stored_lists:
                    for example in _examples(examples, row):
                        key = (row, example_key(example.pair, example.index))
                        if key in cell_of:
                            continue
                        crop = self._images.crop(layer.view, example, examples.name)
                        if crop is not None:
                            cell_of[key] = len(cells) - first
                            cells.append(self._images.blurred(crop))
                cells += [None] * (first + per_unit - len(cells))
            image = sheet(cells, side(per_sheet * per_unit), (px, px))
            self._save(image, f"{layer.media}/x{start}", self._config.photo_format)
        self._fill_thumbs(layer, rows, thumbs)
        return cell_of

    def _fill_thumbs(self, layer: _LayerInputs, rows: slice, thumbs: list[Image.Image | None]) -> None:
        """Use the crop of the best dataset example as the thumbnail of units without a feature visualization."""
        best = next((examples for examples in layer.lists if examples.name == "max"), None)
        if best is None:
            return
        for i, row in enumerate(range(rows.start, rows.stop)):
            if thumbs[i] is None:
                for example in _examples(best, row)[:1]:
                    crop = self._images.crop(layer.view, example)
                    thumbs[i] = crop and square(self._images.blurred(crop), self._sizes.thumb_px)

    def _write_shards(self, layer: _LayerInputs, rows: slice, records: list[str]) -> None:
        """Write the shards of the units' records and of the dataset images that they show."""
        slug, per_shard = layer.facts.slug, self._sizes.per_shard
        for start in range(rows.start, rows.stop, per_shard):
            stop = min(start + per_shard, rows.stop)
            indices = [examples.index[start:stop].ravel() for examples in layer.lists] or [np.zeros(0, int)]
            used = [i for i in np.unique(np.concatenate(indices)).tolist() if i >= 0]
            images = ",".join(f'"{i}":{self._image_entry(i, layer.showing.whole_images)}' for i in used)
            body = f'{{"units":[{",".join(records[start - rows.start : stop - rows.start])}],"photos":{{{images}}}}}'
            write(self._root, f"data/{slug}/u{start}.js", shard_script(f"{slug}/u{start}", body))

    def _image_entry(self, index: int, whole: bool) -> str:
        """Return the JSON of one dataset image, computed once for all units.

        It is [path, label], followed by [position, width, height, left, top, right, bottom] if the whole image is
        shown. The box is the part that was the network's input, as fractions of the image.
        """
        if (index, whole) not in self._image_entries:
            catalogue = self._catalogue
            entry: list[object] = [f"number {index}", ""]
            if index < len(catalogue.paths):
                entry = [catalogue.paths[index], catalogue.labels[index]]
            if whole:
                entry += self._table.get(index, ())
            self._image_entries[index, whole] = to_json(entry)
        return self._image_entries[index, whole]

    def _write_heat_maps(self, layer: _LayerInputs, rows: slice, heat_maps: np.ndarray) -> None:
        """Write the heat maps of the examples shown as base64 bytes, with the activations of 0 and 255."""
        ranges = layer.view.heat_ranges()
        assert ranges is not None
        slug, per_shard = layer.facts.slug, self._sizes.per_heat
        for start in range(rows.start, rows.stop, per_shard):
            stop = min(start + per_shard, rows.stop)
            lists = [examples.pair[start:stop].ravel() for examples in layer.lists] or [np.zeros(0, int)]
            pairs = np.unique(np.concatenate(lists))
            pairs = pairs[pairs >= 0]
            limits = shortest_decimals(ranges[pairs])
            entries = {
                str(pair): [*limits[i], base64.b64encode(heat_maps[pair].tobytes()).decode()]
                for i, pair in enumerate(pairs.tolist())
            }
            body = to_json({"height": heat_maps.shape[1], "width": heat_maps.shape[2], "maps": entries})
            write(self._root, f"data/{slug}/h{start}.js", shard_script(f"{slug}/h{start}", body))


def _examples(examples: ShownExamples, row: int) -> list[ExamplePlace]:
    """Return the examples of a unit in one list."""
    arrays = (examples.index, examples.y, examples.x, examples.pair, examples.crop)
    places = [ExamplePlace(*place) for place in zip(*(array[row].tolist() for array in arrays), strict=True)]
    return [place for place in places if place.index >= 0]


def choose_showing(store: str, boxes: bool, share: float, config: SiteConfig, sizes: Sizes) -> Showing:
    """Decide what is shown of the dataset images for the units of a layer.

    Args:
        store: What the atlas stores of dataset images: images, crops or ids.
        boxes: Whether the atlas stores which part of each image was the network's input.
        share: Side of the receptive field as a fraction of the input's side.
        config: Configuration of the site.
        sizes: Sizes of the site.
    """
    if config.licence == "ids" or store == "ids":
        return Showing((), False)
    if config.licence == "crop" or store == "crops" or not boxes:
        return Showing(("max", "mean", "min", "spectrum", "relevant"), False)
    # Pages cut receptive fields out of the whole images, unless they are so small that they would look coarse, or
    # whole images share files, which are slow to view one by one.
    return Showing(() if share > COARSE and sizes.per_photo == 1 else ("max", "min"), True)


def image_table(atlas: Atlas) -> dict[int, tuple[object, ...]]:
    """Return (position, width, height, left, top, right, bottom) of each dataset image shown, by its index.

    Width and height are in pixels, the box is in fractions of the image.
    """
    table: pd.DataFrame = atlas.image_geometries()
    if not len(table):
        return {}
    values = table.to_numpy(np.float64)
    width, height = values[:, 1], values[:, 2]
    boxes = np.round(values[:, 3:] / np.stack([width, height] * 2, 1), 4).tolist()
    return {int(values[row, 0]): (row, int(width[row]), int(height[row]), *box) for row, box in enumerate(boxes)}


def chunks_of(
    facts: LayerSummary, ranks: np.ndarray, strip: tuple[int, ...], wired_ranks: Mapping[str, Mapping[int, int]]
) -> list[Chunk]:
    """Return all chunks of a layer; see `Chunk` for the arguments."""
    units = len(facts.channels)
    return [
        Chunk(facts.name, facts.order, start, min(start + CHUNK, units), ranks, strip, wired_ranks)
        for start in range(0, units, CHUNK)
    ]
