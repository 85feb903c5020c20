"""The effects of units on the outputs of the network, over dataset images.

The *effect* of a unit on an output is the output minus the output with the unit removed: positive if the unit raises
it. The outputs are the logits of the classes or, without a classifier, the spatial means of the last layer's channels.

* By **attribution**, for all channels of all layers at once, on the largest output of each image: the sum over
  positions of gradient × (activation − mean of the channel over the dataset), a first-order approximation from one
  backward pass per image (Molchanov et al. 2017, arXiv 1611.06440, section 2.2; the mean as the reference, as in
  attribution patching).
* By **ablation**, exactly and on all outputs, for some units: the rest of the network is run with the unit's map set to
  zero, or to its mean over the dataset, at all positions.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.core.errors import AtlasError
from pipeline.data import image_loading
from pipeline.data.datasets import Dataset
from pipeline.effects.rest_of_network import Edit, RestOfNetwork, hooked, output_values
from pipeline.effects.results import REPLACEMENTS, Ablation, EffectsPart, exact_sum, exact_sum_of_squares
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import modules_of
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class EffectsContext:
    """What the measurement needs besides the images.

    Attributes:
        model: The network.
        layers: Layers whose units are measured.
        outputs: Layer of the outputs.
        means: Mean of each channel of each layer over the dataset, (C,) float32.
        ablated: Channels of each layer that are ablated.
        dataset: The dataset.
        batch: Images, or copies of an image, in one forward pass.
        stop: Called before every batch; raises an exception to interrupt the work.
        threads: Number of threads that decode images.
    """

    model: Model
    layers: Sequence[Layer]
    outputs: Layer
    means: Sequence[np.ndarray]
    ablated: Sequence[Sequence[int]]
    dataset: Dataset
    batch: int
    stop: Callable[[], None] = lambda: None
    threads: int = 2

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.model.device


@ieee(deterministic=True)
def measure(context: EffectsContext, indices: Sequence[int]) -> EffectsPart:
    """Measure the effects of units on the outputs for dataset images.

    The numbers of an image depend on its batch only by rounding, and batches are cut at multiples of `context.batch`
    from the first image on: parts that begin at such multiples give the same bytes as one part.
    """
    failed: list[tuple[int, str]] = []
    parts: list[EffectsPart] = []
    loaded = image_loading.load_images(context.dataset, indices, context.model.preprocessing, context.threads)
    ablated = [number for number, channels in enumerate(context.ablated) if channels]
    rest = RestOfNetwork(context.model, [context.layers[number] for number in ablated], context.outputs)
    for items in grouped(loaded, context.batch):
        readable = [item for item in items if item.array is not None]
        failed += [(item.index, item.reason) for item in items if item.array is None]
        if not readable:
            continue
        context.stop()
        arrays = [item.array for item in readable if item.array is not None]
        images = full_batch(arrays, context.batch, context.device)
        outputs, attribution, relevance = (values[: len(readable)] for values in attribute(context, images))
        top = outputs.argmax(1)
        exact = [_ablate(context, rest, ablated, images[i : i + 1]) for i in range(len(readable))]
        index = np.array([item.index for item in readable], np.int32)
        sums = _ablations(top, exact, outputs.shape[1])
        parts.append(EffectsPart(index, top.astype(np.int32), attribution, relevance, sums))
    return EffectsPart.joined(parts, failed)


def grouped(loaded: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` loaded images, whether they can be read or not."""
    while group := list(itertools.islice(loaded, size)):
        yield group


def full_batch(arrays: Sequence[np.ndarray], batch: int, device: torch.device) -> Tensor:
    """Return a full batch of images in [0, 1]: kernels that are chosen by batch size round differently."""
    stacked = np.stack(arrays)
    if len(stacked) < batch:
        stacked = np.concatenate([stacked, np.repeat(stacked[-1:], batch - len(stacked), 0)])
    return torch.from_numpy(stacked).to(device).float().div_(255)


