"""Pages of a compare site: the whole, each layer, and the one that shows any unit."""

import functools
import hashlib
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.compare.alignment import Comparison, Part
from pipeline.compare.metric_names import Measure
from pipeline.compare.plots import profile, scatter, strips
from pipeline.compare.runs import SHARED, RunComparison, unlike
from pipeline.compare.statistics import LEVEL, Median
from pipeline.site import pages as main
from pipeline.site.config import SiteConfig
from pipeline.site.context.layer_summary import Facts
from pipeline.site.hosting.hosts import HEADERS
from pipeline.site.number_format import number
from pipeline.site.output import write
from pipeline.site.pages import environment, unit_link

HERE = Path(__file__).parent
SHARED_STATIC = ("atlas.css", "core.js", "icon.svg")
OWN_STATIC = ("compare.css", "order.js", "grid.js", "lens.js", "unit.js")
# A plot for each pair would drown the page where there are many contenders: each is held against the first then.
FEW = 4


@functools.cache
def code() -> str:
    """Digest of the package's own code and static files: what another version would make otherwise has another name."""
    digest = hashlib.sha256()
    own = sorted(p for p in HERE.rglob("*") if p.suffix in (".py", ".js", ".css", ".html"))
    for path in (*own, *(main.HERE / "static" / name for name in SHARED_STATIC)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Pages:
    """Writer of the pages of `found` below `root`."""

    def __init__(
        self,
        root: Path,
        contest: RunComparison,
        found: Comparison,
        facts: Sequence[Facts],
        config: SiteConfig,
        identity: str,
    ) -> None:
        self._root = root
        self._contest = contest
        self._found = found
        self._facts = facts
        self._environment = environment(config, HERE / "templates", main.HERE / "templates")
        self._environment.filters["signed"] = lambda value: f"{'+' if value > 0 else ''}{number(value).text}"
        self._environment.filters["chance"] = chance
        self._environment.globals.update(
            version=identity[:8],
            found=found,
            contenders=found.contenders,
            level=round(100 * LEVEL),
        )

    def write_static(self) -> None:
        """Stylesheets, scripts, icon, and what hosts look for."""
        (self._root / "static").mkdir(exist_ok=True)
        for folder, names in ((main.HERE, SHARED_STATIC), (HERE, OWN_STATIC)):
            for name in names:
                shutil.copyfile(folder / "static" / name, self._root / "static" / name)
        write(self._root, ".nojekyll", "")
        write(self._root, "_headers", HEADERS)

    def write(self) -> None:
        """All pages."""
        found, every = self._found, self._found.whole
        shared = [(word, str(self._contest.first.attributes.get(key) or "none")) for key, word in SHARED.items()]
        self._render(
            "index.html", "index.html", root="",
            part=every, table=self._table(every), duels=self._duels(every), medians=self._medians(),
            profile=profile(found), scatters=self._scatters(found.layers, ""), missing=self._missing(every),
            unlike=unlike(found.contenders), shared=shared, href={f.name: f.href for f in self._facts},
        )  # fmt: skip
        self._render("unit.html", "unit.html", root="", shared=shared)
        for i, (part, facts) in enumerate(zip(found.layers, self._facts, strict=True)):
            around = [self._facts[j] if 0 <= j < len(self._facts) else None for j in (i - 1, i + 1)]
            self._render(
                "layer.html", facts.href, root="../",
                part=part, facts=facts, before=around[0], after=around[1], table=self._table(part),
                duels=self._duels(part), scatters=self._scatters([part], "../"), strips=strips(found, part),
                missing=self._missing(part),
            )  # fmt: skip

    def _table(self, part: Part) -> list[tuple[Measure, list[Median]]]:
        """Medians of all contenders by each measure that any of them has here."""
        found = self._found
        rows = [(m, [found.median(part, m, at) for at in range(len(found.contenders))]) for m in found.measures]
        return [(m, medians) for m, medians in rows if any(median.units for median in medians)]

    def _duels(self, part: Part) -> list[tuple[str, str, list[Any]]]:
        """(first, second, [(measure, duel)]): second against first, of every pair; of many, of those with the first."""
        found = self._found
        count = len(found.contenders)
        pairs = combinations(range(count), 2) if count <= FEW else ((0, other) for other in range(1, count))
        told = []
        for one, other in pairs:
            rows = [(m, found.duel(part, m, other, one), found.better(m, one)) for m in found.measures]
            # What is the same for all units, the number of steps perhaps, is no contest.
            rows = [(m, duel, better) for m, duel, better in rows if duel is not None and duel.wins + duel.losses]
            told.append((found.contenders[one].label, found.contenders[other].label, rows))
        return told

    def _medians(self) -> list[tuple[str, list[Median]]]:
        """The main measure's medians by layer."""
        found = self._found
        count = range(len(found.contenders))
        return [(part.name, [found.median(part, found.main, at) for at in count]) for part in found.layers]

    def _scatters(self, parts: Sequence[Part], root: str) -> list[Any]:
        found = self._found
        link = lambda layer, channel: root + unit_link(layer, channel)  # noqa: E731
        others = range(1, min(len(found.contenders), 1 + FEW))
        drawn = [scatter(found, parts, 0, other, link) for other in others]
        return [plot for plot in drawn if plot is not None]

    def _missing(self, part: Part) -> list[tuple[str, int, int]]:
        """(contender, units without a picture, failed pictures) of those that lack or failed any."""
        counts = zip(self._found.contenders, (~part.there).sum(1).tolist(), part.failed.sum(1).tolist(), strict=True)
        return [(contender.label, lacking, failed) for contender, lacking, failed in counts if lacking or failed]

    def _render(self, template: str, to: str, **context: Any) -> None:
        write(self._root, to, self._environment.get_template(f"compare/{template}").render(**context))


def chance(p: float) -> str:
    """A p value as people write it."""
    if p != p:
        return "—"
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.01 else f"{p:.2f}"
