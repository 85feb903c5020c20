"""Measure whether a diversity term makes a unit's visualizations differ more than random starts alone, and its cost.

scripts/bench diversity [folder=runs/diversity] [key=value …]

Default: 10 channels of blocks.5.1 of the default network, four visualizations each, `render=diverse` against the same
preset without its batch term. Measured on the saved 8-bit images: mean pairwise cosine of the Gram matrices at a later
layer, which the term does not see, and at the unit's layer, which it lowers by construction; and activation. Writes
diversity.csv, and diversity.jpg: one unit per row, plain left, diverse right.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

import pipeline
from pipeline.cli.main import main
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import LayersConfig, list_layers
from pipeline.models.loading import Model, ModelConfig, load_model
from pipeline.visualization.batch_terms import gram_cosine

LAYER = "blocks.5.1"
# The layer that decides: the term compares maps of `LAYER`.
JUDGE = "blocks.6.0"


def cosines(model: Model, layer: Layer, images: np.ndarray) -> float:
    """Return the mean cosine of all pairs of Gram matrices, for the uint8 images (V, H, W, C) of one unit."""
    with capture(model, [layer]) as forward, torch.no_grad():
        maps = forward(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)[layer.name]
    cosine = gram_cosine(maps[None])[0]
    count = len(images)
    return float((cosine.sum() - cosine.trace()) / (count * (count - 1)))


def measure(folder: Path, more: list[str]) -> tuple[pd.DataFrame, Image.Image]:
    model = load_model(ModelConfig("package", "efficientnet_lite0")).to("cpu")
    by_name = {la.name: la for la in list_layers(model, LayersConfig("blocks"), {})}
    rows: dict[int, dict[str, float]] = {}
    strips: dict[int, list[np.ndarray]] = {}
    for name, extra in (("plain", ["render/couplings=[]"]), ("diverse", [])):
        arguments = [
            "render", "render=diverse", *extra, "layers=blocks", f"layers.include=[{LAYER}]",
            "layers.channels=spread:10", f"run.root={folder}", f"run.name={name}", *more,
        ]  # fmt: skip
        if main(arguments) not in (0, 1):
            raise SystemExit(f"{name}: atlas render failed")
        with pipeline.open_atlas(folder / name) as atlas:
            view = atlas[LAYER]
            activation = view.measurements()["activation"]
            for row, channel in enumerate(map(int, view.channels)):
                images = view.images()[row]
                rows.setdefault(channel, {"channel": channel}).update(
                    {
                        f"cosine, {name}": cosines(model, by_name[JUDGE], images),
                        f"cosine at {LAYER}, {name}": cosines(model, by_name[LAYER], images),
                        f"activation, {name}": activation[row].mean(),
                    }
                )
                strips.setdefault(channel, []).append(np.concatenate(list(images), 1))
    side = 8
    lines = [np.concatenate([a, np.full((len(a), side, 3), 255, np.uint8), b], 1) for a, b in strips.values()]
    return pd.DataFrame(list(rows.values())), Image.fromarray(np.concatenate(lines))


if __name__ == "__main__":
    given = dict(a.split("=", 1) for a in sys.argv[1:] if a.startswith("folder="))
    where = Path(given.get("folder", "runs/diversity"))
    table, page = measure(where, [a for a in sys.argv[1:] if not a.startswith("folder=")])
    table.to_csv(where / "diversity.csv", index=False)
    page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).save(where / "diversity.jpg", quality=88)
    print(table.round(3).to_string(index=False))
    mean = table.mean()
    cosine, activation = (mean[f"{k}, diverse"] / mean[f"{k}, plain"] for k in ("cosine", "activation"))
    print(
        f"mean pairwise Gram cosine at {JUDGE} {mean['cosine, plain']:.3f} → {mean['cosine, diverse']:.3f} "
        f"({cosine - 1:+.0%}), "
        f"activation {mean['activation, plain']:.3f} → {mean['activation, diverse']:.3f} ({activation:.0%})"
    )
