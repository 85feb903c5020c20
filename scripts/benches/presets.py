"""Compare all presets of conf/render on the same units: activation ratio, high frequencies, time.

scripts/bench presets [folder=runs/presets] [key=value …]     the table, as Markdown and CSV, and a contact sheet

Default: 4 channels in each of 5 layers of the default network, the sample images, all presets in one run. `oygard` runs
without auxiliary classifiers (render/schedule=blur), which only GoogLeNet has. Ratios are to the best dataset image by
the same statistic: the mean over the map, the maximum for `neuron`, the lowest mean for `negative`. Images are measured
after saving in 8 bits; seconds are those of one core, in batches of 8.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

import pipeline
from pipeline.cli.main import main
from pipeline.images.image_regularizers import HighFrequency

LAYERS = "[blocks.1.0,blocks.2.0,blocks.3.0,blocks.4.0,blocks.5.3]"
SHOWN = ("blocks.3.0", "blocks.5.3")
# Baseline, single remedies, their combination, then all others.
ORDER = (
    "naive", "tv", "blur_image", "blur_gradient", "decorrelated_only", "robust_only", "distill", "fast", "best",
    "lucid", "maco", "image_prior", "weight_noise", "oygard", "neuron", "diverse", "negative",
)  # fmt: skip


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def roughness(images: np.ndarray) -> np.ndarray:
    """Return the share of energy about the mean above 0.25 cycles per pixel, (N,), for uint8 images (N, H, W, C)."""
    plain = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    plain = plain - plain.mean(dim=(2, 3), keepdim=True)
    energy = HighFrequency(cutoff=0.25).value(plain, plain) / plain.pow(2).sum(dim=(1, 2, 3)).clamp(min=1e-12)
    return energy.numpy()


def measured(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table with one row per preset, and the median activation ratio by layer (rows) and preset."""
    with pipeline.open_atlas(folder) as atlas:
        units = atlas.units()
        rough = []
        for layer in atlas:
            for preset in layer.presets:
                images = layer.images(preset)[()]
                rough.append(roughness(images.reshape(-1, *images.shape[2:])))
        units["rough"] = np.concatenate(rough)
    units["held"] = units["robust"] / units["activation"]
    units["ratio"] = (units["activation"] / units["natural"]).where(units["activation"] * units["natural"] > 0)
    rows = []
    for name in ORDER:
        own = units[units["preset"] == name]
        rows.append(
            {
                "preset": name,
                "achieved ÷ natural, median": round(float(own["ratio"].median()), 2),
                "achieved ÷ natural, mean": round(float(own["ratio"].mean()), 2),
                "robust ÷ achieved, median": round(float(own["held"].median()), 2),
                "energy above ¼ cycle/px": round(float(own["rough"].mean()), 3),
                "seconds a picture": round(float(own["seconds"].mean()), 2),
                "failed": int((own["status"] == "failed").sum()),
                "pictures": len(own),
            }
        )
    layers = units.pivot_table("ratio", "layer", "preset", "median", sort=False)[list(ORDER)]
    return pd.DataFrame(rows), layers.round(2)


def sheet(folder: Path, side: int = 160, columns: int = 5) -> Image.Image:
    """Return the first channel of two layers under every preset, with captions."""
    with pipeline.open_atlas(folder) as atlas:
        pairs = [[atlas[layer].images(name)[0, 0] for layer in SHOWN] for name in ORDER]
        titles = [f"{layer}:{atlas[layer].channels[0]}" for layer in SHOWN]
    lines = -(-len(pairs) // columns)
    page = Image.new("RGB", (columns * (2 * side + 16) + 8, lines * (side + 26) + 24), "white")
    draw = ImageDraw.Draw(page)
    draw.text((8, 4), f"each preset: {', '.join(titles)}", fill="black")
    for i, (name, pair) in enumerate(zip(ORDER, pairs, strict=True)):
        x, y = 8 + (i % columns) * (2 * side + 16), 22 + (i // columns) * (side + 26)
        for j, image in enumerate(pair):
            small = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
            page.paste(small, (x + j * (side + 2), y))
        draw.text((x, y + side + 3), name, fill="black")
    return page


if __name__ == "__main__":
    given = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith("folder="))
    where = Path(given.get("folder", "runs/presets"))
    arguments = [
        f"render={ORDER[0]}", f"also=[{','.join(ORDER[1:])}]", "render/schedule@also.oygard.schedule=blur",
        "layers=blocks", f"layers.include={LAYERS}", "layers.channels=spread:4",
        f"run.root={where.parent}", f"run.name={where.name}",
        *(a for a in sys.argv[1:] if not a.startswith("folder=")),
    ]  # fmt: skip
    if main(["run", *arguments]) not in (0, 1):
        raise SystemExit("atlas run failed")
    table, layers = measured(where)
    table.to_csv(where / "presets.csv", index=False)
    sheet(where).save(where / "presets.jpg", quality=88)
    say("| " + " | ".join(table.columns) + " |\n" + "|---" * len(table.columns) + "|")
    for row in table.itertuples(index=False):
        say("| " + " | ".join(map(str, row)) + " |")
    say(f"\nachieved ÷ natural, median by layer\n{layers.T.to_string()}")
    say(f"{where / 'presets.csv'}, {where / 'presets.jpg'}")
