"""What makes a site shareable: preview images, a page with an address for each unit, sitemap.xml, and the home’s wall.

All of it depends on settings that change no other file, such as the title and the address of the site.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.data.multiband import to_display_image
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Catalogue, LayerSummary
from pipeline.site.context.unit_text import UnitText, layer_card, unit_texts
from pipeline.site.context.wall import WALL_PX, WALL_UNITS, Wall
from pipeline.site.data.js_shards import to_json
from pipeline.site.data.links import HOME_CARD, absolute
from pipeline.site.media.cards import TILES, CardWriter, tiled_card
from pipeline.site.media.size_budget import encode
from pipeline.site.media.sprites import square
from pipeline.site.output import write
from pipeline.store.reader import Atlas

# Estimated size of a card and of a unit's page in bytes.
CARD_BYTES, PAGE_BYTES = 55_000, 4_000
# Addresses in one sitemap file, at most (https://www.sitemaps.org/protocol.html).
SITEMAP_ADDRESSES = 50_000
# The wall is encoded at this much lower quality, as its images are small.
QUALITY_STEP = 8
SITEMAP_SPACE = 'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'


@dataclasses.dataclass(frozen=True)
class Extent:
    """Which pages and images for sharing a site has.

    Attributes:
        pages: Whether each unit has a page for sharing.
        unit_cards: Whether each unit has a card.
        layer_cards: Whether each layer and the home page have a card.
    """

    pages: bool
    unit_cards: bool
    layer_cards: bool

    @staticmethod
    def of(config: SiteConfig, units: int) -> "Extent":
        """Return the extent for a number of units.

        Raises:
            AtlasError: If a card and a page for each unit were requested and exceed the largest number of files.
        """
        if config.cards == "all" and 2 * units > config.max_files:
            raise AtlasError(
                f"site.cards=all makes {2 * units:,} files for {units:,} units, and site.max_files is "
                f"{config.max_files:,}. Use site.cards=layers, or raise site.max_files if the host takes more files."
            )
        pages = config.cards == "all" or (config.cards == "layers" and units <= config.max_files // 3)
        return Extent(pages, config.cards == "all", config.cards != "none")

    def files(self, layers: int, units: int) -> int:
        """Return the number of files for sharing, without those of the sitemap."""
        wall = 2 * max(WALL_UNITS, min(layers, 20))
        return units * (self.pages + self.unit_cards) + (layers + 1) * self.layer_cards + wall

    def bytes(self, layers: int, units: int) -> int:
        """Return the estimated size of these files."""
        cards = units * self.unit_cards + (layers + 1) * self.layer_cards
        return cards * CARD_BYTES + units * self.pages * PAGE_BYTES


def copied_bytes(atlas: Atlas, config: SiteConfig) -> int:
    """Return the size of the file of the atlas if it is to be copied into the site, else 0.

    Raises:
        AtlasError: If the file alone exceeds the largest size of the site.
    """
    if not config.copy_atlas:
        return 0
    size = atlas.path.stat().st_size
    if size > config.max_bytes:
        raise AtlasError(
            f"site.copy_atlas=true: {atlas.path.name} has {size:,} bytes, and site.max_bytes is {config.max_bytes:,}. "
            "Put the file elsewhere and set site.atlas_url to its address."
        )
    return size


class Sharing:
    """Writer of everything for sharing below `root`."""

    def __init__(self, atlas: Atlas, root: Path, config: SiteConfig, layers: Sequence[LayerSummary]) -> None:
        self._atlas = atlas
        self._root = root
        self._config = config
        self._layers = layers
        self._model = str(atlas.attributes.get("model", "")) or config.title
        self.extent = Extent.of(config, sum(len(facts.channels) for facts in layers))

    @cached_property
    def _cards(self) -> CardWriter:
        return CardWriter(self._atlas, self._root, self._config)

    def write_layer_card(self, facts: LayerSummary, rows: Sequence[int]) -> None:
        """Write the card of a layer, with the units in `rows`."""
        if self.extent.layer_cards:
            view = self._atlas[facts.name].with_cache()
            self._cards.write_layer(view, facts, rows, layer_card(facts.slug))

    def write_wall(self, wall: Wall, quality: int) -> None:
        """Write the images of the wall, each in two sizes, and the card of the home page."""
        images: list[Image.Image] = []
        for unit in wall.units:
            facts = self._layers[unit.layer]
            image = to_display_image(self._atlas[facts.name].stack(facts.rendered[0].key)[unit.row, 0]).convert("RGB")
            images.append(image)
            for px, to in zip(WALL_PX, unit.files, strict=False):
                side = min(px, *image.size)
                data = encode(
                    square(image, side, Image.Resampling.LANCZOS),
                    self._config.format,
                    max(1, quality - QUALITY_STEP),
                )
                write(self._root, to, data)
        if self.extent.layer_cards:
            # Units at equal distances, so that the card shows the whole network.
            chosen = [images[i * len(images) // TILES] for i in range(TILES)] if len(images) > TILES else images
            self._cards.save(tiled_card(self._config.title, self._model, chosen), HOME_CARD)

    def texts(self, facts: LayerSummary, catalogue: Catalogue) -> list[UnitText]:
        """Return the text of each unit of a layer."""
        return unit_texts(self._atlas[facts.name].with_cache(), facts, catalogue, self._model)

    def card_of(self, facts: LayerSummary, text: UnitText) -> str:
        """Return the address of the card that the page of a unit names; "" without cards."""
        if self.extent.unit_cards:
            return text.card
        return layer_card(facts.slug) if self.extent.layer_cards else ""

    def write_sitemap(self, pages: Sequence[str]) -> None:
        """Write sitemap.xml with the addresses of all pages, if the address of the site is known."""
        url = self._config.url
        if url is None:
            return
        day = str(self._atlas.attributes.get("created", ""))[:10]
        changed = f"<lastmod>{escape(day)}</lastmod>" if day else ""

        def listing(kind: str, item: str, addresses: Sequence[str]) -> str:
            lines = (f"<{item}><loc>{escape(absolute(url, to))}</loc>{changed}</{item}>" for to in addresses)
            head = f'<?xml version="1.0" encoding="UTF-8"?>\n<{kind} {SITEMAP_SPACE}>'
            return "\n".join([head, *lines, f"</{kind}>\n"])

        parts = [pages[i : i + SITEMAP_ADDRESSES] for i in range(0, len(pages), SITEMAP_ADDRESSES)]
        if len(parts) == 1:
            write(self._root, "sitemap.xml", listing("urlset", "url", parts[0]))
            return
        names = [f"sitemap-{number}.xml" for number in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            write(self._root, name, listing("urlset", "url", part))
        write(self._root, "sitemap.xml", listing("sitemapindex", "sitemap", names))


def structured_data(text: UnitText, card: str, config: SiteConfig, dataset: str) -> str:
    """Return the description of a unit for search engines, as JSON-LD (https://schema.org/CreativeWork).

    Args:
        text: The unit.
        card: Address of its card from the root of the site; "" if it has none.
        config: Settings of the site; without its address, the description has no addresses.
        dataset: Title of the atlas.
    """
    url = config.url
    described: Mapping[str, object] = {
        "@context": "https://schema.org",
        "@type": "CreativeWork",
        "name": text.title,
        "description": text.description,
        "isPartOf": {"@type": "Dataset", "name": dataset, **({"url": absolute(url, "")} if url else {})},
        **({"url": absolute(url, text.page), "mainEntityOfPage": absolute(url, text.page)} if url else {}),
        **({"image": absolute(url, card)} if url and card else {}),
        **({"creator": {"@type": "Person", "name": config.author}} if config.author else {}),
    }
    return to_json(described)
