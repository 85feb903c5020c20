"""Print a comparison on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.compare.alignment import Comparison
from pipeline.compare.pages import MAX_PAIRED, p_text
from pipeline.compare.statistics import Median
from pipeline.core.metric_specs import Metric
from pipeline.site.number_format import number


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print medians by measure, paired tests of each contender against the first, and the main measure by layer."""
    console.print(_medians(comparison))
    for at in range(1, len(comparison.contenders)):
        console.print(_paired_tests(comparison, at))
    console.print(_layers(comparison))
    if comparison.effects:
        console.print(_effects(comparison))
    all_units = comparison.all_units
    for at, contender in enumerate(comparison.contenders):
        missing, failed = int((~all_units.rendered[at]).sum()), int(all_units.failed[at].sum())
        if missing or failed:
            console.print(
                f"{escape(contender.label)}: {missing:,} units without a feature visualization, "
                f"{failed:,} failed feature visualizations"
            )


def _medians(comparison: Comparison) -> Table:
    """Return the medians over all units: a column per contender, or with many contenders a row per contender."""
    labels = [escape(contender.label) for contender in comparison.contenders]
    all_units, title = comparison.all_units, "median over all units"
    if len(labels) > MAX_PAIRED:
        table = _table(title, *map(_name, comparison.measures))
        for at, label in enumerate(labels):
            medians = [comparison.median(all_units, measure, at) for measure in comparison.measures]
            table.add_row(label, *map(_value, medians))
        return table
    table = _table(title, *labels)
    for measure in comparison.measures:
        medians = [comparison.median(all_units, measure, at) for at in range(len(labels))]
        table.add_row(_name(measure), *map(_value_and_interval, medians))
    return table


def _paired_tests(comparison: Comparison, at: int) -> Table:
    """Return the paired tests of contender `at` against the first, by measure."""
    labels, all_units = [escape(contender.label) for contender in comparison.contenders], comparison.all_units
    table = _table(f"{labels[at]} against {labels[0]}", "pairs", "difference", "better", "worse", "equal", "p")
    for measure in comparison.measures:
        test = comparison.paired_test(all_units, measure, at, 0)
        if test is None or not test.wins + test.losses:
            continue
        counts = [f"{test.wins}", f"{test.losses}"]
        if not comparison.better(measure, at):
            counts = [f"{test.wins} more", f"{test.losses} less"]
        difference = test.difference
        table.add_row(
            _name(measure),
            str(difference.units),
            _value_and_interval(difference),
            *counts,
            str(test.ties),
            p_text(test.p),
        )
    return table


def _layers(comparison: Comparison) -> Table:
    """Return the medians of the main measure by layer."""
    labels = [escape(contender.label) for contender in comparison.contenders]
    # The intervals of many contenders would not fit; they are in summary.csv.
    cell = _value_and_interval if len(labels) <= MAX_PAIRED else _value
    table = _table(f"{comparison.main.title}, by layer", *labels, "units that all have")
    for part in comparison.layers:
        medians = [comparison.median(part, comparison.main, at) for at in range(len(labels))]
        table.add_row(escape(part.name), *map(cell, medians), str(part.shared_units))
    return table


def _effects(comparison: Comparison) -> Table:
    """Return the changes of the effects of units, by layer and pair of runs."""
    with_outputs = any(change.outputs for change in comparison.effects)
    columns = ["runs", "units", "rank correlation", "change of the mean effect", "change of the size"]
    table = _table("effects, by layer", *columns, *(["outputs that changed most"] if with_outputs else []))
    for one in comparison.effects:
        row = [f"{one.contender} − {one.against}", str(one.units), number(one.rank_correlation).text]
        row += [_value_and_interval(one.change), _value_and_interval(one.size_change)]
        outputs = ", ".join(f"{name} {number(moved).text}" for name, moved in one.outputs) or "—"
        table.add_row(escape(one.layer), *map(escape, [*row, *([outputs] if with_outputs else [])]))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _name(measure: Metric) -> str:
    return escape(measure.title) + {"higher": " ↑", "lower": " ↓"}.get(measure.better, "")


def _value(result: Median) -> str:
    return number(result.value).text


def _value_and_interval(result: Median) -> str:
    if not result.units:
        return "—"
    return f"{number(result.value).text} ({number(result.low).text} … {number(result.high).text})"
