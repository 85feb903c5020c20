"""Pages and static files of a site, rendered from templates."""

import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
from markupsafe import Markup

from pipeline.core.metric_specs import METRICS
from pipeline.site.config import SiteConfig
from pipeline.site.context.families import Family
from pipeline.site.context.home import Home
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.context.unit_text import UnitText, layer_card, unit_link
from pipeline.site.context.wall import WALL_PX
from pipeline.site.data.activation_atlas import preview_size
from pipeline.site.data.api import table_name
from pipeline.site.data.links import HOME_CARD, absolute, atlas_title
from pipeline.site.hosting.hosts import HEADERS, OWN_IMAGE_POLICY, POLICY
from pipeline.site.media.chunks import STRIP_PX, SUFFIX
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.number_format import number
from pipeline.site.output import write
from pipeline.site.sharing import structured_data

HERE = Path(__file__).parent
STATIC = (
    *("atlas.css", "icon.svg", "icon.png", "theme.js", "core.js", "layer.js", "map.js", "missing.js", "share.js"),
    *("magnifier.js", "pixels.js", "lightbox.js", "listing.js", "units.js", "unit.js", "pinned.js", "embed.js"),
    *("class.js", "wires.js", "circuit.js", "activation-atlas.js", "resample.js", "own-image.js"),
)


class Pages:
    """Writer of pages below `root`. All values from the atlas are HTML-escaped."""

    def __init__(
        self, root: Path, config: SiteConfig, groups: Sequence[Family], version: str, own_image: str = ""
    ) -> None:
        self._root = root
        self._config = config
        self._groups = groups
        self._own_image = own_image
        self.addresses: list[str] = []
        self._environment = environment(config, HERE / "templates")
        self._environment.globals.update(
            version=_version(version),
            groups=groups,
            unit_link=unit_link,
            table=table_name(),
            strip_px=STRIP_PX,
            strip=config.strip,
            url=config.url,
            absolute=lambda path: absolute(config.url, path),
            wall_px=WALL_PX[0],
            own_image=own_image,
            preview_size=preview_size,
            home_card=HOME_CARD if config.cards != "none" else "",
        )

    def write_static(self) -> None:
        """Write the stylesheet, scripts, icon and the files that web hosts read."""
        for name in STATIC:
            # copyfile copies no permissions: those of the site must not depend on how the package was installed.
            (self._root / "static").mkdir(exist_ok=True)
            shutil.copyfile(HERE / "static" / name, self._root / "static" / name)
        # Without this file, GitHub Pages omits files whose names begin with `~` or `_`.
        write(self._root, ".nojekyll", "")
        write(self._root, "_headers", HEADERS)

    def write_layer(
        self, home: Home, facts: LayerSummary, before: LayerSummary | None, after: LayerSummary | None, sizes: Sizes
    ) -> None:
        """Write the page of one layer, with links to the layers before and after it."""
        units, per_sheet, px = len(facts.channels), sizes.per_thumb, sizes.thumb_px
        sheets = []
        for start in range(0, units, per_sheet):
            stop = min(start + per_sheet, units)
            rows = math.ceil((stop - start) / side(per_sheet))
            source = f"media/{facts.slug}/a{start}.{SUFFIX[self._config.format]}"
            sheets.append((source, side(per_sheet) * px, rows * px, facts.channels[start], facts.channels[stop - 1]))
        card = layer_card(facts.slug) if self._config.cards != "none" else ""
        self._render_page(
            "layer.html", facts.href, home=home, facts=facts, before=before, after=after, sheets=sheets, card=card
        )

    def write_activation_atlas(self, home: Home, facts: LayerSummary) -> None:
        """Write the page of the activation atlas of a layer."""
        self._render_page("activation_atlas.html", facts.atlas_href, home=home, facts=facts)

    def write_others(self, home: Home, mapped: bool, classes: int, wired: bool) -> None:
        """Write all other pages.

        Args:
            home: What the home page shows.
            mapped: Whether the atlas has a map.
            classes: The number of its classes.
            wired: Whether it has connections between units.
        """
        if wired:
            self._render_page("circuit.html", "circuit.html", home=home)
        if classes:
            self._render_page("class.html", "class.html", home=home)
        if self._own_image:
            self._render_page("own-image.html", "own-image.html", home=home, policy=OWN_IMAGE_POLICY)
        self._render_page("index.html", "index.html", home=home)
        self._render_page("unit.html", "unit.html", home=home)
        self._render_page("pinned.html", "pinned.html", home=home)
        self._render_page("embed.html", "embed.html", home=home)
        self._render_page("map.html", "map.html", home=home, mapped=mapped)
        self._render_page("method.html", "method.html", home=home)
        self._render_page("families.html", "families.html", home=home)
        for family in self._groups:
            self._render_page("family.html", family.href, home=home, family=family)
        # Its address is known only if that of the site is.
        base = f"{urlsplit(self._config.url).path.rstrip('/')}/" if self._config.url else None
        self._render("404.html", "404.html", home=home, base=base)

    def write_unit(self, text: UnitText, card: str, facts: LayerSummary, home: Home) -> None:
        """Write the page of a unit that links to it can be shared from; `card` is the address of its preview image."""
        data = structured_data(text, card, self._config, atlas_title(home.attributes, self._config))
        self._render("share.html", text.page, unit=text, card=card, facts=facts, data=Markup(data))
        self.addresses.append(text.page)

    def _render_page(self, template: str, to: str, **context: Any) -> None:
        """Write a page with the head that all pages share."""
        self._render(template, to, root="../" * to.count("/"), address=to, **context)
        # These pages show nothing without the names of units.
        if to not in ("unit.html", "pinned.html", "embed.html", "circuit.html"):
            self.addresses.append(to)

    def _render(self, template: str, to: str, **context: Any) -> None:
        write(self._root, to, self._environment.get_template(template).render(**context))


def environment(config: SiteConfig, *folders: Path) -> jinja2.Environment:
    """Return an autoescaping template environment for `folders`, with the values that all pages use."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["thousands"] = lambda count: f"{count:,}"
    templates.filters["number"] = lambda value: number(value).text
    templates.globals.update(title=config.title, policy=POLICY, suffix=SUFFIX[config.format], own_image="")
    templates.globals["titles"] = {metric.name: metric.title for metric in METRICS}
    return templates


def _version(content: str) -> str:
    """Return a short digest of the contents and static files; as part of addresses it invalidates browser caches."""
    static = hashlib.sha256(content.encode())
    for name in STATIC:
        static.update((HERE / "static" / name).read_bytes())
    return static.hexdigest()[:8]
