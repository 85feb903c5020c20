"""What an objective does to the logits of all classes."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from pipeline.config.schema import from_tree
from pipeline.models.loading import Model, load_model
from pipeline.store.reader import open_atlas

BATCH = 16


def logits_of(model: Model, images: np.ndarray) -> Tensor:
    """Return the logits (N, classes) for images (N, H, W, 3) uint8."""
    parts = []
    with torch.no_grad():
        for i in range(0, len(images), BATCH):
            pixels = torch.from_numpy(images[i : i + BATCH]).permute(0, 3, 1, 2).float() / 255
            parts.append(model.module(model.normalize(pixels)))
    return torch.cat(parts)


def rivals(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the logarithm of the sum of the exponentials of all other logits, (N,)."""
    at = torch.arange(len(classes)), classes
    return logits.index_put(at, torch.tensor(-torch.inf)).logsumexp(1)


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the units of a run with the logit, the probability and the rise of both above noise."""
    parts = []
    with open_atlas(run) as atlas:
        model = load_model(from_tree(yaml.safe_load(atlas.config)).model)
        (layer,) = atlas
        for preset in layer.presets:
            images = layer.images(preset)[:]
            units, variants = images.shape[:2]
            flat = images.reshape(-1, *images.shape[2:])
            classes = torch.from_numpy(np.repeat(np.asarray(layer.channels, np.int64), variants))
            noise = np.random.default_rng(0).normal(127, 3, flat.shape).round().clip(0, 255).astype(np.uint8)
            at = torch.arange(len(classes)), classes
            before, after = logits_of(model, noise), logits_of(model, flat)
            parts.append(
                pd.DataFrame(
                    {
                        "preset": preset,
                        "channel": classes.numpy(),
                        "variant": np.tile(np.arange(variants), units),
                        "own_logit": after[at].numpy(),
                        "probability": after.softmax(1)[at].numpy(),
                        "own_rise": (after[at] - before[at]).numpy(),
                        "rival_rise": (rivals(after, classes) - rivals(before, classes)).numpy(),
                    }
                )
            )
    return frame.merge(pd.concat(parts), on=["preset", "channel", "variant"], how="left")
