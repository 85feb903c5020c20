"""The fixed depths of a network at which the path of an image is measured: by the spatial means of all channels there.

How similar two images travel through a network is compared at several layers, from the first to the unit's own
(`images.path_similarity`). The depths depend on the network alone, so that results of several runs fit together.
"""

from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from pipeline.layers.finding import Layer
from pipeline.layers.selection import POLICIES, LayersConfig
from pipeline.models.loading import Model

# So many depths are spread over a network.
COUNT = 8
# A network with fewer block outputs than this, such as VGG, has depths at layers of any kind.
LEAST_BLOCKS = 3


def choose_depths(model: Model, layers: Sequence[Layer], folded: Collection[str] = ()) -> tuple[Layer, ...]:
    """Choose at most `COUNT` depths: block outputs, spread evenly over the network by their number.

    A network without blocks has its depths at the first usable layer after each module with weights. Layers at or
    inside `folded` modules are left out: a fast variant of the network may have other values there, because only the
    unit's own layer keeps such modules as they are. So are layers that no module with weights follows.

    Args:
        model: The network.
        layers: All layers of the network, in the order of computation.
        folded: Paths of modules that a variant of the network folds: convolutions and batch normalizations.

    Returns:
        In the order of computation; empty if no layer can be used.
    """
    end = max((layer.cost for layer in layers), default=0.0)
    usable = [layer for layer in layers if 0 < layer.cost < end and not _is_folded(layer, folded)]
    blocks = {layer.name for layer in POLICIES["blocks"](model, layers, LayersConfig())}
    candidates = [layer for layer in usable if layer.name in blocks]
    if len(candidates) < LEAST_BLOCKS:
        first: dict[float, Layer] = {}
        for layer in usable:
            first.setdefault(layer.cost, layer)
        candidates = list(first.values())
    places = np.linspace(0, len(candidates) - 1, min(COUNT, len(candidates))).round().astype(int).tolist()
    return tuple(candidates[i] for i in places)


def _is_folded(layer: Layer, folded: Collection[str]) -> bool:
    """Return whether a layer is read at or inside one of the modules `folded`."""
    for path in {layer.name.partition("#")[0], layer.module}:
        parts = path.split(".")
        if any(".".join(parts[:i]) in folded for i in range(1, len(parts) + 1)):
            return True
    return False


def depths_before(layer: Layer, depths: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return the depths that lie before a layer, with at least one module with weights between; the first of `depths`.

    So no channel of a depth is a copy of a channel of the layer, as it would be behind an activation function.
    """
    return tuple(depth for depth in depths if depth.cost < layer.cost)


def spatial_means(maps: Tensor) -> Tensor:
    """Return the mean of each map, (B, C, H, W) → (B, C) float32."""
    return maps.float().flatten(2).mean(2)
