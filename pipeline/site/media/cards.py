"""Preview images of shared links, 1200 × 630 pixels: of a unit, a layer and the home page."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.data.multiband import to_display_image
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.context.unit_text import SEPARATOR, UnitText, unit_texts
from pipeline.site.media.photo_crops import DatasetImages, ExamplePlace
from pipeline.site.media.size_budget import encode
from pipeline.site.media.sprites import square
from pipeline.site.output import write
from pipeline.store.reader import Atlas, LayerView

WIDTH, HEIGHT = 1200, 630
MARGIN, GAP = 32, 16
EXAMPLES = 4
# Units on the card of a layer or of the home page.
TILES = 8
QUALITY = 68
GROUND, INK, SOFT = (20, 19, 18), (236, 233, 226), (168, 163, 153)
# Font sizes in pixels, the largest first: a text takes the first that it fits in.
SIZES = (44, 38, 32, 28, 24, 20)
CACHE_SIDE = 2 * HEIGHT // 5


class CardImages:
    """Images of units for cards: visualizations, and crops of dataset images as far as `site.licence` shows them."""

    def __init__(self, atlas: Atlas, config: SiteConfig) -> None:
        self._examples = None if config.licence == "ids" else DatasetImages(atlas, CACHE_SIDE, config.licence == "blur")

    def visualization(self, layer: LayerView, facts: LayerSummary, row: int) -> Image.Image | None:
        """Return the first visualization of a unit as RGB, or None if it has none."""
        for rendered in facts.rendered:
            status = layer.measurements(rendered.key, ("status",))["status"][row]
            for variant, outcome in enumerate(status):
                if outcome != "missing":
                    return to_display_image(layer.stack(rendered.key)[row, variant]).convert("RGB")
        return None

    def examples(self, layer: LayerView, row: int, count: int = EXAMPLES) -> list[Image.Image]:
        """Return crops of the dataset examples of a unit with the highest activations, at most `count`."""
        best = layer.examples("max")
        if self._examples is None or best is None:
            return []
        columns = (array[row, :count].tolist() for array in (best.index, best.y, best.x, best.map, best.crop))
        places = [ExamplePlace(*place) for place in zip(*columns, strict=True)]
        crops = [self._examples.crop(layer, place) for place in places if place.index >= 0]
        return [self._examples.blurred(crop) for crop in crops if crop is not None]

    def first(self, layer: LayerView, facts: LayerSummary, row: int) -> Image.Image | None:
        """Return the first visualization of a unit, or else its best dataset example."""
        image = self.visualization(layer, facts, row)
        return image or next(iter(self.examples(layer, row, 1)), None)


class CardWriter:
    """Writer of the cards of units and layers below `root`; keeps the text of the last layer."""

    def __init__(self, atlas: Atlas, root: Path, config: SiteConfig) -> None:
        self.images = CardImages(atlas, config)
        self._root = root
        self._atlas = atlas
        self._model = str(atlas.attributes.get("model", ""))
        self._texts: tuple[str, list[UnitText]] = ("", [])

    @cached_property
    def _catalogue(self) -> Catalogue:
        """Paths and labels of the dataset, which only the texts of units need."""
        return Catalogue.of(self._atlas)

    def write_units(self, layer: LayerView, facts: LayerSummary, rows: slice) -> None:
        """Write the card of each unit in `rows`."""
        if self._texts[0] != facts.name:
            self._texts = facts.name, unit_texts(layer, facts, self._catalogue, self._model)
        for row in range(rows.start, rows.stop):
            text = self._texts[1][row]
            card = unit_card(text, self.images.visualization(layer, facts, row), self.images.examples(layer, row))
            self.save(card, text.card)

    def write_layer(self, layer: LayerView, facts: LayerSummary, rows: Sequence[int], to: str) -> None:
        """Write the card of a layer to `to`: its name and the units in `rows`."""
        tiles = [self.images.first(layer, facts, row) for row in rows[:TILES]]
        counted = f"{facts.total:,} units" if facts.complete else f"{len(facts.channels):,} of {facts.total:,} units"
        self.save(tiled_card(facts.name, SEPARATOR.join(filter(None, (self._model, counted))), tiles), to)

    def save(self, card: Image.Image, to: str) -> None:
        """Write a card to `to`, as JPEG."""
        write(self._root, to, encode(card, "jpeg", QUALITY))


def unit_card(text: UnitText, image: Image.Image | None, examples: Sequence[Image.Image]) -> Image.Image:
    """Return the card of a unit: its visualization, four dataset examples, and a sentence."""
    card = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(card)
    large = HEIGHT - 2 * MARGIN
    left = MARGIN
    if image is not None:
        card.paste(square(image, large, Image.Resampling.BICUBIC), (MARGIN, MARGIN))
        left += large + MARGIN
    small = 184
    room = large - (2 * small + 2 * GAP) if examples else large
    lines = [(text.name, INK), (text.word, INK), (text.model, SOFT), (text.finding, SOFT)]
    _write(draw, (left, MARGIN, WIDTH - MARGIN, MARGIN + room), lines)
    top = HEIGHT - MARGIN - 2 * small - GAP
    for i, example in enumerate(examples[:EXAMPLES]):
        at = (left + (i % 2) * (small + GAP), top + (i // 2) * (small + GAP))
        card.paste(square(example, small, Image.Resampling.BICUBIC), at)
    return card


def tiled_card(title: str, subtitle: str, tiles: Sequence[Image.Image | None]) -> Image.Image:
    """Return a card with a title, a subtitle and up to eight images in two rows; those that are None are left out."""
    card = Image.new("RGB", (WIDTH, HEIGHT), GROUND)
    draw = ImageDraw.Draw(card)
    shown = [tile for tile in tiles if tile is not None][:TILES]
    side = (WIDTH - 2 * MARGIN - 3 * GAP) // 4 if len(shown) <= 4 else (HEIGHT - 2 * MARGIN - 120 - GAP) // 2
    _write(draw, (MARGIN, MARGIN, WIDTH - MARGIN, MARGIN + 110), [(title, INK), (subtitle, SOFT)])
    for i, tile in enumerate(shown):
        left = MARGIN + (i % 4) * (WIDTH - 2 * MARGIN - side) // 3
        card.paste(square(tile, side, Image.Resampling.BICUBIC), (left, MARGIN + 120 + (i // 4) * (side + GAP)))
    return card


def _write(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], texts: Sequence[tuple[str, tuple[int, int, int]]]
) -> None:
    """Write texts (text, color) below each other into a box, in the largest size in which all of them fit."""
    width, height = box[2] - box[0], box[3] - box[1]
    for size in SIZES:
        font = ImageFont.load_default(size)
        lines = [(line, color) for text, color in texts if text for line in _wrapped(text, font, width)]
        fits = all(font.getlength(line) <= width for line, _ in lines)
        if (fits and len(lines) * size * 1.25 <= height) or size == SIZES[-1]:
            for i, (line, color) in enumerate(lines[: max(1, int(height // (size * 1.25)))]):
                draw.text((box[0], box[1] + round(i * size * 1.25)), line, fill=color, font=font)
            return


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text at spaces into lines of at most `width` pixels; a longer word is a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
