"""Pages and static files of a site, from templates."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from pipeline.site.overview import Overview
from pipeline.site.sheets import Sheet
from pipeline.site.units import Unit

HERE = Path(__file__).parent
STATIC = ("atlas.css", "atlas.js", "icon.svg")


class Pages:
    """Writer of pages below `root`. Everything that comes from an atlas is escaped."""

    def __init__(self, root: Path, title: str) -> None:
        self._root = root
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["thousands"] = lambda count: f"{count:,}"
        self._environment.globals["title"] = title

    def write_static(self, cells: str) -> None:
        """Stylesheets, script and icon; `cells` is the stylesheet of the strips."""
        folder = self._root / "static"
        folder.mkdir()
        for name in STATIC:
            # Bytes only: a site's permissions should not hang on how the package was installed.
            shutil.copyfile(HERE / "static" / name, folder / name)
        self._write("static/cells.css", cells)
        # GitHub Pages leaves out files whose names begin with `~` or `_` unless this one is there.
        self._write(".nojekyll", "")

    def write_home(self, overview: Overview) -> None:
        """The first page."""
        self._render("index.html", "index.html", root="", overview=overview)

    def write_layer(self, sheet: Sheet, units: Sequence[Unit]) -> None:
        """The page of one layer."""
        self._render("layer.html", sheet.href, root="../", sheet=sheet, units=units)

    def write_index(self, overview: Overview) -> None:
        """What the jump box knows: a script, because pages opened from disk may not fetch data.

        Layers are [name, page, [[first, last], …] of the channels], classes [name, layer's place, channel].
        """
        index = {
            "layers": [[c.sheet.name, c.sheet.href, _runs(c.sheet.channels)] for c in overview.cards],
            "classes": overview.classes,
        }
        # ASCII only, and no way to end a script element, should anybody paste it into a page.
        text = json.dumps(index, separators=(",", ":")).replace("<", "\\u003c")
        self._write("static/layers.js", f"window.NEURON_ATLAS={text};\n")

    def _render(self, template: str, to: str, **context: Any) -> None:
        self._write(to, self._environment.get_template(template).render(**context))

    def _write(self, to: str, text: str) -> None:
        path = self._root / to
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _runs(channels: Sequence[int]) -> list[list[int]]:
    """Channels as [first, last] runs: [0, 1, 2, 5] → [[0, 2], [5, 5]]."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][1] + 1:
            runs[-1][1] = channel
        else:
            runs.append([channel, channel])
    return runs
