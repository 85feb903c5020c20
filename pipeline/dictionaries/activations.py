"""Activations of a layer at positions of dataset images, as the rows that dictionaries are fitted to."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from pipeline.acceleration.precision import ieee
from pipeline.core import hashing
from pipeline.core.errors import AtlasError
from pipeline.core.seeds import seed_of
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model

BATCH = 16
# Rows take at most so many bytes; if there are more, fewer positions of each image are used.
MAX_BYTES = 2**30
# One in so many source images is held out.
HELD_OUT = 10


@dataclasses.dataclass(frozen=True)
class Activations:
    """Rows of a layer of C channels.

    Attributes:
        train: (n, C) float32.
        held_out: (m, C) float32, of other source images.
        images: Number of images that were read.
        positions: Number of positions of each.
        failed: Number of images that could not be read.
    """

    train: np.ndarray
    held_out: np.ndarray
    images: int
    positions: int
    failed: int


@ieee(deterministic=True)
def sample_activations(
    model: Model,
    layer: Layer,
    dataset: Dataset,
    limits: tuple[int, int],
    seed: int = 0,
    stop: Callable[[], None] = lambda: None,
) -> Activations:
    """Read the activations of a layer at random positions of dataset images.

    Which images, which positions and which rows are held out follows from the paths of the images, so that it is the
    same on every machine. All crops of one source image are on one side.

    Args:
        model: The network.
        layer: The layer.
        dataset: The dataset.
        limits: Most images, and most positions of an image; 0 for all positions.
        seed: Seed of the positions.
        stop: Called before each batch; raises an exception to interrupt the work.

    Raises:
        AtlasError: If no image can be read, or none is held out.
    """
    drawn = dataset.draw(limits[0])
    total = layer.height * layer.width
    room = max(1, MAX_BYTES // (4 * layer.channels * max(1, len(drawn))))
    positions = min(limits[1] or total, total, room)
    rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
    failed: list[tuple[int, str]] = []
    count = 0
    loaded = image_loading.load_images(dataset, drawn.tolist(), model.preprocessing)
    with capture(model, [layer]) as forward, torch.no_grad():
        for items, levels in image_loading.batches(loaded, BATCH, failed):
            stop()
            maps = forward(torch.from_numpy(levels).to(model.device).float().div_(255))[layer.name]
            values = maps.float().flatten(2).transpose(1, 2).cpu().numpy()
            for item, image in zip(items, values, strict=True):
                photo = dataset.images[item.index]
                generator = np.random.default_rng(seed_of(seed, "activations", photo.path))
                chosen = np.sort(generator.permutation(len(image))[:positions])
                held = hashing.hash64(photo.source_path, "held out") % HELD_OUT == 0
                rows[held].append(np.ascontiguousarray(image[chosen]))
                count += 1
    if not rows[False] or not rows[True]:
        raise AtlasError(
            f"{count} images can be read, of too few sources to keep one in {HELD_OUT} apart. Use more: "
            "data=folder data.root=FOLDER."
        )
    return Activations(np.concatenate(rows[False]), np.concatenate(rows[True]), count, positions, len(failed))
