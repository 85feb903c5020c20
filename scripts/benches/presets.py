"""Every preset of conf/render on the same units: what it reaches, how rough it is, how long it takes.

scripts/bench presets [folder=runs/presets] [key=value …]     the table, as Markdown and CSV, and a contact sheet

Default: 4 channels of each of 5 layers of the default network, its own photographs. `oygard` runs without its heads
(render/schedule=blur), which only GoogLeNet has. Ratios are to the best photograph by the same measure; `neuron` is
held against maxima. Pictures are measured after saving in 8 bits.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

import pipeline
from pipeline.cli import main
from pipeline.penalties import HighFrequency

LAYERS = "[blocks.1.0,blocks.2.0,blocks.3.0,blocks.4.0,blocks.5.3]"
UNIT = ("blocks.3.0", 0)
# In the order of the story: the problem, one remedy at a time, both, and what else there is.
ORDER = (
    "naive", "tv", "blur_image", "blur_gradient", "decorrelated_only", "robust_only", "distill", "lucid", "maco",
    "image_prior", "weight_noise", "oygard", "neuron", "diverse", "negative",
)  # fmt: skip


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def roughness(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 → (N,) share of the energy about the mean that lies above 0.25 cycles a pixel."""
    plain = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    plain = plain - plain.mean(dim=(2, 3), keepdim=True)
    energy = HighFrequency(cutoff=0.25).value(plain, plain) / plain.pow(2).sum(dim=(1, 2, 3)).clamp(min=1e-12)
    return energy.numpy()


def measure(folder: Path, more: list[str]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One row a preset, and the pictures of `UNIT` by preset."""
    rows, shown = [], {}
    natural: dict[tuple[str, int], dict[str, float]] = {}
    for name in ORDER:
        extra = ["render/schedule=blur"] if name == "oygard" else []
        arguments = [
            f"render={name}", *extra, "layers=blocks", f"layers.include={LAYERS}", "layers.channels=spread:4",
            f"run.root={folder}", f"run.name={name}", *more,
        ]  # fmt: skip
        # The photographs are looked at once, unless pictures begin with them.
        verb = "examples" if not natural else "run" if name == "image_prior" else "render"
        for step in dict.fromkeys((verb, "render")):
            if main([step, *arguments]) not in (0, 1):
                raise SystemExit(f"{name}: atlas {step} failed")
        with pipeline.open_atlas(folder / name) as atlas:
            units, images = atlas.units(), {}
            for layer in atlas:
                if not natural.get((layer.name, int(layer.channels[0]))) and layer.stats():
                    stats = layer.stats()
                    for row, channel in enumerate(map(int, layer.channels)):
                        natural[layer.name, channel] = {
                            "mean": float(stats["best_mean"][row]), "max": float(stats["max"][row])
                        }  # fmt: skip
                for row, channel in enumerate(map(int, layer.channels)):
                    images[layer.name, channel] = layer.pictures()[row]
        measure = "max" if name == "neuron" else "mean"
        best = np.array([natural[key][measure] for key in zip(units["layer"], units["channel"], strict=True)])
        ratio, held = units["activation"] / best, units["robust"] / units["activation"]
        rough = np.concatenate([roughness(stack) for stack in images.values()])
        good = best > 0
        rows.append(
            {
                "preset": name,
                "achieved ÷ natural, median": round(float(ratio[good].median()), 2),
                "achieved ÷ natural, mean": round(float(ratio[good].mean()), 2),
                "robust ÷ achieved, median": round(float(held.median()), 2),
                "energy above ¼ cycle/px": round(float(rough.mean()), 3),
                "seconds a picture": round(float(units["seconds"].mean()), 2),
                "failed": int((units["status"] == "failed").sum()),
                "pictures": len(units),
            }
        )
        shown[name] = next(iter(images[key] for key in images if key[0] == UNIT[0]))[0]
        say(str(rows[-1]))
    return pd.DataFrame(rows), shown


def sheet(shown: dict[str, np.ndarray], side: int = 192, columns: int = 5) -> Image.Image:
    """One picture a preset with its name below."""
    lines = -(-len(shown) // columns)
    page = Image.new("RGB", (columns * (side + 8) + 8, lines * (side + 28) + 8), "white")
    for i, (name, image) in enumerate(shown.items()):
        x, y = 8 + (i % columns) * (side + 8), 8 + (i // columns) * (side + 28)
        page.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        ImageDraw.Draw(page).text((x, y + side + 3), name, fill="black")
    return page


if __name__ == "__main__":
    given = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith("folder="))
    where = Path(given.get("folder", "runs/presets"))
    table, pictures = measure(where, [a for a in sys.argv[1:] if not a.startswith("folder=")])
    table.to_csv(where / "presets.csv", index=False)
    sheet(pictures).save(where / "presets.jpg", quality=88)
    say("| " + " | ".join(table.columns) + " |\n" + "|---" * len(table.columns) + "|")
    for row in table.itertuples(index=False):
        say("| " + " | ".join(map(str, row)) + " |")
    say(f"{where / 'presets.csv'}, {where / 'presets.jpg'}")
