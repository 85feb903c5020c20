"""Study 1: logit or probability as class objective: what each reaches, and what the competing logits do."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from page import Report, compared, config_of, dueled, medians, sheet, told
from torch import Tensor

from pipeline.compare.statistics import duel, median
from pipeline.models.loading import Model, load
from pipeline.store.reader import open_atlas

MEASURES = {"robust": 2, "high_frequency": 3, "checkerboard": 1, "spectral_distance": 3, "transfer": 2}
OBJECTIVES = ("logit", "log_probability", "probability")


def scores(model: Model, images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 → (N, classes) logits."""
    with torch.no_grad():
        return model.module(model.normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255))


def slopes(model: Model, images: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Length of each objective's gradient to the picture, (N,) each."""
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).requires_grad_(True)
    logits = model.module(model.normalise(pixels))
    rows = torch.arange(len(classes)), torch.from_numpy(classes).long()
    values = {"logit": logits, "log_probability": logits.log_softmax(1), "probability": logits.softmax(1)}
    found = {}
    for name in OBJECTIVES:
        (gradient,) = torch.autograd.grad(values[name][rows].sum(), pixels, retain_graph=True)
        found[name] = gradient.flatten(1).norm(dim=1).numpy()
    return found


def report(run: Path) -> Report:
    """What the pictures of each objective do to all logits, and how steep each objective is where one begins."""
    with open_atlas(run) as atlas:
        model = load(config_of(atlas).model)
        (layer,) = atlas
        classes = np.asarray(layer.channels, np.int64)
        pictures = {name: layer.pictures(name)[:, 0] for name in OBJECTIVES}
    at = torch.arange(len(classes)), torch.from_numpy(classes)
    noise = np.random.default_rng(0).normal(127, 3, pictures["logit"].shape).round().clip(0, 255).astype(np.uint8)
    before = scores(model, noise)
    rise = {name: scores(model, images) for name, images in pictures.items()}
    own = {name: z[at].numpy().astype(np.float64) for name, z in rise.items()}
    lines, steep = [], []
    for name, z in rise.items():
        away = torch.tensor(-torch.inf)
        rivals = z.index_put(at, away).logsumexp(1) - before.index_put(at, away).logsumexp(1)
        lines.append(
            {
                "objective": f"`{name}`", "logit": told(median(own[name]), 1),
                "to logit's": "" if name == "logit" else dueled(duel(own[name], own["logit"]), 1),
                "its rise over noise": told(median((z[at] - before[at]).numpy()), 1),
                "rise of its rivals": told(median(rivals.numpy()), 1),
                "mean of all other logits": told(median(((z.sum(1) - z[at]) / (z.shape[1] - 1)).numpy()), 2),
                "probability": told(median(z.softmax(1)[at].numpy()), 3),
            }
        )  # fmt: skip
    for where, images in (("noise, where all begin", noise), *((f"pictures of `{k}`", v) for k, v in pictures.items())):
        found = slopes(model, images, classes)
        steep.append({"at": where} | {f"`{name}`": f"{np.median(values):.2g}" for name, values in found.items()})
    some = range(0, len(classes), max(1, len(classes) // 6))
    figure = sheet(OBJECTIVES, [(f"class {classes[i]}", [pictures[name][i] for name in OBJECTIVES]) for i in some])
    return Report(
        {
            f"Logits of the saved pictures, medians over {len(classes)} classes with 95 % intervals; rivals are the "
            "log of the sum of all other classes' exponentials:": pd.DataFrame(lines),
            "Length of each objective's gradient to the picture, medians:": pd.DataFrame(steep),
            "The pictures, medians; robust is in each objective's own unit:": medians(compared(run), MEASURES),
        },
        figure,
    )
