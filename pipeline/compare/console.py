"""A comparison on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.compare.alignment import Comparison
from pipeline.compare.metric_names import Measure
from pipeline.compare.pages import FEW, chance
from pipeline.compare.statistics import Median
from pipeline.site.number_format import number


def show(found: Comparison, console: Console) -> None:
    """Medians by measure, each contender against the first, and the main measure by layer."""
    every = found.whole
    labels = [escape(contender.label) for contender in found.contenders]
    count = range(len(labels))
    # Beside each other as long as they fit; a great many are a list, and their intervals are in summary.csv.
    told = _median if len(labels) <= FEW else _plain
    medians = _table("median over all units", *labels)
    if len(labels) > FEW:
        medians = _table("median over all units", *map(_name, found.measures))
        for at in count:
            medians.add_row(labels[at], *(told(found.median(every, m, at)) for m in found.measures))
    else:
        for measure in found.measures:
            medians.add_row(_name(measure), *(told(found.median(every, measure, at)) for at in count))
    console.print(medians)
    for other in count[1:]:
        duels = _table(f"{labels[other]} against {labels[0]}", "pairs", "difference", "better", "worse", "equal", "p")
        for measure in found.measures:
            duel = found.duel(every, measure, other, 0)
            if duel is None or not duel.wins + duel.losses:
                continue
            counts = (
                (duel.wins, duel.losses)
                if found.better(measure, other)
                else (f"{duel.wins} more", f"{duel.losses} less")
            )
            numbers = (duel.difference.units, _median(duel.difference), *counts, duel.ties, chance(duel.p))
            duels.add_row(_name(measure), *map(str, numbers))
        console.print(duels)
    layers = _table(f"{found.main.title}, by layer", *labels, "units that all have")
    for part in found.layers:
        row = [told(found.median(part, found.main, at)) for at in count]
        layers.add_row(escape(part.name), *row, str(int(part.there.all(0).sum())))
    console.print(layers)
    for at, contender in enumerate(found.contenders):
        lacking, failed = int((~every.there[at]).sum()), int(every.failed[at].sum())
        if lacking or failed:
            console.print(f"{escape(contender.label)}: {lacking:,} units without a picture, {failed:,} failed pictures")


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _name(measure: Measure) -> str:
    return escape(measure.title) + {"higher": " ↑", "lower": " ↓"}.get(measure.better, "")


def _plain(found: Median) -> str:
    return number(found.value).text


def _median(found: Median) -> str:
    if not found.units:
        return "—"
    return f"{number(found.value).text} ({number(found.low).text} … {number(found.high).text})"
