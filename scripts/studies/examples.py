"""Study 7: dataset examples against optimization: in which layers do they agree?"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from page import Report, config_of, sheet, told

from pipeline.compare.statistics import median
from pipeline.data import datasets
from pipeline.data.image_loading import batches
from pipeline.data.image_loading import load_images as photographs
from pipeline.layers.finding import capture
from pipeline.layers.selection import LayersConfig, list_layers
from pipeline.models.loading import load_model
from pipeline.store.reader import Atlas, open_atlas

SHOWN = 3
BEST = 4  # number of images per unit, as in the `transfer` of an atlas


def answers(atlas: Atlas) -> dict[str, np.ndarray]:
    """Return, for each layer, the largest activation of its channels for every dataset image of the run, (n, C)."""
    config, names = config_of(atlas), atlas.layers
    model, dataset = load_model(config.model), datasets.list_dataset(config.data)
    layers = [layer for layer in list_layers(model, LayersConfig(), config.model.aliases) if layer.name in names]
    found = {name: np.zeros((len(dataset.images), 0)) for name in names}
    with capture(model, layers) as run, torch.no_grad():
        for items, images in batches(photographs(dataset, range(len(dataset.images)), model.preprocessing), 16, []):
            rows = [item.index for item in items]
            for name, maps in run(torch.from_numpy(images[: len(rows)]).float() / 255).items():
                if not found[name].size:
                    found[name] = np.zeros((len(dataset.images), maps.shape[1]))
                found[name][rows] = maps.flatten(2).amax(2).numpy()
    return found


def cosines(pictures: np.ndarray, best: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Return cosines (G, G) of activations for visualizations and best images (G, C), both minus the mean (C,)."""
    ours, theirs = pictures - usual, best - usual
    lengths = np.linalg.norm(ours, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)
    return ours @ theirs.T / np.maximum(lengths, 1e-12)


def rows_of(atlas: Atlas) -> tuple[list[dict[str, object]], list[float]]:
    """Return one row per layer, and the median agreement of each."""
    every = answers(atlas)
    rows, course = [], []
    for layer in atlas:
        held, tops, numbers = layer.image_activations(), layer.examples("max"), layer.measurements()
        assert held is not None and tops is not None, "this atlas has no photographs, or is older than answers"
        active = np.flatnonzero((tops.index[:, :BEST] >= 0).all(1))
        seen = every[layer.name]
        best = np.stack([seen[tops.index[row, :BEST]].mean(0) for row in active])
        alike = cosines(held[active, 0].astype(np.float64), best, seen.mean(0))
        own, others = np.diag(alike), alike[~np.eye(len(alike), dtype=bool)].reshape(len(alike), -1)
        course.append(median(own).value)
        rows.append(
            {
                "layer": layer.name, "units": len(active), "own photographs": told(median(own)),
                "other units' photographs": told(median(others.mean(1))),
                "told apart": f"{(own > others.max(1)).mean():.0%}",
                "margin": told(median(numbers["margin"][active, 0]), 1),
                "activation ratio (peak)": told(median(numbers["peak_ratio"][active, 0])),
            }
        )  # fmt: skip
    return rows, course


def report(run: Path) -> Report:
    """Return the agreement by layer, beside that with the best images of the layer's other units."""
    with open_atlas(run) as atlas:
        rows, course = rows_of(atlas)
        lines = []
        for layer in list(atlas)[1::2]:
            tops = layer.examples("max")
            assert tops is not None
            shown = [layer.images()[0, 0]]
            for index, y, x in zip(tops.index[0, :SHOWN], tops.y[0, :SHOWN], tops.x[0, :SHOWN], strict=True):
                photo, box = atlas.input_image(int(index)), layer.crop_box(int(y), int(x))
                assert photo is not None
                resized = photo.convert("RGB").resize((layer.input_size[1], layer.input_size[0]))
                shown.append(np.asarray(resized if box is None else resized.crop(box)))
            lines.append((f"{layer.name}:{layer.channels[0]}", shown))
    depth = pd.Series(course).corr(pd.Series(range(len(course))), method="spearman")
    found = pd.DataFrame(rows)
    told_apart = f"Rank correlation of agreement with depth over {len(rows)} layers: {depth:+.2f}."
    title = (
        "Cosine of the layer's answers to a unit's picture and to the best photographs, medians with 95 % intervals."
    )
    return Report(
        {f"{title} {told_apart} Chance of telling apart is one in {max(r['units'] for r in rows)}:": found},
        sheet(["picture", *(f"photograph {i + 1}" for i in range(SHOWN))], lines),
    )
