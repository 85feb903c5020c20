"""Measuring the statistics of natural images in the normalizations of a network, for presets that compare with them."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pipeline.acceleration.precision import ieee
from pipeline.core import hashing
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError
from pipeline.core.registry import registered_name
from pipeline.data import datasets, image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization.network_penalties import NaturalDeviations, Normalization, normalizations_before
from pipeline.visualization.preset import Preset

log = logging.getLogger(__name__)

# Number of images that the medians are taken over, and the number below which the packaged images are used instead.
MAX_IMAGES = 64
MIN_IMAGES = 16

BATCH = 8

# Name of the file in a run folder that keeps the medians for the next plan.
FILE = "natural_deviations.json"

# Raised when the same network and images give other medians than before.
VERSION = 1


def check_normalizations(model: Model, layers: Sequence[Layer], presets: Sequence[Preset]) -> None:
    """Check that the network has batch normalizations for the presets that compare with their statistics.

    Args:
        model: The network, not folded.
        layers: Layers that get visualizations.
        presets: The presets of the run.

    Raises:
        AtlasError: If no layer has a batch normalization before it.
    """
    comparing = [p for p in presets if any(penalty.layers == "all" for penalty in p.network_penalties)]
    if not comparing or not layers:
        return
    without = [layer.name for layer in layers if not normalizations_before(model, layer)]
    if not without:
        return
    penalties = ", ".join(registered_name(penalty) for penalty in comparing[0].network_penalties)
    if len(without) < len(layers):
        log.warning(
            "render=%s: no batch normalization precedes %s: visualizations without %s",
            comparing[0].name,
            ", ".join(without),
            penalties,
        )
        return
    raise AtlasError(
        f"render={comparing[0].name} compares with the statistics of the batch normalizations before a layer "
        f"(render.network_penalties: {penalties}), and {model.name} has none before {', '.join(without[:3])}. Choose "
        "deeper layers of a network with batch normalization, or another preset, such as render=distill."
    )


def compared_layers(model: Model, layers: Sequence[Layer], presets: Sequence[Preset], dataset: Dataset) -> list[Layer]:
    """Return the layers with a visualization that is compared with the statistics of normalizations before them.

    Penalties of "pooled" layers are left out where there are no natural images: the packaged ones have 1 or 3 channels.
    """
    measurable = bool(dataset.images) or _has_packaged_images(model)
    compared = []
    for layer in layers:
        penalties = [penalty for preset in presets for penalty in preset.for_layer(layer).network_penalties]
        if any(measurable or penalty.layers == "all" for penalty in penalties) and normalizations_before(model, layer):
            compared.append(layer)
    return compared


def _has_packaged_images(model: Model) -> bool:
    return model.preprocessing.channels in (1, 3)


def measure(
    model: Model, run: Model, dataset: Dataset, layers: Sequence[Layer], fingerprint: str = ""
) -> NaturalDeviations:
    """Return the median deviations of dataset images in all normalizations before any of `layers`.

    Args:
        model: The network, not folded.
        run: The network that the images are passed through; a folded one is faster.
        dataset: Up to `MAX_IMAGES` of its images are used, drawn by a hash of their paths; if fewer than `MIN_IMAGES`
            can be read, the packaged sample images are used, if they have the channels of the network.
        layers: Layers that get visualizations.
        fingerprint: Digest of the dataset and the preprocessing.

    Raises:
        AtlasError: If no image can be read.
    """
    found = {n.path: n for layer in layers for n in normalizations_before(model, layer)}
    normalizations = list(found.values())
    indices = _drawn(dataset)
    values = _deviations(run, dataset, indices, normalizations)
    if len(values) < MIN_IMAGES and _has_packaged_images(model):
        dataset = datasets.list_dataset(DataConfig(source="samples"), model.preprocessing.channels)
        indices = _drawn(dataset)
        values = _deviations(run, dataset, indices, normalizations)
        fingerprint = "packaged"
    if not len(values):
        raise AtlasError(
            "render.network_penalties compares with natural images, and none of the dataset can be read, nor of the "
            "packaged ones: set data=folder data.root=FOLDER, or leave it out with render/network_penalties=[]."
        )
    source = hashing.digest_of(["natural deviations", fingerprint, [dataset.images[i].path for i in indices]])
    medians = np.median(values, axis=0)
    pairs = tuple((n.path, float(median)) for n, median in zip(normalizations, medians, strict=True))
    return NaturalDeviations(source, len(values), pairs)


def identity(network: str, fingerprint: str) -> str:
    """Return the digest of everything that determines the deviations of natural images.

    Args:
        network: Digest of the weights, the architecture and the preprocessing (`manifest.network_digest`).
        fingerprint: Digest of the dataset and the preprocessing.
    """
    return hashing.digest_of(["natural deviations", VERSION, network, fingerprint, MAX_IMAGES, MIN_IMAGES])


def write(folder: Path, deviations: NaturalDeviations, key: str) -> None:
    """Keep deviations in a run folder for the next plan, under their `identity`."""
    record = {"identity": key, **dataclasses.asdict(deviations)}
    write_atomic(folder / FILE, (json.dumps(record, indent=1) + "\n").encode())


def kept(folders: Sequence[Path], key: str, model: Model, layers: Sequence[Layer]) -> NaturalDeviations | None:
    """Return the deviations that a run folder keeps; None if none has those of all normalizations.

    Args:
        folders: The run folders.
        key: The `identity` of the deviations.
        model: The network, not folded.
        layers: Layers that get visualizations.
    """
    needed = {n.path for layer in layers for n in normalizations_before(model, layer)}
    for folder in folders:
        if not (folder / FILE).is_file():
            continue
        try:
            record = json.loads((folder / FILE).read_bytes())
            medians = tuple((str(path), float(median)) for path, median in record["medians"])
            found = NaturalDeviations(str(record["source"]), int(record["images"]), medians)
            if record["identity"] == key and needed <= {path for path, _ in medians}:
                return found
        except (OSError, KeyError, TypeError, ValueError) as error:
            log.warning("%s cannot be read (%s); the deviations are measured again", folder / FILE, error)
    return None


def _drawn(dataset: Dataset) -> list[int]:
    """Return the numbers of up to `MAX_IMAGES` images, drawn by a hash of their paths."""
    return dataset.draw(MAX_IMAGES).tolist()


@ieee()
def _deviations(
    run: Model, dataset: Dataset, indices: Sequence[int], normalizations: Sequence[Normalization]
) -> np.ndarray:
    """Return the deviation of each readable image in each normalization, (images, normalizations)."""
    by_tap = {n.tap.name: n for n in normalizations}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in by_tap}

    def note(tap: Layer, maps: torch.Tensor) -> None:
        found[tap.name].append(by_tap[tap.name].deviation(maps))

    loaded = image_loading.load_images(dataset, indices, run.preprocessing)
    with capture(run, [n.tap for n in normalizations], each=note) as forward, torch.no_grad():
        for _, levels in image_loading.batches(loaded, BATCH, []):
            forward(torch.from_numpy(levels).float() / 255)
    columns = [torch.cat(parts).numpy() if parts else np.zeros(0) for parts in found.values()]
    return np.stack(columns, axis=1)
