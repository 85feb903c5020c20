"""The page of a study, written from its plan and its runs alone, its figure, and the index of all studies."""

import dataclasses
import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from analysis import OPEN, WORDS, Result, analyze, medians, number
from PIL import Image, ImageDraw
from plan import Plan, plan_names, read_plan, settings_digest
from values import Runs, own_code, table_of

from pipeline.store.reader import open_atlas

PAGES = Path(__file__).resolve().parents[2] / "docs" / "studies"
SIDE = 120
# Remarks are written by hand between these marks; everything else on a page is generated.
REMARKS = re.compile(r"<!-- remarks -->\n(.*?)<!-- end -->\n", re.DOTALL)
DIGEST = re.compile(r"<!-- settings (\w+)(?: with (.*?))? -->")
STALE = (
    "> **The settings of this study have changed since this page was made**: the command gives other numbers now.\n\n"
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a page is written from.

    Attributes:
        name: Name of the study.
        plan: Its plan.
        results: The tests of its hypotheses.
        table: The values, one row for each image.
        excluded: Number of excluded units.
        minutes: Duration of the optimization of all images; without arms, of the runs, interrupted calls included.
        settings: The user's settings that change results.
        further: Further tables by caption, from the study's own code.
    """

    name: str
    plan: Plan
    results: Mapping[str, Result]
    table: pd.DataFrame
    excluded: int
    minutes: float = 0.0
    settings: Sequence[str] = ()
    further: Mapping[str, pd.DataFrame] = dataclasses.field(default_factory=dict)


# What a number of an arm is the average of, by the cluster of the tests.
AVERAGES = {
    "layer": "Mean over layers of each layer's median, with 95 % intervals "
    "(two-stage bootstrap over layers and units):",
    "channel": "Mean over classes, with 95 % intervals (bootstrap over classes):",
}


def report(name: str, plan: Plan, runs: Runs, minutes: float, settings: Sequence[str]) -> Report:
    """Return the report of a study from its runs."""
    table, excluded, optimization = table_of(name, plan, runs)
    module = own_code(name)
    further = module.tables(runs, table) if module is not None and hasattr(module, "tables") else {}
    if plan.arms:
        # Of the images themselves: a study is often continued, beside other work.
        minutes = optimization
    return Report(name, plan, analyze(plan, table), table, excluded, minutes, settings, further)


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, without its index."""
    lines = [" | ".join(map(str, table.columns)), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(map(str, row)) for row in table.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def shown_effect(result: Result, value: float) -> str:
    """Return an effect as a signed difference, a factor or a correlation."""
    if math.isnan(value):
        return "–"
    if result.hypothesis.scale == "ratio":
        return f"× {number(math.exp(value))}"
    return f"{'+' if value >= 0 else '−'}{number(abs(value))}"


def hypotheses_table(report: Report) -> pd.DataFrame:
    """Return one row for each hypothesis: effects, intervals, corrected p value, power and verdict."""
    rows = []
    for key, result in report.results.items():
        effect, hypothesis = result.effect, result.hypothesis
        interval = (
            ""
            if math.isnan(effect.low)
            else f" [{shown_effect(result, effect.low)}, {shown_effect(result, effect.high)}]"
        )
        parts = ", ".join(shown_effect(result, part.value) for part in result.networks.values())
        least = "–" if math.isnan(result.detectable) else shown_effect(result, result.detectable).lstrip("+")
        minimal = f"× {number(1 + hypothesis.minimal)}" if hypothesis.scale == "ratio" else number(hypothesis.minimal)
        rows.append(
            {
                "": key,
                "measure": hypothesis.measure.replace("_", " "),
                "effect [95 %]": shown_effect(result, effect.value) + interval,
                "by network": parts,
                "minimal": minimal,
                "found in 80 %": least,
                "p (Holm)": "–" if math.isnan(result.p) else f"{result.p:.3f}" if result.p >= 0.001 else "< 0.001",
                "verdict": result.verdict,
            }
        )
    return pd.DataFrame(rows)


def finding(report: Report) -> str:
    """Return the finding: one sentence for each hypothesis, without numbers."""
    return " ".join(result.sentence for result in report.results.values())


def sample(report: Report) -> str:
    """Return the sentence about what was measured."""
    table, plan = report.table, report.plan
    counts = table.groupby("network")[["layer", "channel"]].apply(lambda part: len(part.drop_duplicates()))
    layers = table.groupby("network")["layer"].nunique()
    units = ", ".join(
        f"{counts[name]} {plan.unit_name} in {counted(layers[name], 'layer')} of {name}" for name in counts.index
    )
    parts = [units]
    if plan.arms:
        runs = sum(map(plan.is_seed, plan.conditions))
        starts = f"{plan.seeds} images of each from {runs} seeds" if runs else f"{plan.seeds} seeds each"
        parts.append(starts + (f", {len(table):,} images" if plan.unit_name == "units" else ""))
    parts.append(f"{counted(report.excluded, 'unit')} excluded (silent on the dataset, or an image failed)")
    parts.append(f"{report.minutes:.0f} minutes" + (" of optimization" if plan.arms else ""))
    return "; ".join(parts) + "."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_page(report: Report, page: Path, figure: Image.Image) -> None:
    """Write a page and its figure NAME.jpg beside it; remarks that the page has already are kept."""
    plan, name = report.plan, report.name
    old = REMARKS.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    given = " ".join(report.settings)
    command = f"scripts/study {name}" + (" data=folder data.root=$HOME/photographs" if plan.photographs else "")
    hypotheses = "\n".join(f"- **{key}**: {result.hypothesis.statement}." for key, result in report.results.items())
    findings = "\n".join(f"- **{key}**: {result.sentence}" for key, result in report.results.items())
    parts = [
        f"# {plan.title}",
        f"<!-- settings {settings_digest(plan, report.settings)}{' with ' + given if given else ''} -->",
        plan.question,
        f"```bash\n{command}\n```",
        "## Finding", findings,
        f"![{plan.title}]({page.stem}.jpg)", f"*{plan.figure.caption.strip()}*",
        "## Background", plan.background.strip(),
        "## Method", plan.method.strip(), "Measured: " + sample(report),
        "## Hypotheses", hypotheses, markdown(hypotheses_table(report)),
        "## Numbers",
        AVERAGES[plan.cluster],
        markdown(medians(plan, report.table)),
    ]  # fmt: skip
    for caption, table in report.further.items():
        parts += [caption, markdown(table)]
    parts += ["## Limits", plan.limits.strip()]
    remarks = old[1] if old else "\n"
    parts += [f"<!-- remarks -->\n{remarks}<!-- end -->"]
    made = datetime.date.today().isoformat()
    parts += [f"Made on {made} by the plan [{name}.yaml](../../scripts/studies/plans/{name}.yaml)."]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure.save(page.with_suffix(".jpg"), quality=85)


def draw_figure(report: Report, runs: Runs) -> Image.Image:
    """Return the figure: that of the study's own code, or a sheet of one unit per layer under every arm."""
    module, plan = own_code(report.name), report.plan
    if module is not None and hasattr(module, "draw"):
        return module.draw(runs, report.table)
    network = plan.figure.network or plan.network_names[0]
    own = report.table[report.table["network"] == network]
    arms = plan.figure.arms or tuple(dict.fromkeys(own["arm"]))
    images: dict[tuple[str, int, str], list[np.ndarray]] = {}
    names: dict[tuple[str, int], str] = {}
    for condition in plan.conditions:
        with open_atlas(runs[network, condition]) as atlas:
            for layer, channel in shown_units(plan, own):
                for preset in plan.arms:
                    arm = plan.arm_name(condition, preset)
                    if arm in arms and (layer, channel, arm) not in images:
                        view = atlas[layer]
                        # Where a row of the table is not a unit, the first unit of the layer is shown.
                        at = list(view.channels).index(channel) if channel in view.channels else 0
                        names[layer, channel] = f"{layer}:{view.channels[at]}"
                        images[layer, channel, arm] = list(view.images(preset)[at, : plan.figure.variants])
    rows = [
        (names[layer, channel], [image for arm in arms for image in images[layer, channel, arm]])
        for layer, channel in shown_units(plan, own)
    ]
    titles = [arm if i == 0 else "" for arm in arms for i in range(plan.figure.variants)]
    return sheet(titles, rows)


def shown_units(plan: Plan, table: pd.DataFrame) -> list[tuple[str, int]]:
    """Return the units of the figure: the first of each layer, or six classes. They are not chosen by looks."""
    if plan.cluster == "channel":
        classes = table[["layer", "channel"]].drop_duplicates()
        return [(str(layer), int(channel)) for layer, channel in classes.iloc[::5].itertuples(index=False)]
    return [(str(layer), int(part["channel"].iloc[0])) for layer, part in table.groupby("layer", sort=False)]


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]], side: int = SIDE) -> Image.Image:
    """Return images (H, W, 3) uint8 as a table with titles, each resized to `side` pixels."""
    page = Image.new("RGB", (140 + len(columns) * (side + 4), 20 + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(page)
    for j, title in enumerate(columns):
        pen.text((140 + j * (side + 4), 5), title[:20], fill="black")
    for i, (name, images) in enumerate(rows):
        pen.text((4, 20 + i * (side + 4) + side // 2), name, fill="black")
        for j, image in enumerate(images):
            small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
            page.paste(small, (140 + j * (side + 4), 20 + i * (side + 4)))
    return page


def mark_stale(page: Path, plan: Plan) -> bool:
    """Say on a page that the settings have changed since it was made, or take that back; return whether they have."""
    text = page.read_text(encoding="utf-8")
    found = DIGEST.search(text)
    if not found:
        return False
    stale = found[1] != settings_digest(plan, (found[2] or "").split())
    clean = text.replace(STALE, "")
    written = clean.replace(found[0], f"{found[0]}\n\n{STALE.rstrip()}", 1) if stale else clean
    if written != text:
        page.write_text(written, encoding="utf-8")
    return stale


def index_row(name: str) -> str:
    """Return the row of the index: number, question with a link, findings and strength of the evidence."""
    plan, page = read_plan(name), PAGES / f"{name}.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if not DIGEST.search(text):
        link = f"[{plan.title}]({name}.md)" if text else plan.title
        return (
            f"| {plan.number} | {link} | {'first edition, with former settings' if text else 'planned, not run'} | – |"
        )
    section = text.partition("## Finding\n")[2].partition("\n![")[0]
    sentences = [line.partition(": ")[2] for line in section.splitlines() if line.startswith("- ")]
    undecided = sum(line.startswith(WORDS[OPEN]) for line in sentences)
    evidence = f"{len(sentences) - undecided} of {len(sentences)} decided" + (
        "; settings changed since" if STALE in text else ""
    )
    return f"| {plan.number} | [{plan.title}]({name}.md) | {' '.join(sentences)} | {evidence} |"


def write_index() -> None:
    """Rewrite the table of docs/studies/README.md between its marks."""
    page = PAGES / "README.md"
    rows = "\n".join(["| | question | answer | evidence |", "|---|---|---|---|", *map(index_row, plan_names())])
    text = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(r"(<!-- index -->\n).*?(\n<!-- end -->)", lambda m: m[1] + rows + m[2], text, flags=re.DOTALL),
        encoding="utf-8",
    )
