"""Functions shared by all studies: medians with intervals, paired comparisons, contact sheets, and the page.

A page in docs/studies is written by hand, except for the part between `<!-- numbers -->` and `<!-- end -->`, which the
command of the study writes. The command also writes the figure NAME.jpg beside the page.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image, ImageDraw

from pipeline.compare import align, open_runs
from pipeline.compare.alignment import Comparison
from pipeline.compare.statistics import Median, PairedTest, median
from pipeline.config.schema import Config, from_tree
from pipeline.core.metric_specs import metric_named
from pipeline.store.reader import Atlas, open_atlas

NUMBERS = re.compile(r"(<!-- numbers -->\n).*?(<!-- end -->)", re.DOTALL)
SIDE = 120


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a study: tables by caption, and a figure."""

    tables: Mapping[str, pd.DataFrame]
    figure: Image.Image


def publish(report: Report, page: Path) -> None:
    """Write the tables between the markers of `page`, and the figure beside it."""
    text = "\n".join(f"{title}\n\n{markdown(table)}\n" for title, table in report.tables.items())
    written = page.read_text(encoding="utf-8")
    if not NUMBERS.search(written):
        raise SystemExit(f"{page} has no place for numbers: <!-- numbers --> … <!-- end -->")
    page.write_text(NUMBERS.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", written), encoding="utf-8")
    report.figure.save(page.with_suffix(".jpg"), quality=85)


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, without its index."""
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(map(str, row)) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def told(found: Median, digits: int = 2) -> str:
    """Format a median with the ends of its interval: 0.53 [0.48, 0.60]."""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def dueled(found: PairedTest, digits: int = 2) -> str:
    """Format a median difference with its interval, wins and losses: +0.10 [0.02, 0.20], 20 : 4."""
    at = found.difference
    return f"{at.value:+.{digits}f} [{at.low:+.{digits}f}, {at.high:+.{digits}f}], {found.wins} : {found.losses}"


def config_of(atlas: Atlas) -> Config:
    """Return the configuration of an atlas."""
    return from_tree(yaml.safe_load(atlas.config))


def compared(run: Path) -> Comparison:
    """Return the comparison of all presets of a run, unit by unit."""
    with open_runs([str(run)], root=run.parent) as contest:
        return align(contest)


def medians(found: Comparison, measures: Sequence[str]) -> pd.DataFrame:
    """Return medians over all units, one row per preset and one column per measure."""
    whole = found.all_units
    rows = []
    for at, contender in enumerate(found.contenders):
        values = {m.title: told(median(whole.of(m.name)[at]), m.digits) for m in map(metric_named, measures)}
        rows.append({"preset": f"`{contender.label}`", **values})
    return pd.DataFrame(rows)


def pairs(found: Comparison, against: str, measures: Sequence[str]) -> pd.DataFrame:
    """Return the median difference to `against` over the same units with wins : losses, one row per preset."""
    whole, labels = found.all_units, [contender.label for contender in found.contenders]
    rows = []
    for at, label in enumerate(labels):
        if label == against:
            continue
        row = {"preset": f"`{label}`"}
        for metric in map(metric_named, measures):
            one = found.paired_test(whole, metric, at, labels.index(against))
            row[metric.title] = "" if one is None else dueled(one, metric.digits)
        rows.append(row)
    return pd.DataFrame(rows)


def by_layer(found: Comparison, measure: str, digits: int = 2) -> pd.DataFrame:
    """Return the median of one measure, one row per preset and one column per layer."""
    rows = [
        {"preset": f"`{contender.label}`"}
        | {part.name: told(median(part.of(measure)[at]), digits) for part in found.layers}
        for at, contender in enumerate(found.contenders)
    ]
    return pd.DataFrame(rows)


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int = SIDE) -> Image.Image:
    """Return images (H, W, 3) uint8 as a table with titles, each resized to `side` pixels."""
    page = Image.new("RGB", (92 + len(columns) * (side + 4), 20 + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(page)
    for j, title in enumerate(columns):
        pen.text((92 + j * (side + 4), 5), title, fill="black")
    for i, (name, images) in enumerate(rows):
        pen.text((4, 20 + i * (side + 4) + side // 2), name, fill="black")
        for j, image in enumerate(images):
            small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
            page.paste(small, (92 + j * (side + 4), 20 + i * (side + 4)))
    return page


def first_units(atlas: Atlas, presets: Sequence[str], unit: int = 0, variant: int = 0) -> Image.Image:
    """Return a sheet with one unit per layer under every preset."""
    rows = [
        (f"{layer.name}:{layer.channels[unit]}", [layer.images(preset)[unit, variant] for preset in presets])
        for layer in atlas
    ]
    return sheet(presets, rows)


def contest(run: Path, against: str, measures: Sequence[str], judged: Sequence[str]) -> Report:
    """Return medians of `measures`, paired comparisons of `judged` with `against`, and one unit per layer."""
    found = compared(run)
    with open_atlas(run) as atlas:
        figure = first_units(atlas, [contender.preset for contender in found.contenders])
    units = len(found.all_units.channels)
    return Report(
        {
            f"Medians over {units} units of {len(found.layers)} layers, with their 95 % intervals:": medians(
                found, measures
            ),
            f"Difference to `{against}` over the same units, and on how many each was better:": pairs(
                found, against, judged
            ),
        },
        figure,
    )
