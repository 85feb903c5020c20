"""Activations of layers at random positions of dataset images."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.activation_atlas.results import SamplesPart
from pipeline.core.seeds import seed_of
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.effects.measurement import full_batch, grouped
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class SamplingContext:
    """What sampling needs besides the images.

    Attributes:
        model: The network.
        layers: Layers that are sampled.
        outputs: Layer of the logits; None without a classifier.
        dataset: The dataset.
        positions: Number of positions of each image.
        seed: Seed of the run.
        batch: Images in one forward pass.
        stop: Called before every batch; raises an exception to interrupt the work.
        threads: Number of threads that decode images.
    """

    model: Model
    layers: Sequence[Layer]
    outputs: Layer | None
    dataset: Dataset
    positions: int
    seed: int
    batch: int
    stop: Callable[[], None] = lambda: None
    threads: int = 2


def choose_positions(seed: int, path: str, layer: str, shape: tuple[int, int], count: int) -> np.ndarray:
    """Return different random positions of a map, as row · width + column.

    Args:
        seed: Seed of the run.
        path: Path of the image.
        layer: Name of the layer.
        shape: (height, width) of its map.
        count: Number of positions.

    Returns:
        (P,) int64, where P is at most the number of positions of the map.
    """
    total = shape[0] * shape[1]
    generator = np.random.default_rng(seed_of("activation atlas", seed, path, layer))
    return generator.permutation(total)[:count]


@ieee(deterministic=True)
def sample(context: SamplingContext, indices: Sequence[int]) -> SamplesPart:
    """Return activations at random positions of dataset images, after the rectifier where one reads the layer.

    Batches are cut at multiples of `context.batch` from the first image on, and are full: parts that begin at such
    multiples give the same bytes as one part.
    """
    failed: list[tuple[int, str]] = []
    parts: list[SamplesPart] = []
    captured = [*context.layers, *([context.outputs] if context.outputs is not None else [])]
    loaded = image_loading.load_images(context.dataset, indices, context.model.preprocessing, context.threads)
    with torch.no_grad(), capture(context.model, captured) as run:
        for items in grouped(loaded, context.batch):
            read = [(item.index, item.array) for item in items if item.array is not None]
            failed += [(item.index, item.reason) for item in items if item.array is None]
            if not read:
                continue
            context.stop()
            numbers = [index for index, _ in read]
            maps = run(full_batch([array for _, array in read], context.batch, context.model.device))
            parts.append(_part(context, numbers, maps))
    return SamplesPart.joined(parts, failed)


def _part(context: SamplingContext, numbers: Sequence[int], maps: dict[str, Tensor]) -> SamplesPart:
    """Return the samples of the images `numbers`, the first of a batch with the activations `maps`."""
    vectors, places = [], []
    for layer in context.layers:
        own = maps[layer.name][: len(numbers)].float()
        chosen = _positions(context, layer, numbers, (own.shape[2], own.shape[3]))
        index = torch.from_numpy(chosen).to(own.device)[:, None, :].expand(-1, own.shape[1], -1)
        picked = own.flatten(2).gather(2, index).transpose(1, 2)
        # Behind the rectifier: what the next layer gets, where negative values are as good as 0.
        picked = picked.clamp(min=0) if layer.rectified else picked
        vectors.append(picked.contiguous().cpu().numpy())
        places.append(np.stack([chosen // own.shape[3], chosen % own.shape[3]], axis=2).astype(np.int16))
    top = np.full(len(numbers), -1, np.int32)
    if context.outputs is not None:
        logits = maps[context.outputs.name][: len(numbers)].float().mean((2, 3))
        top = logits.argmax(1).cpu().numpy().astype(np.int32)
    return SamplesPart(np.array(numbers, np.int32), top, tuple(vectors), tuple(places))


def _positions(context: SamplingContext, layer: Layer, numbers: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """Return the positions of each image in the map of a layer, (n, P) int64."""
    images = context.dataset.images
    return np.stack(
        [choose_positions(context.seed, images[i].path, layer.name, shape, context.positions) for i in numbers]
    )
