"""A static web site from an atlas: one page for the network, one for each layer, and no server needed.

    import pipeline
    from pipeline.site import SiteConfig, build_site
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        build_site(atlas, Path("runs/efficientnet_lite0-distill/site"), SiteConfig())

The site is plain files that open from disk as well as from any web host. It asks nothing of other hosts.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from pipeline.atlas import Atlas
from pipeline.site.folder import replacing, weigh
from pipeline.site.media import Media
from pipeline.site.overview import Overview
from pipeline.site.pages import Pages
from pipeline.site.photos import Photos
from pipeline.site.sheets import neighbours, sheet_of
from pipeline.site.units import Catalogue, units_of


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """What the site looks like. Sizes are in pixels; `picture_quality` is WebP's, 0 to 100.

    `examples` is the most photographs shown of one unit, `strip` the number of pictures that stand for a
    layer on the first page.
    """

    title: str = "Neuron Atlas"
    picture_quality: int = 85
    example_px: int = 96
    examples: int = 8
    strip: int = 8


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """What was written: files and their bytes, and how many layers, units and pictures they show."""

    files: int
    bytes: int
    layers: int
    units: int
    pictures: int


def build_site(
    atlas: Atlas,
    folder: Path,
    config: SiteConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SiteReport:
    """Write the site of `atlas` to `folder`, in place of the site that may be there.

    The new site is written beside `folder` and takes its place when it is finished; until then, and after
    any error, the old one stands. `progress` hears (units done, units in all) after every unit. One layer is
    held in memory at a time. The same atlas and configuration give the same bytes.

    Raises `AtlasError` if `folder` holds something that is no site of ours.
    """
    layers = [(layer.name, len(layer.channels)) for layer in atlas]
    total = sum(count for _, count in layers)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    with replacing(folder) as new:
        media = Media(new, config.picture_quality, config.example_px, max(1, config.examples))
        photos = Photos(atlas, config.example_px)
        catalogue = Catalogue.of(atlas)
        overview = Overview.of(atlas, folder, config.title, config.strip)
        pages = Pages(new, config.title)
        pages.write_static(media.stylesheet)
        for layer, (before, after) in zip(atlas, neighbours(atlas), strict=True):
            units = units_of(layer, catalogue, media, photos, config.examples, tick)
            sheet = sheet_of(layer, before, after)
            pages.write_layer(sheet, units)
            overview.add(sheet, units)
        pages.write_home(overview)
        pages.write_index(overview)
        files, size = weigh(new)
    return SiteReport(files, size, len(layers), total, overview.pictures)
