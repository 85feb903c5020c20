"""Measure how much accuracy a network loses by noise on its weights or by channel dropout, at several levels.

scripts/bench noise_levels --photographs FOLDER [--model NAME …] [--count N] [--draws N]

FOLDER has one sub-folder for each class, named by its WordNet id or by its number, in the order of the classes. The
levels of the study `weight_noise` are those at which about ten percent of the accuracy are lost. Printed is the top-1
accuracy, the mean over draws.
"""

import argparse
import sys

import torch

from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.image_loading import load_images
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model, load_model
from pipeline.visualization.network_perturbations import Dropout, NetworkPerturbation, WeightNoise

LEVELS = {
    "additive": [WeightNoise(sd=sd) for sd in (0.02, 0.04, 0.06, 0.1)],
    "multiplicative": [WeightNoise(sd=sd, kind="multiplicative") for sd in (0.02, 0.033, 0.05, 0.1)],
    "dropout": [Dropout(p=p) for p in (0.001, 0.003, 0.005, 0.01)],
}
BATCH = 25


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def accuracy(model: Model, images: torch.Tensor, classes: torch.Tensor) -> float:
    """Return the top-1 accuracy for (N, C, H, W) images in [0, 1]."""
    right = 0
    with torch.no_grad():
        for some, own in zip(images.split(BATCH), classes.split(BATCH), strict=True):
            right += int((model.module(model.normalize(some)).argmax(1) == own).sum())
    return right / len(classes)


def perturbed(
    model: Model, noise: NetworkPerturbation, images: torch.Tensor, classes: torch.Tensor, draws: int
) -> float:
    """Return the mean accuracy over draws of a perturbation; every batch has a draw of its own."""
    total = 0.0
    for draw in range(draws):
        with noise.applied(model.module, draw) as active:
            active.set_step(draw)
            total += accuracy(model, images, classes)
    return total / draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", required=True)
    parser.add_argument("--model", nargs="+", default=["efficientnet_lite0", "efficientnet_lite2"])
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args()
    dataset = datasets.list_dataset(DataConfig("folder", options.photographs))
    step = max(1, len(dataset.images) // options.count)
    indices = list(range(0, len(dataset.images), step))
    names = sorted({dataset.images[i].label for i in range(len(dataset.images))})
    if len(names) != 1000:
        raise SystemExit(f"{options.photographs} has {len(names)} classes, not the 1,000 of ImageNet in their order.")
    for name in options.model:
        model = load_model(ModelConfig("package", name))
        loaded = sorted(load_images(dataset, indices, model.preprocessing), key=lambda item: item.index)
        kept = [item for item in loaded if item.array is not None]
        images = torch.stack([torch.from_numpy(item.array).float() / 255 for item in kept if item.array is not None])
        classes = torch.tensor([names.index(dataset.images[item.index].label) for item in kept])
        whole = accuracy(model, images, classes)
        say(f"{name}: {whole:.3f} on {len(classes)} images")
        for kind, levels in LEVELS.items():
            for noise in levels:
                level = noise.p if isinstance(noise, Dropout) else noise.sd
                found = perturbed(model, noise, images, classes, options.draws)
                say(f"  {kind} {level}: {found:.3f}, {found / whole:.2f} of it")


if __name__ == "__main__":
    main()
