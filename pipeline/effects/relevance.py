"""Which dataset images use a unit, and which of their pixels.

The *relevance* of a unit for an image is the sum over positions of activation × gradient of the largest output with
respect to the activation: to first order, the part of that output that passes through the unit. Images that are ranked
by it need the unit; those with the highest activations only contain what it responds to. (Relevance maximization:
Achtibat et al. 2023, arXiv 2206.03208, with layer-wise relevance propagation; in piecewise linear networks its basic
rule is gradient × input, Ancona et al. 2018, arXiv 1711.06104.)

The *mask* of a unit in an image says which pixels this part comes from. It is that of the response R = Σ wₚ aₚ, the
unit's activations weighted by their gradients at the image where their relevance is positive. The change of R from a
blurred image to the image is divided among the pixels by integrated gradients (Sundararajan et al. 2017,
arXiv 1703.01365), in `STEPS` steps, and averaged over the cells of a grid. A unit that responds to the blurred image
nearly as much has no such pixels, and an empty mask: its gradients would be noise.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.acceleration.precision import ieee
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.effects.measurement import pass_with_gradients
from pipeline.examples.localize import rows_by_image
from pipeline.examples.shown_images import ShownImages, concatenate_bytes, receptive_field_jpeg, source_copier
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model

# Side of a mask in cells, at most; steps of the integrated gradients; blur of their first image, in input heights.
MASK_SIDE = 28
STEPS = 4
BLUR = 0.18

# The mask is empty if the blurred image gets at least this share of the response to the image.
UNCHANGED = 0.9


def select_relevant(relevance: np.ndarray, images: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images with the largest relevance for each of C' units, largest first.

    Args:
        relevance: Relevance for each unit and image, (C', n).
        images: The images, (n,) ascending.
        count: Images per unit.

    Returns:
        Values float32 and images int32, (C', count); NaN and −1 where no further relevance is positive.
    """
    value = np.full((len(relevance), count), np.nan, np.float32)
    index = np.full((len(relevance), count), -1, np.int32)
    order = np.argsort(-np.nan_to_num(relevance, nan=-np.inf), axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(relevance, order, 1)
    positive = best > 0  # false for NaN
    columns = slice(0, order.shape[1])
    value[:, columns] = np.where(positive, best, np.nan)
    index[:, columns] = np.where(positive, images[order] if len(images) else order, -1)
    return value, index


@dataclasses.dataclass(frozen=True)
class RelevanceIndex:
    """What is measured of relevant images, for each layer.

    Attributes:
        channels: Channels of each layer with a list, (C',) int32.
        pairs: Pairs of image and row of the channel in `channels`, (P, 2) int32, sorted.
        stored: Images that the atlas has a copy of already, ascending.
    """

    channels: tuple[np.ndarray, ...]
    pairs: tuple[np.ndarray, ...]
    stored: np.ndarray

    @classmethod
    def of(cls, channels: Sequence[np.ndarray], lists: Sequence[np.ndarray], stored: np.ndarray) -> "RelevanceIndex":
        """Create from the channels of each layer and the images of each, (C', k) with −1 for none."""
        pairs = []
        for index in lists:
            row = np.broadcast_to(np.arange(len(index))[:, None], index.shape)[index >= 0]
            pairs.append(np.unique(np.stack([index[index >= 0], row], 1).astype(np.int32), axis=0))
        return cls(tuple(one.astype(np.int32) for one in channels), tuple(pairs), stored.astype(np.int32))

    @property
    def images(self) -> np.ndarray:
        """All images of all pairs, ascending."""
        return np.unique(np.concatenate([np.zeros(0, np.int32), *(pairs[:, 0] for pairs in self.pairs)]))

    def for_images(self, first: int, last: int) -> "RelevanceIndex":
        """Return the part for the images from `first` to `last`, both included."""
        parts = [pairs[slice(*np.searchsorted(pairs[:, 0], [first, last + 1]))] for pairs in self.pairs]
        return RelevanceIndex(
            self.channels, tuple(parts), self.stored[slice(*np.searchsorted(self.stored, [first, last + 1]))]
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        arrays = {f"{i}/channels": array for i, array in enumerate(self.channels)}
        return arrays | {f"{i}/pairs": array for i, array in enumerate(self.pairs)} | {"stored": self.stored}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "RelevanceIndex":
        """Create from the result of `arrays`."""
        layers = range(sum(name.endswith("/pairs") for name in arrays))
        return cls(
            tuple(arrays[f"{i}/channels"] for i in layers),
            tuple(arrays[f"{i}/pairs"] for i in layers),
            arrays["stored"],
        )


@dataclasses.dataclass(frozen=True)
class RelevanceContext:
    """What the measurement needs besides the images.

    Attributes:
        model: The network.
        layers: Layers whose units are measured.
        outputs: Layer of the outputs.
        dataset: The dataset.
        config: Which copies of images are stored.
        stop: Called before every image; raises an exception to interrupt the work.
        threads: Number of threads that decode images.
    """

    model: Model
    layers: Sequence[Layer]
    outputs: Layer
    dataset: Dataset
    config: ExamplesConfig
    stop: Callable[[], None] = lambda: None
    threads: int = 2

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of a mask: cells are about square, and not smaller than pixels."""
        height, width = self.model.preprocessing.size
        longest = max(height, width)
        side = min(MASK_SIDE, longest)
        return max(1, round(side * height / longest)), max(1, round(side * width / longest))


@ieee(deterministic=True)
def measure_relevance(context: RelevanceContext, index: RelevanceIndex, images: Sequence[int]) -> dict[str, np.ndarray]:
    """Measure positions and masks of units in the images that use them. Images are independent of each other.

    Args:
        context: Network, layers, dataset and settings.
        index: Pairs to measure, at least those of `images`.
        images: Images to read.

    Returns:
        Arrays by name, as a shard stores them: for layer i `i/pairs` (p, 2) int32, `i/place` (p, 2) int16, row and
        column of the largest relevance, and `i/mask` (p, h, w) uint8, 255 for the largest value of each mask, all 0 for
        units that do not need the details of the image; with
        `store="crops"` also `i/jpeg` and `i/offset`, a crop for each pair, in the form of `concatenate_bytes`. Of the
        images that the atlas does not have yet, the arrays `shown/…` of `localize.localize`.
    """
    rows = [rows_by_image(pairs, images) for pairs in index.pairs]
    found: list[list[tuple[int, int, tuple[int, int], np.ndarray]]] = [[] for _ in context.layers]
    crops: list[list[bytes]] = [[] for _ in context.layers]
    stored = set(index.stored.tolist())
    shown, failed = ShownImages(), []
    recipe = context.model.preprocessing
    copier = source_copier(context.dataset, recipe, context.config)
    for item in image_loading.load_images(context.dataset, images, recipe, context.threads, copier):
        context.stop()
        if item.array is None:
            failed.append((item.index, item.reason))
            continue
        units = [
            (i, row, int(index.channels[i][row]))
            for i, by_image in enumerate(rows)
            if item.index in by_image
            for row in by_image[item.index][:, 0].tolist()
        ]
        for (i, row, _), (place, mask) in zip(units, _measure_image(context, item.array, units), strict=True):
            found[i].append((item.index, row, place, mask))
            if context.config.store == "crops":
                crops[i].append(receptive_field_jpeg(context.layers[i], place, item.extra, recipe, context.config))
        if item.index not in stored:
            shown.add([item], context.config)
    arrays = shown.arrays(failed, context.config.store)
    for i, entries in enumerate(found):
        arrays[f"{i}/pairs"] = np.array([entry[:2] for entry in entries], np.int32).reshape(-1, 2)
        arrays[f"{i}/place"] = np.array([entry[2] for entry in entries], np.int16).reshape(-1, 2)
        arrays[f"{i}/mask"] = np.array([entry[3] for entry in entries], np.uint8).reshape(-1, *context.mask_size)
        if context.config.store == "crops":
            arrays |= concatenate_bytes(f"{i}/", crops[i])
    return arrays


def _measure_image(
    context: RelevanceContext, array: np.ndarray, units: Sequence[tuple[int, int, int]]
) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Return the place and the mask of each unit (layer number, row, channel) in an image (C, H, W) uint8."""
    model = context.model
    device = model.device
    image = torch.from_numpy(array)[None].to(device).float().div(255)
    numbers = sorted({i for i, _, _ in units})
    layers = [context.layers[i] for i in numbers]
    inputs, tensors, outputs = pass_with_gradients(model, layers, context.outputs, image)
    slopes = torch.autograd.grad(outputs.amax(1).sum(), tensors)
    at_image = {
        i: (layer.maps(tensor, 1)[0].detach().float(), layer.slopes(slope, 1)[0].float())
        for i, layer, tensor, slope in zip(numbers, layers, tensors, slopes, strict=True)
    }
    del inputs, outputs
    start = blurred(image)
    shares = (torch.arange(STEPS, device=device) + 0.5) / STEPS
    path = start + shares[:, None, None, None] * (image - start)
    with torch.no_grad():
        _, tensors, _ = pass_with_gradients(model, layers, context.outputs, start)
    at_start = {i: layer.maps(tensor, 1)[0].float() for i, layer, tensor in zip(numbers, layers, tensors, strict=True)}
    inputs, tensors, _ = pass_with_gradients(model, layers, context.outputs, path)
    along = {i: layer.maps(tensor, STEPS) for i, layer, tensor in zip(numbers, layers, tensors, strict=True)}
    results = []
    for i, _, channel in units:
        maps, gradient = (values[channel] for values in at_image[i])
        relevance = maps * gradient
        best = int(relevance.argmax())
        place = divmod(best, maps.shape[1])
        weights = gradient * (relevance > 0)
        lowest = 0.0 if context.layers[i].rectified else -math.inf
        response, unchanged = ((x.clamp(min=lowest) * weights).sum() for x in (maps, at_start[i][channel]))
        if float(unchanged) >= UNCHANGED * float(response):
            results.append((place, np.zeros(context.mask_size, np.uint8)))
            continue
        activations = along[i][:, channel].float().clamp(min=lowest)
        (slope,) = torch.autograd.grad((activations * weights).sum(), [inputs], retain_graph=True)
        share = (slope.mean(0, keepdim=True) * (image - start)).sum(1, keepdim=True)
        results.append((place, _mask(share, context.mask_size)))
    return results


def blurred(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) averaged twice over squares of about `BLUR` of their height, mirrored at the edges."""
    height, width = images.shape[2:]
    radius = min(max(1, round(BLUR * height / 2)), height - 1, width - 1)
    for _ in range(2 if radius > 0 else 0):
        images = functional.avg_pool2d(functional.pad(images, (radius,) * 4, mode="reflect"), 2 * radius + 1, 1)
    return images


def _mask(share: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Return the positive part of pixel values (1, 1, H, W), averaged and smoothed over cells, as (h, w) uint8."""
    cells = functional.adaptive_avg_pool2d(share, size)
    row = torch.tensor([0.25, 0.5, 0.25], device=share.device)
    kernel = (row[:, None] * row)[None, None]
    smooth = functional.conv2d(functional.pad(cells, (1,) * 4, mode="replicate"), kernel)[0, 0].clamp(min=0)
    largest = float(smooth.max())
    scaled = smooth / largest * 255 if largest > 0 else smooth * 0
    return scaled.round().to(torch.uint8).cpu().numpy()
