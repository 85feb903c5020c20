"""Check the lists of images by relevance and their masks on a real network.

scripts/bench relevance [--model NAME] [--root ../shared/photos] [--images 200] [--skip 0] [--units 20] [--layers 5]
    [--share 0.1] [--draws 5]

Two questions, by layer of the tour:

* How many of the 8 images that use a unit most are also among the 8 with its highest activations, of all channels?
* Are the pixels of a mask those that the unit's part of the output comes from? In the image that uses a unit most, the
  `--share` of cells with the largest mask is replaced by a blurred copy of the image, or as many random cells are, in
  `--draws` draws. The response is what the mask divides: the unit's activations, weighted by their gradients at the
  image where their relevance is positive. The table has the share of units with a mask; the share of their draws that
  leave a higher response than covering the mask does; the same with those in which both leave nothing, and for the mean
  of the draws; and what is left of the response, median over the units with a mask.

`--skip` leaves out the first photographs, and draws other units: a method is chosen on some and reported on others.
"""

import random

import numpy as np
import torch
from effects import parser_of, prepared
from torch import Tensor
from torch.nn import functional

from pipeline.effects.measurement import EffectsContext, measure, pass_with_gradients
from pipeline.effects.relevance import RelevanceContext, RelevanceIndex, blurred, measure_relevance, select_relevant
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.finding import Layer, capture

LISTED = 8


def passed(context: RelevanceContext, layer: Layer, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor and the maps (C, H, W) of a layer, and the outputs, for an image (1, C, H, W) in [0, 1]."""
    _, (tensor,), outputs = pass_with_gradients(context.model, [layer], context.outputs, image)
    return tensor, layer.maps(tensor, 1)[0], outputs


def weights_of(context: RelevanceContext, layer: Layer, channel: int, image: Tensor) -> Tensor:
    """Return the gradient of the largest output with respect to a unit, (H, W), where its relevance is positive."""
    tensor, maps, outputs = passed(context, layer, image)
    (gradient,) = torch.autograd.grad(outputs.amax(), [tensor])
    slope = layer.maps(gradient, 1)[0, channel]
    return slope * (maps[channel].detach() * slope > 0)


def response(context: RelevanceContext, layer: Layer, channel: int, weights: Tensor, image: Tensor) -> float:
    activations = passed(context, layer, image)[1][channel].detach()
    return float((weights * (activations.clamp(min=0) if layer.rectified else activations)).sum())


def covered(image: Tensor, cells: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Replace cells, by their numbers, of a grid over an image by a blurred copy."""
    grid = torch.zeros(size[0] * size[1])
    grid[torch.from_numpy(np.ascontiguousarray(cells))] = 1
    mask = functional.interpolate(grid.view(1, 1, *size), image.shape[2:], mode="nearest")
    return image * (1 - mask) + blurred(image) * mask


def deletion(
    context: RelevanceContext,
    layer: Layer,
    index: np.ndarray,
    channels: list[int],
    arrays: list[np.ndarray],
    share: float,
    number_of_draws: int,
) -> str:
    """Return the last columns of a row of the table, for the first image of each of some channels."""
    numbers = RelevanceIndex.of([np.array(channels)], [index[channels][:, :1]], np.zeros(0, int))
    alone = RelevanceContext(context.model, [layer], context.outputs, context.dataset, context.config)
    measured = measure_relevance(alone, numbers, numbers.images.tolist())
    rng = np.random.default_rng(0)
    own, other = [], []
    pairs = measured["0/pairs"].tolist()
    for (number, row), mask in zip(pairs, measured["0/mask"], strict=True):
        if not mask.any():
            continue
        image = torch.from_numpy(arrays[number])[None].float() / 255
        weights = weights_of(context, layer, channels[row], image)
        count = round(share * mask.size)
        order = np.argsort(-mask.ravel().astype(int), kind="stable")[:count]
        draws = [order, *(rng.permutation(mask.size)[:count] for _ in range(number_of_draws))]
        before = response(context, layer, channels[row], weights, image)
        left = [
            response(context, layer, channels[row], weights, covered(image, cells, mask.shape)) / before
            for cells in draws
        ]
        own.append(left[0]), other.append(left[1:])
    if not own:
        return f"{len(pairs)} | 0 | – | – | – | – | – |"
    masks, random_cells = np.array(own)[:, None], np.array(other)
    lower, closed = masks < random_cells, (masks <= 0) & (random_cells <= 0)
    columns = (
        len(own) / len(pairs),
        lower.mean(),
        (lower | closed).mean(),
        (masks[:, 0] < random_cells.mean(1)).mean(),
    )
    medians = (np.median(masks), np.median(random_cells))
    return f"{len(pairs)} | " + " | ".join(f"{value:.2f}" for value in (*columns, *medians)) + " |"


def main() -> None:
    parser = parser_of(__doc__, images=200, units=20)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args()
    options.images += options.skip
    chosen = range(options.skip, options.images)
    network, layers, outputs, dataset, arrays = prepared(options)
    zero = [np.zeros(layer.channels, np.float32) for layer in layers]
    part = measure(EffectsContext(network, layers, outputs, zero, [()] * len(layers), dataset, 16), chosen)
    context = RelevanceContext(network, layers, outputs, dataset, ExamplesConfig(store="ids"))
    print(f"{options.model}, {len(chosen)} photographs, {LISTED} images in each list\n")
    lower = "mask lower | lower or both 0 | lower than mean"
    print(f"| layer | channels | in both lists | units | with a mask | {lower} | left, mask | left, random |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    first = 0
    for layer in layers:
        relevance = part.relevance[:, first : first + layer.channels].T
        first += layer.channels
        with torch.no_grad(), capture(network, [layer]) as forward:
            batches = [
                torch.from_numpy(np.stack(arrays[i : i + 16])).float() / 255
                for i in range(options.skip, options.images, 16)
            ]
            peaks = torch.cat([forward(batch)[layer.name].float().amax((2, 3)) for batch in batches]).T.numpy()
        _, index = select_relevant(relevance, np.array(chosen, np.int32), LISTED)
        strongest = np.argsort(-peaks, axis=1, kind="stable")[:, :LISTED] + options.skip
        both = [len(set(a[a >= 0]) & set(b)) / LISTED for a, b in zip(index, strongest, strict=True)]
        used = np.flatnonzero(index[:, 0] >= 0).tolist()
        units = sorted(random.Random(f"{layer.name}{options.skip or ''}").sample(used, min(options.units, len(used))))
        last = deletion(context, layer, index, units, arrays, options.share, options.draws)
        print(f"| {layer.name} | {layer.channels} | {np.mean(both):.2f} | {last}", flush=True)


if __name__ == "__main__":
    main()
