"""Pages and static files of a site, rendered from templates."""

import hashlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from pipeline.core.metric_specs import METRICS
from pipeline.site.config import SiteConfig
from pipeline.site.context.families import Family
from pipeline.site.context.home import Home
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.data.api import table_name
from pipeline.site.hosting.hosts import HEADERS, POLICY
from pipeline.site.media.chunks import STRIP_PX, SUFFIX
from pipeline.site.media.size_budget import Sizes
from pipeline.site.media.sprites import side
from pipeline.site.number_format import number
from pipeline.site.output import write

HERE = Path(__file__).parent
STATIC = (
    *("atlas.css", "icon.svg", "core.js", "layer.js", "map.js", "missing.js"),
    *("magnifier.js", "pixels.js", "lightbox.js", "unit.js"),
)


class Pages:
    """Writer of pages below `root`. All values from the atlas are HTML-escaped."""

    def __init__(self, root: Path, config: SiteConfig, groups: Sequence[Family], version: str) -> None:
        self._root = root
        self._config = config
        self._groups = groups
        self._environment = environment(config, HERE / "templates")
        self._environment.globals.update(
            version=_version(version),
            groups=groups,
            unit_link=unit_link,
            table=table_name(),
            strip_px=STRIP_PX,
            strip=config.strip,
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
        self._render(
            "layer.html", facts.href, root="../", home=home, facts=facts, before=before, after=after, sheets=sheets
        )

    def write_others(self, home: Home, mapped: bool) -> None:
        """Write all other pages; `mapped` is whether the atlas has a map."""
        self._render("index.html", "index.html", root="", home=home)
        self._render("unit.html", "unit.html", root="", home=home)
        self._render("map.html", "map.html", root="", home=home, mapped=mapped)
        self._render("method.html", "method.html", root="", home=home)
        self._render("families.html", "families.html", root="", home=home)
        for family in self._groups:
            self._render("family.html", family.href, root="../", home=home, family=family)
        self._render("404.html", "404.html", home=home)

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
    templates.globals.update(title=config.title, policy=POLICY, suffix=SUFFIX[config.format])
    templates.globals["titles"] = {metric.name: metric.title for metric in METRICS}
    return templates


def _version(content: str) -> str:
    """Return a short digest of the contents and static files; as part of addresses it invalidates browser caches."""
    static = hashlib.sha256(content.encode())
    for name in STATIC:
        static.update((HERE / "static" / name).read_bytes())
    return static.hexdigest()[:8]


def unit_link(layer: str, channel: int) -> str:
    """Return the address of a unit's page, from the site's root: `unit.html#layer:channel`."""
    return f"unit.html#{quote(layer, safe='/.:')}:{channel}"