def attribute(context: EffectsContext, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the outputs of images, and what all channels contribute to the largest output of each image.

    Args:
        context: Network and layers.
        images: (B, C, H, W) in [0, 1].

    Returns:
        Outputs (B, K) float32; attributions and relevance, with and without the subtraction of the mean, (B, channels
        of all layers side by side) float32; NaN for layers that no gradient reaches.
    """
    batch = len(images)
    _, tensors, outputs = pass_with_gradients(context.model, context.layers, context.outputs, images)
    reached = [tensor for tensor in tensors if tensor.requires_grad]
    grads = dict(
        zip(map(id, reached), torch.autograd.grad(outputs.amax(1).sum(), reached, allow_unused=True), strict=True)
    )
    columns: list[tuple[Tensor, Tensor]] = []
    for layer, tensor, mean in zip(context.layers, tensors, context.means, strict=True):
        gradient = grads.get(id(tensor))
        if gradient is None:
            unknown = torch.full((batch, layer.channels), torch.nan)
            columns.append((unknown, unknown))
            continue
        with torch.no_grad():
            maps, slopes = layer.maps(tensor, batch).float(), layer.slopes(gradient, batch).float()
            center = torch.from_numpy(np.asarray(mean, np.float32)).to(maps.device)[:, None, None]
            columns.append((((maps - center) * slopes).sum((2, 3)).cpu(), (maps * slopes).sum((2, 3)).cpu()))
    attribution, relevance = (torch.cat(values, 1).numpy() for values in zip(*columns, strict=True))
    return outputs.detach().cpu().numpy(), attribution, relevance


def pass_with_gradients(
    model: Model, layers: Sequence[Layer], outputs: Layer, images: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Run the network on images (B, C, H, W) in [0, 1], so that gradients reach its layers and the images.

    Returns:
        The leaf of the images, the tensor at each layer, and the outputs (B, K).

    Raises:
        AtlasError: If the network does not run one of the layers.
    """
    taps: dict[str, Tensor] = {}
    with _kept(model, [*layers, outputs], taps):
        inputs = images.contiguous(memory_format=model.memory_format).requires_grad_()
        model.module(model.normalize(inputs))
    missing = [layer.name for layer in (*layers, outputs) if layer.name not in taps]
    if missing:
        raise AtlasError(
            f"{model.name} did not run {', '.join(missing[:3])} for dataset images. Exclude such layers with "
            "layers.exclude, or measure no effects (effects.images=0)."
        )
    return inputs, [taps[layer.name] for layer in layers], output_values(outputs, taps[outputs.name], len(images))


@contextlib.contextmanager
def _kept(model: Model, layers: Sequence[Layer], taps: dict[str, Tensor]) -> Iterator[None]:
    """Keep the tensors of layers during a pass; the network goes on with copies, which it may change in place."""
    modules = modules_of(model.module)
    points: dict[tuple[str, str], dict[int, list[str]]] = {}
    for layer in layers:
        points.setdefault((layer.module, layer.side), {}).setdefault(layer.call, []).append(layer.name)
    with contextlib.ExitStack() as stack:
        for (path, side), names in points.items():
            edits = {call: _keeper(layers_of_call, taps) for call, layers_of_call in names.items()}
            stack.enter_context(hooked(modules[path], side, edits))
        yield


def _keeper(names: Sequence[str], taps: dict[str, Tensor]) -> Edit:
    """Return a function that keeps a tensor under the names of layers, and returns a copy."""

    def keep(tensor: Tensor) -> Tensor:
        taps.update(dict.fromkeys(names, tensor))
        return tensor.clone()

    return keep


def _ablate(
    context: EffectsContext, rest: RestOfNetwork, ablated: Sequence[int], image: Tensor
) -> dict[str, np.ndarray]:
    """Return the effects of all ablated units on the outputs for one image, (U, K) float32, by replacement.

    Args:
        context: Network, layers and units.
        rest: The parts of the network behind the layers with ablated units.
        ablated: The numbers of these layers in the context.
        image: (1, C, H, W) in [0, 1].
    """
    effects: dict[str, list[np.ndarray]] = {name: [] for name in REPLACEMENTS}
    if not ablated:
        return {}
    with torch.no_grad():
        outputs = rest.record(image)
        for number, of_context in enumerate(ablated):
            context.stop()
            layer, channels = context.layers[of_context], context.ablated[of_context]
            mean = context.means[of_context]
            for name in REPLACEMENTS:
                values = mean[list(channels)] if name == "mean" else np.zeros(len(channels), np.float32)
                for start in range(0, len(channels), context.batch):
                    part = slice(start, start + context.batch)
                    edit = removal(layer, channels[part], values[part])
                    removed = rest.outputs_with(number, edit, len(channels[part]))
                    effects[name].append((outputs - removed).cpu().numpy())
    return {name: np.concatenate(found) for name, found in effects.items()}


def removal(layer: Layer, channels: Sequence[int], values: np.ndarray) -> Edit:
    """Return a function that sets another unit in each copy of an image to a value at all positions of its map.

    Args:
        layer: Layer of the units.
        channels: The unit of each copy.
        values: Its new value, (copies,).
    """

    def edit(tensor: Tensor) -> Tensor:
        changed = tensor.clone(memory_format=torch.preserve_format)
        if 0 in changed.stride():  # an expanded tensor keeps its strides in a copy of some layouts
            changed = tensor.contiguous().clone()
        maps = layer.source.maps(changed, len(channels))
        if maps.untyped_storage().data_ptr() != changed.untyped_storage().data_ptr():
            raise AtlasError(f"{layer.name}: units of this layout cannot be ablated; set effects.ablated=0.")
        layer.set_channels(maps, channels, values)
        return changed

    return edit


def _ablations(top: np.ndarray, exact: Sequence[dict[str, np.ndarray]], outputs: int) -> dict[str, Ablation]:
    """Return the ablations of a batch from those of each image; `top` are the largest of so many outputs."""
    ablations: dict[str, Ablation] = {}
    for name in REPLACEMENTS:
        effects = [one[name] for one in exact if name in one]
        units = len(effects[0]) if effects else 0
        tops = [effect[:, one] for effect, one in zip(effects, top.tolist(), strict=False)]
        ablations[name] = (
            np.stack(tops).astype(np.float32) if tops else np.zeros((len(top), 0), np.float32),
            sum((exact_sum(effect) for effect in effects), np.zeros((units, outputs), np.int64)),
            sum((exact_sum_of_squares(effect) for effect in effects), np.zeros((units, outputs), np.int64)),
        )
    return ablations
