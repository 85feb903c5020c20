"""How much the connections between units of two layers contribute to the outputs, over dataset images.

The *attribution* of a connection from source unit s to target unit t says how much of what the target contributes to
the largest output came through the source. With the gradient g of the largest output with respect to the target's map,
held constant, the target's response is R = Σ_q g_q t_q over its positions, and

    A(s, t) = Σ_p (s_p − mean of s over the dataset) · ∂R / ∂s_p

over positions of the source, mean over the images. It is the first-order change of R if the source is set to its mean
everywhere, as in attribution patching between units (Nanda 2023, "Attribution Patching"; Syed et al. 2023,
arXiv 2310.10348); Voss et al. 2021, "Visualizing Weights", weight expanded weights by gradients in the same way. All
paths between the two layers count, with the activation functions as they are for each image.

One backward pass between the two layers is needed for each target unit and batch. A layer is paired with the nearest
layer before it that gradients reach.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.data import image_loading
from pipeline.effects.measurement import EffectsContext, full_batch, grouped, pass_with_gradients
from pipeline.effects.results import SUM_BITS, ConnectionAttribution, exact_sum
from pipeline.layers.circuits.search import TRIED


@ieee(deterministic=True)
def measure_connections(
    context: EffectsContext, channels: Sequence[Sequence[int]], indices: Sequence[int]
) -> dict[str, np.ndarray]:
    """Measure the attributions of connections for dataset images.

    As in `measurement.measure`, parts that begin at multiples of `context.batch` give the same sums as one part.

    Args:
        context: Network, layers and dataset; `ablated` is not used.
        channels: Channels of each layer that count as targets.
        indices: Dataset images.

    Returns:
        Arrays by name, as a shard stores them: `count`, the number of images that could be read; for each layer i with
        a source `i/source`, the number of that layer, and `i/sum` (C', I) int64, sums over the images of A in multiples
        of 2⁻³².
    """
    sums: dict[int, np.ndarray] = {}
    sources: dict[int, int] = {}
    count = 0
    loaded = image_loading.load_images(context.dataset, indices, context.model.preprocessing, context.threads)
    for items in grouped(loaded, context.batch):
        arrays = [item.array for item in items if item.array is not None]
        if not arrays:
            continue
        count += len(arrays)
        _, tensors, outputs = pass_with_gradients(
            context.model, context.layers, context.outputs, full_batch(arrays, context.batch, context.device)
        )
        sources = sources or source_layers(tensors)
        if not sources:
            continue  # a single layer, or a layer and latents of it
        reached = [tensors[target] for target in sources]
        slopes = torch.autograd.grad(outputs.amax(1).sum(), reached, retain_graph=True, allow_unused=True)
        for (target, source), slope in zip(sources.items(), slopes, strict=True):
            found = np.zeros((len(channels[target]), context.layers[source].channels), np.int64)
            if slope is not None:
                graph = ((source, tensors[source]), (target, tensors[target], slope))
                found += _sums(context, graph, channels[target], len(outputs))[:, : len(arrays)].sum(1)
            sums[target] = sums.get(target, 0) + found
    result = {"count": np.array([count], np.int64)}
    for target, total in sums.items():
        result |= {f"{target}/source": np.array([sources[target]], np.int64), f"{target}/sum": total}
    return result


def source_layers(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Return for each layer the nearest one before it that its gradient reaches; without those that have none.

    Args:
        tensors: The tensors at the layers, in the order of computation.
    """
    sources: dict[int, int] = {}
    for target, tensor in enumerate(tensors):
        before = [number for number in range(max(0, target - TRIED), target) if tensors[number].requires_grad]
        # The output of a block can be that of its last layer.
        before = [number for number in before if not _equal(tensors[number], tensor)]
        if not before or not tensor.requires_grad:
            continue
        found = torch.autograd.grad(
            tensor.sum(), [tensors[number] for number in before], retain_graph=True, allow_unused=True
        )
        reached = [number for number, gradient in zip(before, found, strict=True) if gradient is not None]
        if reached:
            sources[target] = reached[-1]
    return sources


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach(), other.detach())


def _sums(
    context: EffectsContext,
    graph: tuple[tuple[int, Tensor], tuple[int, Tensor, Tensor]],
    channels: Sequence[int],
    batch: int,
) -> np.ndarray:
    """Return the attributions of a pair of layers in each image, (C', batch, I) int64.

    Args:
        context: See `measure_connections`.
        graph: Number and tensor of the source; number and tensor of the target, and the gradient of the outputs.
        channels: Channels of the target.
        batch: Number of images.
    """
    (before, values), (after, tensor, slope) = graph
    source, target = context.layers[before], context.layers[after]
    responses = target.maps(tensor, batch).float() * target.slopes(slope, batch).float()
    totals = responses.sum((0, 2, 3))
    center = torch.from_numpy(np.asarray(context.means[before], np.float32)).to(values.device)[:, None, None]
    change = source.maps(values.detach(), batch).float() - center
    rows = []
    for channel in channels:
        context.stop()
        (gradient,) = torch.autograd.grad(totals[channel], values, retain_graph=True)
        rows.append(exact_sum((change * source.slopes(gradient, batch).float()).sum((2, 3)).cpu().numpy()))
    return np.stack(rows)


def merged(parts: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> dict[str, ConnectionAttribution]:
    """Return the attributions of all images by the name of the target, from the parts of `measure_connections`.

    Args:
        parts: The parts.
        names: Names of the layers.
    """
    count = sum(int(part["count"][0]) for part in parts)
    result: dict[str, ConnectionAttribution] = {}
    for target, name in enumerate(names):
        found = [part for part in parts if f"{target}/sum" in part]
        if not found or not count:
            continue
        total = np.sum([part[f"{target}/sum"] for part in found], axis=0)
        value = (total / 2.0**SUM_BITS / count).astype(np.float32)
        result[name] = ConnectionAttribution(names[int(found[0][f"{target}/source"][0])], value, count)
    return result
