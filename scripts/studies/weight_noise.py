"""Study 5: does noise on the network's parameters regularize as noise on the image does?"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from page import Report, config_of, contest, told

from pipeline.compare.statistics import median
from pipeline.layers.finding import capture
from pipeline.layers.selection import LayersConfig, list_layers
from pipeline.models.loading import Model, load_model
from pipeline.store.reader import LayerView, open_atlas
from pipeline.visualization.network_perturbations import WeightNoise

MEASURES = (
    "peak_ratio", "robust_share", "agreement", "transfer", "high_frequency", "checkerboard",
    "spectral_distance", "seconds",
)  # fmt: skip
JUDGED = ("robust_share", "agreement", "transfer", "high_frequency", "checkerboard")
# Networks that were not used for optimization: other seeds than those of the runs, and levels between theirs.
LEVELS = (0.1, 0.2)
DRAWS = 8
SEED = 1_000_000


def left(view: LayerView, model: Model, presets: Sequence[str], sd: float) -> np.ndarray:
    """Return the share of activation left on noisy networks, (presets, visualizations), mean over `DRAWS` networks."""
    (layer,) = [found for found in list_layers(model, LayersConfig(), {}) if found.name == view.name]
    pictures = np.stack([view.images(preset)[:] for preset in presets])  # (presets, units, variants, H, W, 3)
    channels = np.broadcast_to(view.channels[None, :, None], pictures.shape[:3]).flatten()
    images = torch.from_numpy(pictures.reshape(-1, *pictures.shape[3:])).permute(0, 3, 1, 2).float() / 255
    at = torch.arange(len(channels)), torch.from_numpy(channels).long()
    noise = WeightNoise(sd=sd)
    with torch.no_grad(), capture(model, [layer]) as run:

        def answered() -> torch.Tensor:
            return torch.cat([run(part)[layer.name].flatten(2).mean(2) for part in images.split(16)])[at]

        clean, noisy = answered(), []
        for draw in range(DRAWS):
            with noise.applied(model.module, SEED + draw) as active:
                active.set_step(0)
                noisy.append(answered())
    return (torch.stack(noisy).mean(0) / clean).view(len(presets), -1).numpy()


def report(run: Path) -> Report:
    """Return medians of all ten presets, each against the plain one, and the activation left on other networks."""
    found = contest(run, "plain", MEASURES, JUDGED)
    with open_atlas(run) as atlas:
        model = load_model(config_of(atlas).model)
        presets = list(next(iter(atlas)).presets)
        shares = {sd: np.concatenate([left(view, model, presets, sd) for view in atlas], 1) for sd in LEVELS}
    rows = [
        {"preset": f"`{preset}`"} | {f"noise of {sd:.0%}": told(median(shares[sd][i])) for sd in LEVELS}
        for i, preset in enumerate(presets)
    ]
    title = f"Activation on {DRAWS} noisy networks that no picture has seen ÷ that on the network itself, medians:"
    return dataclasses.replace(found, tables={**found.tables, title: pd.DataFrame(rows)})
