"""Reference values of EfficientNet-Lite0, computed on a CPU before: in double precision, and a rendering in float32."""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_blocks import networks
from gpu_blocks.networks import LITE, Network
from pipeline.acceleration.batchnorm_folding import fold
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.visualization.preset import Preset

# Five layers from the first to the last, of both kinds of convolutions.
LAYERS = ("conv_stem", "blocks.1.1.conv_dw", "blocks.3.1.conv_pwl", "blocks.5.2.conv_pw", "conv_head")
UNITS, SIDE, IMAGES = 4, 128, 2
# Rendered units of each layer (none of conv_stem has a kernel of zeros), and pixels of their images.
RENDERED, RENDERED_SIDE = 8, 96
FILE = "references.npz"


def units(layer: Layer) -> list[int]:
    """Return the channels of a layer whose responses are compared."""
    return [i * layer.channels // UNITS for i in range(UNITS)]


def rendered_units(layer: Layer) -> list[int]:
    """Return the channels of a layer whose renderings are compared: the middles of equal parts of it."""
    return [(2 * i + 1) * layer.channels // (2 * RENDERED) for i in range(RENDERED)]


def images() -> Tensor:
    """Return the images (2, 3, 128, 128) in [0, 1] that responses are compared on, in 8 bits."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(IMAGES, 3, SIDE // 8, SIDE // 8, generator=generator)
    fine = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return ((0.75 * smooth + 0.25 * fine) * 255).round() / 255


def observed(model: Model, layer: Layer, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (2 images, 4 units) of a layer and the gradient (3, H, W) of the first one in its image."""
    pixels = pixels.clone().requires_grad_(True)
    with capture(model, [layer]) as run:
        means = run(pixels)[layer.name][:, units(layer)].to(pixels.dtype).mean(dim=(2, 3))
    return means.detach(), torch.autograd.grad(means[0].sum(), pixels)[0][0]


def in_double(model: Model) -> Model:
    """Return a copy of a network in double precision."""
    return dataclasses.replace(model, module=copy.deepcopy(model.module).double())


def preset_of(net: Network, name: str) -> Preset:
    """Return the preset of rendered images: the default one, for one attempt."""
    return dataclasses.replace(net.preset(name), attempts=1, margin=8)


def digest(values: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(values.detach().cpu().numpy()).tobytes()).hexdigest()


def made() -> dict[str, Any]:
    """Return all reference values by name."""
    net = networks.network(LITE, "cpu", None)
    exact, found = in_double(fold(net.model)), {"images": (images() * 255).to(torch.uint8).numpy()}
    pixels = images().double()
    for name in LAYERS:
        layer = net.layers[name]
        means, gradient = observed(exact, layer, pixels)
        found |= {f"means/{name}": means.numpy(), f"gradient/{name}": gradient.float().numpy()}
        preset, size = preset_of(net, name), (RENDERED_SIDE, RENDERED_SIDE)
        worker = networks.worker(net, "cpu", batch=RENDERED, precision="float32")
        channels = rendered_units(layer)
        pictures = worker.pictures(name, channels, size, preset)
        batch, random = networks.first_batch(worker.job(name, size, preset), channels)
        found |= {
            f"rendered/{name}/image": np.stack([p.image for p in pictures]),
            f"rendered/{name}/activation": np.array([p.activation for p in pictures]),
            f"rendered/{name}/start": np.array([p.start for p in pictures]),
            f"draws/{name}": np.array([digest(batch.initial), digest(random)]),
            f"initial/{name}": batch.initial[:, ..., :4].reshape(RENDERED, -1)[:, :4096].detach().numpy(),
        }
    return found


def write(folder: Path) -> Path:
    """Write the reference values into a folder."""
    path = folder / FILE
    np.savez_compressed(path, **made())
    return path
