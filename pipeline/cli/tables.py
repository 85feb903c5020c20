"""Tables of the command line."""

import sys
from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.core.formatting import clock
from pipeline.planning.plan import Plan

# Columns of the table of a plan, by heading.
PLAN_COLUMNS = {
    "layer": "layer",
    "kind": "kind",
    "channels": "channels",
    "map": "map",
    "receptive field": "receptive_field",
    "units": "units",
    "canvas": "canvas",
}


def console(width: int) -> Console:
    """Return a console for standard output: of the terminal's width, or of `width` columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def print_plan(plan: Plan) -> None:
    """Print the layers of a plan, the totals by kind, and the estimated time."""
    output = console(120)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in (*PLAN_COLUMNS, "time"):
        table.add_column(name, justify="left" if name in ("layer", "kind") else "right", no_wrap=name == "layer")
    frame = plan.table()
    rows = frame.to_dict("records")
    layer_seconds: defaultdict[str, float] = defaultdict(float)
    preset_seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        layer_seconds[row["layer"]] += row["seconds"]
        preset_seconds[row["preset"]] += row["seconds"]
    main = frame[frame["preset"] == plan.config.render.name]
    for row in rows[: len(main)]:
        table.add_row(*(str(row[key]) for key in PLAN_COLUMNS.values()), clock(layer_seconds[row["layer"]]))
    output.print(table)
    for kind, part in main.groupby("kind", sort=False):
        output.print(f"{kind}: {len(part)} layers, {part['channels'].sum():,} channels, {part['units'].sum():,} units")
    presets = plan.config.rendered_presets
    for preset in presets if len(presets) > 1 else ():
        count = sum(len(row.channels) for row in plan.rows if row.preset == preset.name) * preset.variants
        output.print(f"{preset.name}: {count:,} visualizations, {clock(preset_seconds[preset.name])}")
    objectives = dict.fromkeys(str(row["objective"]) for row in rows if row["objective"])
    for objective in objectives if len(objectives) > 1 else ():
        names = list(dict.fromkeys(str(row["layer"]) for row in rows if row["objective"] == objective))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
        output.print(f"objective {objective}: {shown}", soft_wrap=True)
    images = len(plan.setup.dataset.images)
    output.print(f"total: {len(plan.layers)} layers, {plan.units:,} units, {images:,} dataset images")
    for line in plan.outlook():
        output.print(line, soft_wrap=True)


def print_pairs(rows: Sequence[tuple[str, str]], title: str) -> None:
    """Print places, and what was found or done there under `title`."""
    table = Table("where", title, box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    console(160).print(table)
