"""Pages of a comparison site: the home page, a page for each layer, and the page that shows any unit."""

import functools
import hashlib
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.compare.alignment import Comparison, Part
from pipeline.compare.plots import Scatter, profile, scatter, strips
from pipeline.compare.runs import SHARED, RunComparison, differing_settings
from pipeline.compare.statistics import LEVEL, Median, PairedTest
from pipeline.core.metric_specs import Metric
from pipeline.site import pages as site_pages
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.hosting.hosts import HEADERS
from pipeline.site.number_format import number
from pipeline.site.output import write
from pipeline.site.pages import environment, unit_link

HERE = Path(__file__).parent
SHARED_STATIC = ("atlas.css", "theme.js", "core.js", "magnifier.js", "icon.svg", "icon.png")
COMPARE_STATIC = ("compare.css", "order.js", "grid.js", "unit.js")
# With more contenders than this, each is compared with the first one only, because all pairs would be too many.
MAX_PAIRED = 4

# (first contender, second contender, [(measure, test of second against first, which direction is better)])
Pairing = tuple[str, str, list[tuple[Metric, PairedTest, int]]]


@functools.cache
def code() -> str:
    """Return a digest of this package's code and static files; it makes the files of another version differ in name."""
    digest = hashlib.sha256()
    sources = sorted(p for p in HERE.rglob("*") if p.suffix in (".py", ".js", ".css", ".html"))
    for path in (*sources, *(site_pages.HERE / "static" / name for name in SHARED_STATIC)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Pages:
    """Writer of the pages of a comparison below `root`."""

    def __init__(
        self,
        root: Path,
        inputs: RunComparison,
        comparison: Comparison,
        facts: Sequence[LayerSummary],
        config: SiteConfig,
        identity: str,
    ) -> None:
        self._root = root
        self._inputs = inputs
        self._comparison = comparison
        self._facts = facts
        self._environment = environment(config, HERE / "templates", site_pages.HERE / "templates")
        self._environment.filters["signed"] = lambda value: f"{'+' if value > 0 else ''}{number(value).text}"
        self._environment.filters["p_text"] = p_text
        self._environment.globals.update(
            version=identity[:8],
            comparison=comparison,
            contenders=comparison.contenders,
            level=round(100 * LEVEL),
        )

    def write_static(self) -> None:
        """Write the stylesheets, scripts, icon and the files that web hosts read."""
        (self._root / "static").mkdir(exist_ok=True)
        for folder, names in ((site_pages.HERE, SHARED_STATIC), (HERE, COMPARE_STATIC)):
            for name in names:
                shutil.copyfile(folder / "static" / name, self._root / "static" / name)
        write(self._root, ".nojekyll", "")
        write(self._root, "_headers", HEADERS)

    def write(self) -> None:
        """Write all pages."""
        comparison, all_units = self._comparison, self._comparison.all_units
        attributes = self._inputs.first.attributes
        shared = [(word, str(attributes.get(key) or "none")) for key, word in SHARED.items()]
        table, pairings, main = self._table(all_units), self._pairings(all_units), comparison.main.name
        self._render(
            "index.html",
            "index.html",
            root="",
            part=all_units,
            table=table,
            main_table=[row for row in table if row[0].name == main],
            pairings=pairings,
            main_pairings=[(a, b, [row for row in rows if row[0].name == main]) for a, b, rows in pairings],
            medians=self._medians(),
            profile=profile(comparison),
            scatters=self._scatters(comparison.layers, ""),
            missing=self._missing(all_units),
            differing_settings=differing_settings(comparison.contenders),
            shared=shared,
            href={facts.name: facts.href for facts in self._facts},
        )
        self._render("unit.html", "unit.html", root="", shared=shared)
        for i, (part, facts) in enumerate(zip(comparison.layers, self._facts, strict=True)):
            self._render(
                "layer.html",
                facts.href,
                root="../",
                part=part,
                facts=facts,
                before=self._facts[i - 1] if i > 0 else None,
                after=self._facts[i + 1] if i + 1 < len(self._facts) else None,
                table=self._table(part),
                pairings=self._pairings(part),
                scatters=self._scatters([part], "../"),
                strips=strips(comparison, part),
                missing=self._missing(part),
            )

    def _table(self, part: Part) -> list[tuple[Metric, list[Median]]]:
        """Return the medians of all contenders by measure, for measures that at least one contender has here."""
        comparison = self._comparison
        contenders = range(len(comparison.contenders))
        rows = [(m, [comparison.median(part, m, at) for at in contenders]) for m in comparison.measures]
        return [(m, medians) for m, medians in rows if any(median.units for median in medians)]

    def _pairings(self, part: Part) -> list[Pairing]:
        """Return the paired tests of all pairs, or with many contenders of the pairs with the first one."""
        comparison = self._comparison
        count = len(comparison.contenders)
        pairs = combinations(range(count), 2) if count <= MAX_PAIRED else ((0, at) for at in range(1, count))
        pairings: list[Pairing] = []
        for first, second in pairs:
            rows = []
            for measure in comparison.measures:
                test = comparison.paired_test(part, measure, second, first)
                # A measure that is equal for all units, such as the number of steps, is not worth a row.
                if test is not None and test.wins + test.losses:
                    rows.append((measure, test, comparison.better(measure, first)))
            pairings.append((comparison.contenders[first].label, comparison.contenders[second].label, rows))
        return pairings

    def _medians(self) -> list[tuple[str, list[Median]]]:
        """Return the medians of the main measure by layer."""
        comparison = self._comparison
        contenders = range(len(comparison.contenders))
        return [
            (part.name, [comparison.median(part, comparison.main, at) for at in contenders])
            for part in comparison.layers
        ]

    def _scatters(self, parts: Sequence[Part], root: str) -> list[Scatter]:
        """Return scatter plots of the main measure, each contender against the first one."""

        def link(layer: str, channel: int) -> str:
            return root + unit_link(layer, channel)

        others = range(1, min(len(self._comparison.contenders), 1 + MAX_PAIRED))
        plots = [scatter(self._comparison, parts, 0, other, link) for other in others]
        return [plot for plot in plots if plot is not None]

    def _missing(self, part: Part) -> list[tuple[str, int, int]]:
        """Return (label, units without a visualization, failed ones) of contenders for which either is above zero."""
        missing, failed = (~part.rendered).sum(1).tolist(), part.failed.sum(1).tolist()
        labels = [contender.label for contender in self._comparison.contenders]
        return [(label, m, f) for label, m, f in zip(labels, missing, failed, strict=True) if m or f]

    def _render(self, template: str, to: str, **context: Any) -> None:
        write(self._root, to, self._environment.get_template(f"compare/{template}").render(**context))


def p_text(p: float) -> str:
    """Format a p value."""
    if p != p:
        return "—"
    if p < 0.0001:
        return "< 0.0001"
    return f"{p:.4f}" if p < 0.01 else f"{p:.2f}"
