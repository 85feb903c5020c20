"""Study 1: logit or probability as class objective: activations reached, and the effect on competing logits."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from page import Report, compared, config_of, dueled, medians, sheet, told
from torch import Tensor

from pipeline.compare.statistics import median, paired_test
from pipeline.models.loading import Model, load_model
from pipeline.store.reader import open_atlas

MEASURES = ("robust", "high_frequency", "checkerboard", "spectral_distance", "transfer")
OBJECTIVES = ("logit", "log_probability", "probability")


def scores(model: Model, images: np.ndarray) -> Tensor:
    """Return the logits (N, classes) for images (N, H, W, 3) uint8."""
    with torch.no_grad():
        return model.module(model.normalize(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255))


def slopes(model: Model, images: np.ndarray, classes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the norm of each objective's gradient with respect to the image, (N,) each."""
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).requires_grad_(True)
    logits = model.module(model.normalize(pixels))
    rows = torch.arange(len(classes)), torch.from_numpy(classes).long()
    values = {"logit": logits, "log_probability": logits.log_softmax(1), "probability": logits.softmax(1)}
    found = {}
    for name in OBJECTIVES:
        (gradient,) = torch.autograd.grad(values[name][rows].sum(), pixels, retain_graph=True)
        found[name] = gradient.flatten(1).norm(dim=1).numpy()
    return found


def report(run: Path) -> Report:
    """Return the effect of each objective on all logits, and the gradient norm of each objective at the start."""
    with open_atlas(run) as atlas:
        model = load_model(config_of(atlas).model)
        (layer,) = atlas
        classes = np.asarray(layer.channels, np.int64)
        pictures = {name: layer.images(name)[:, 0] for name in OBJECTIVES}
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
                "to logit's": "" if name == "logit" else dueled(paired_test(own[name], own["logit"]), 1),
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
