"""Layers that are linear in the pixels, such as a first convolution, and their kernels in units of pixels.

Between the image and such a layer are only operations that are affine in the image: the standardization by mean and
standard deviation, padding, convolutions, batch normalizations in inference mode. Whether they are is measured, not
inferred from the names of modules: f((a + b) / 2) = (f(a) + f(b)) / 2 for two images a and b. The kernel of a channel
is then the gradient of its activation at one position with respect to the image; it is the same for every image.

A convolution is read after its own normalization. Normalizations by statistics of each image (LayerNorm in ConvNeXt)
are not affine. Where only this one prevents linearity, the layer counts as linear, and its kernel is taken before it.
"""

import dataclasses
import logging
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import AtlasError, first_line
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Only so many convolutions and linear layers, the first ones in the order of computation, can be linear in the pixels.
NUM_CANDIDATES = 4
# Largest deviation from linearity, relative to the largest difference of the activations of the two images.
TOLERANCE = 1e-4
# Kernels with a longer side, in pixels, show nothing that the visualization does not.
MAX_SIDE = 64
# Channels whose kernels are computed together.
BATCH = 32


@dataclasses.dataclass(frozen=True)
class PixelKernels:
    """Kernels of a layer that is linear in the pixels.

    Attributes:
        kernel: (C, I, k, k') float32: the change of the activation at one position for a change of a pixel by 1, the
            full range from black to white; I is 3 for color images. Normalizations after the layer and the standard
            deviations of the preprocessing are included.
        exact: Whether the layer's own normalization is included. It is not if it divides by statistics of each image.
    """

    kernel: np.ndarray
    exact: bool


def linear_in_pixels(model: Model, layers: Sequence[Layer]) -> set[str]:
    """Return the names of the convolutions and linear layers that are linear in the pixels.

    Args:
        model: The network.
        layers: All its layers, in the order of computation.
    """
    candidates = [layer for layer in layers if layer.kind in ("conv", "linear")][:NUM_CANDIDATES]
    taps = list(dict.fromkeys(tap for layer in candidates for tap in _taps(layer)))
    return {tap.name for tap, is_affine in zip(taps, _affine(model, taps), strict=True) if is_affine}


def pixel_kernels(model: Model, layer: Layer, channels: Collection[int]) -> PixelKernels | None:
    """Return the kernels of some channels of a layer that is linear in the pixels, in the order of `channels`.

    Args:
        model: The network, on the CPU; its normalizations need not be folded.
        layer: The layer, with its receptive field.
        channels: Channels of the layer.

    Returns:
        None if the layer is not linear, if a unit sees more than `MAX_SIDE` pixels in one direction, or if the network
        has no gradient.
    """
    field = layer.field
    if not layer.linear_in_pixels or not channels or field is None or max(field.size) > MAX_SIDE:
        return None
    taps = _taps(layer)
    tap = next((tap for tap, is_affine in zip(taps, _affine(model, taps), strict=True) if is_affine), None)
    if tap is None:
        return None
    y, x = layer.height // 2, layer.width // 2
    top, left = (field.stride[i] * at + field.offset[i] for i, at in enumerate((y, x)))
    rows = slice(max(0, top), max(0, top) + field.size[0])
    columns = slice(max(0, left), max(0, left) + field.size[1])
    numbers = list(channels)
    try:
        parts = [
            _gradient(model, tap, numbers[start : start + BATCH], (y, x))[:, :, rows, columns]
            for start in range(0, len(numbers), BATCH)
        ]
    except (RuntimeError, AtlasError) as error:
        log.warning("%s has no kernels: %s", layer.name, first_line(error))
        return None
    return PixelKernels(torch.cat(parts).float().numpy(), tap is layer)


def _taps(layer: Layer) -> list[Layer]:
    """Return the layer, and the layer as it is before a normalization that belongs to it, if there is one."""
    path, _, call = layer.name.partition("#")
    if layer.module == path or path.startswith(f"{layer.module}."):
        return [layer]  # the output of its own module, or of an attention module that applies it as a function
    return [layer, dataclasses.replace(layer, module=path, call=int(call or 1), side="out")]


def _affine(model: Model, taps: Sequence[Layer]) -> list[bool]:
    """Return for each tap whether its activations are an affine function of the image, measured on two images."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.preprocessing.channels, *model.preprocessing.size)
    # Pixels are black or white, so that rectifiers that the images pass on their way switch.
    first, second = (torch.randint(0, 2, shape, generator=generator).float() for _ in range(2))
    device = model.device
    try:
        a, b, middle = (_read(model, taps, image.to(device)) for image in (first, second, (first + second) / 2))
    except AtlasError as error:  # what the network computes depends on the image
        log.debug("%s: no layer is known to be linear in the pixels: %s", model.name, first_line(error))
        return [False] * len(taps)
    affine = []
    for one, other, between in zip(a, b, middle, strict=True):
        scale = float((one - other).abs().max())
        error = float((between - (one + other) / 2).abs().max())
        affine.append(scale > 0 and error <= TOLERANCE * scale)
    return affine


def _read(model: Model, taps: Sequence[Layer], images: Tensor) -> list[Tensor]:
    """Return the activations at the taps for one image; several taps may have the same layer name."""
    unique = [dataclasses.replace(tap, name=str(i)) for i, tap in enumerate(taps)]
    with torch.no_grad(), capture(model, unique) as forward:
        activations = forward(images)
        return [activations[tap.name].float().clone() for tap in unique]


def _gradient(model: Model, tap: Layer, channels: Sequence[int], position: tuple[int, int]) -> Tensor:
    """Return the gradients of the activations of channels at one position in the image, (n, I, H, W)."""
    size = model.preprocessing.size
    images = torch.full((len(channels), model.preprocessing.channels, *size), 0.5, requires_grad=True)
    with torch.enable_grad(), capture(model, [tap]) as forward:
        maps = forward(images)[tap.name]
        values = maps[torch.arange(len(channels)), torch.tensor(channels), position[0], position[1]]
        return torch.autograd.grad(values.sum(), images)[0]
