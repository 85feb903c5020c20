"""Compare all presets of conf/render on the same units, as measured and as other networks see them.

scripts/bench presets [--model NAME] [--judges NAMES] [--presets NAMES] [--units 5] [--classes 20] [--out DIR]
    [key=value …]

Two runs with all presets: five channels in each of six layers, and twenty classes, drawn by a seed (none with
--classes 0). The median of each number of `atlas.units()` is given for hidden units and for classes, with the share of
images whose contrast and chroma lie between the 10th and the 90th percentile of dataset images, and the share of
classes that come first in the other networks. `oygard` runs without heads on hidden units. Images are measured after
saving in 8 bits; seconds are those of one core, in batches of 8. Results in --out: NAME.md, the contact sheet NAME.jpg
and two runs, with presets.csv (one row per image). A second call continues, also with more presets.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

import pipeline
from pipeline.cli.main import main as atlas

# Baseline, single remedies, their combination, then all others.
ORDER = (
    "naive", "tv", "blur_image", "blur_gradient", "decorrelated_only", "robust_only", "distill", "fast", "best",
    "lucid", "maco", "natural", "image_prior", "accentuate", "weight_noise", "oygard", "neuron", "diverse", "negative",
)  # fmt: skip
LAYERS = 6
HIDDEN, CLASSES = "Hidden units", "Classes"
# Presets that do not ask what a class looks like: its lowest logit.
NOT_OF_CLASSES = ("negative",)
# Columns of `atlas.units()` and their titles, for the medians.
MEDIANS = {
    "peak_ratio": "peak ratio",
    "mean_ratio": "mean ratio",
    "robust_share": "robust share",
    "path_ratio": "path ÷ natural",
    "contrast": "contrast",
    "chroma": "chroma",
    "saturation": "saturation",
    "seconds": "seconds",
}
LOW, HIGH = 0.1, 0.9


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def classes(count: int, total: int = 1000) -> list[int]:
    """Return the classes of the comparison, drawn by a seed of their own."""
    return sorted(random.Random("scripts/bench presets").sample(range(total), count))


def table(units: pd.DataFrame, judges: Sequence[str]) -> pd.DataFrame:
    """Return one row for each preset from rows for each image; those of units that failed are only counted."""
    rows = []
    for name, images in units.groupby("preset", sort=False):
        own = images[images["status"] != "failed"]
        row: dict[str, object] = {"preset": name}
        row |= {title: own[column].median() for column, title in MEDIANS.items() if column in own}
        for look in ("contrast", "chroma"):
            quantile = own[f"{look}_quantile"]
            row[f"{look} in 10–90 %"] = quantile.between(LOW, HIGH).sum() / quantile.notna().sum()
        for judge in judges:
            rank = own.get(f"{judge}.rank")
            if rank is not None and rank.notna().any():
                row[f"first in {judge}"] = (rank == 1).sum() / rank.notna().sum()
            quantile = own.get(f"{judge}.quantile")
            if quantile is not None and quantile.notna().any():
                row[f"quantile in {judge}"] = quantile.median()
        rows.append(row | {"failed": len(images) - len(own), "images": len(images)})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers with two decimals."""
    lines = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(folders: Mapping[str, Path], presets: Sequence[str], side: int = 160) -> Image.Image:
    """Return the middle channel of every layer and every seventh class under every preset, one row for each preset."""
    columns: list[tuple[str, dict[str, np.ndarray]]] = []
    for title, folder in folders.items():
        with pipeline.open_atlas(folder) as opened:
            for layer in opened:
                count = len(layer.channels)
                for i in range(0, count, 7) if title == CLASSES else [count // 2]:
                    shown = {name: layer.images(name)[i, 0] for name in presets if name in layer.presets}
                    columns.append((f"{layer.name}:{layer.channels[i]}", shown))
    page = Image.new("RGB", (110 + len(columns) * (side + 4), 20 + len(presets) * (side + 4)), "white")
    draw = ImageDraw.Draw(page)
    for j, (unit, shown) in enumerate(columns):
        draw.text((112 + j * (side + 4), 4), unit, fill="black")
        for i, name in enumerate(presets):
            draw.text((4, 20 + i * (side + 4)), name, fill="black")
            if name in shown:
                small = Image.fromarray(shown[name]).resize((side, side), Image.Resampling.LANCZOS)
                page.paste(small, (110 + j * (side + 4), 20 + i * (side + 4)))
    return page


def run(out: Path, name: str, presets: Sequence[str], arguments: Sequence[str]) -> Path:
    """Make one atlas with all presets; return its folder."""
    given = [f"render={presets[0]}", f"also=[{','.join(presets[1:])}]", f"run.root={out}", f"run.name={name}"]
    given.append("run.update=true")  # another call may add presets
    if atlas(["run", *given, *arguments]) not in (0, 1):
        raise SystemExit("atlas run failed")
    return out / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--judges", default="efficientnet_lite1,efficientnet_lite2")
    parser.add_argument("--presets", default=",".join(ORDER))
    parser.add_argument("--units", type=int, default=5, help="channels in each layer")
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/presets"))
    options, settings = parser.parse_known_args()
    presets, judges = options.presets.split(","), options.judges.split(",")
    shared = [f"model={options.model}", f"judges=[{options.judges}]", *settings]
    tour = ["layers=tour", f"layers.count={LAYERS + 1}", f"layers.channels=spread:{options.units}"]
    if "oygard" in presets:  # its heads predict classes
        tour.append("render/schedule@also.oygard.schedule=blur")
    tour.append("layers.exclude=[classifier]")
    folders = {HIDDEN: run(options.out, f"{options.model}-units", presets, [*shared, *tour])}
    if options.classes:
        drawn = ",".join(map(str, classes(options.classes)))
        logits = [*shared, "layers=logits", f"layers.channels=[{drawn}]"]
        of_classes = [name for name in presets if name not in NOT_OF_CLASSES]
        folders[CLASSES] = run(options.out, f"{options.model}-classes", of_classes, logits)
    text = []
    for title, folder in folders.items():
        with pipeline.open_atlas(folder) as opened:
            units = opened.units()
        units.to_csv(folder / "presets.csv", index=False)
        text.append(f"{title} of {options.model}\n\n{markdown(table(units, judges))}\n")
    (options.out / f"{options.model}.md").write_text("\n".join(text))
    sheet(folders, presets).save(options.out / f"{options.model}.jpg", quality=88)
    say("\n".join(text))


if __name__ == "__main__":
    main()
