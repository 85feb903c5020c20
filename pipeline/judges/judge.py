"""A judge: another network, with its logits and with pooled features of some of its layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.acceleration.precision import ieee
from pipeline.core.errors import AtlasError
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers import selection
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import LayersConfig
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model, load_model

Size = tuple[int, int]

# Most layers of a judge whose features are used.
MAX_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Judge:
    """Another network that looks at feature visualizations.

    Attributes:
        name: Its key in the setting `judges`.
        model: The network.
        logits: Layer of logits with one channel for each class name; None without a classifier or class names.
        layers: Layers whose pooled features hidden units are compared with, at most `MAX_LAYERS`.
    """

    name: str
    model: Model
    logits: Layer | None
    layers: tuple[Layer, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the logits; empty without them."""
        return self.model.labels if self.logits is not None else ()

    @property
    def feature_sizes(self) -> list[int]:
        """Number of features of each layer: mean and maximum of every channel."""
        return [2 * layer.channels for layer in self.layers]

    @ieee()
    def class_logits(self, images: Tensor) -> np.ndarray:
        """Return the logits (B, K) of whole images (B, C, H, W) in [0, 1], resized to the input of the judge."""
        assert self.logits is not None
        with torch.no_grad(), capture(self.model, [self.logits]) as forward:
            maps = forward(self._input(images, self.model.preprocessing.size))[self.logits.name]
        assert maps is not None
        return maps.float().mean((2, 3)).cpu().numpy()

    @ieee()
    def features(self, images: Tensor, network_size: Size) -> np.ndarray:
        """Return the features of whole images: spatial mean and maximum of every channel of `layers`.

        The scale of the images is kept: an image of the size of the network's input is resized to the judge's input,
        and a smaller one in proportion. A judge that does not accept such a size gets all images at its own.

        Args:
            images: (B, C, H, W) in [0, 1].
            network_size: (height, width) of the input of the network that the images were made for.

        Returns:
            (B, p) float32.
        """
        own = self.model.preprocessing.size
        height, width = images.shape[-2:]
        size = (
            max(1, round(height * own[0] / network_size[0])),
            max(1, round(width * own[1] / network_size[1])),
        )
        if size == own:
            return self._pooled(images, own)
        try:
            return self._pooled(images, size)
        except Exception as error:  # networks refuse a size with whatever error their code raises
            if is_device_failure(error):
                raise
            return self._pooled(images, own)

    def _pooled(self, images: Tensor, size: Size) -> np.ndarray:
        pooled: dict[str, Tensor] = {}

        def keep(layer: Layer, maps: Tensor) -> None:
            flat = maps.float().flatten(2)
            pooled[layer.name] = torch.cat([flat.mean(2), flat.amax(2)], 1)

        with torch.no_grad(), capture(self.model, self.layers, keep) as forward:
            forward(self._input(images, size))
        return torch.cat([pooled[layer.name] for layer in self.layers], 1).cpu().numpy()

    def _input(self, images: Tensor, size: Size) -> Tensor:
        parameter = next(self.model.module.parameters())
        return resize(images.to(parameter.device), size)


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize whole images (B, C, H, W) in [0, 1] by antialiased bicubic interpolation, without a crop."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def load_judge(name: str, config: ModelConfig) -> Judge:
    """Load a judge and find its layers.

    Args:
        name: Key of the judge in the setting `judges`.
        config: The network.

    Raises:
        AtlasError: If the network cannot be loaded, or has no layers to compare with; the message names the judge.
    """
    try:
        model = load_model(config).to("cpu")
        layers = selection.list_layers(model, LayersConfig(), config.aliases)
        heads = [layer for layer in selection.logit_layers(model, layers) if layer.channels == len(model.labels)]
        return Judge(name, model, heads[-1] if heads else None, feature_layers(model, layers))
    except AtlasError as error:
        raise AtlasError(f"judges.{name}: {error}") from error


def feature_layers(model: Model, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return at most `MAX_LAYERS` evenly spaced block outputs, or convolutions of a network without blocks.

    The last one is always among them.

    Raises:
        AtlasError: If the network has neither.
    """
    found: list[Layer] = []
    for policy in ("blocks", "convs"):
        try:
            found = selection.select_layers(model, layers, LayersConfig(policy=policy))
        except AtlasError:  # the network has no such layers
            continue
        break
    if not found:
        raise AtlasError(f"{model.name} has neither blocks nor convolutions whose features could be compared.")
    places = np.unique(np.linspace(0, len(found) - 1, min(MAX_LAYERS, len(found))).round().astype(int))
    return tuple(found[place] for place in places)
