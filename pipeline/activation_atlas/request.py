"""Which layers of a run get an activation atlas, and from which images."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pipeline.activation_atlas.cells import direction_preset, sized
from pipeline.activation_atlas.config import ActivationAtlasConfig
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.data.datasets import Dataset
from pipeline.effects.request import choose_images
from pipeline.images.parameterizations import FromImage
from pipeline.layers.finding import Layer
from pipeline.layers.selection import matches
from pipeline.visualization.preset import Preset, Size
from pipeline.visualization.render_job import ROBUST_COPIES

# Share of the cells of a grid that have samples, assumed before they are laid out.
FILLED = 0.65

# Forward passes that an optimization step is assumed to cost.
STEP_PASSES = 2.7


@dataclasses.dataclass(frozen=True)
class ActivationAtlasRequest:
    """What is sampled and visualized.

    Attributes:
        layers: The layers.
        images: Dataset images that are sampled, ascending.
        outputs: Layer of the logits; None without a classifier.
        config: The settings.
        batch: Images in one forward pass.
        input_size: (height, width) of the network's input.
        cost: Multiply-adds of the forward pass whose time is the unit of estimates.
        canvases: (height, width) of the visualizations of each layer in pixels.
    """

    layers: tuple[Layer, ...]
    images: tuple[int, ...]
    outputs: Layer | None
    config: ActivationAtlasConfig
    batch: int
    input_size: Size
    cost: float
    canvases: tuple[Size, ...] = ()

    def preset(self, preset: Preset, layer: Layer, directions: np.ndarray) -> Preset:
        """Return the preset of the visualizations of some cells of a layer, as its variants.

        Args:
            preset: The main preset of the run.
            layer: The layer, of C channels.
            directions: Direction of each cell, (K, C).
        """
        cells = direction_preset(self.sized(preset), directions, f"the activation atlas of {layer.name}")
        return cells.for_layer(layer)

    def sized(self, preset: Preset) -> Preset:
        """Return the main preset with the size and steps of cells."""
        return sized(preset, self.config.size, self.config.steps)

    def canvas(self, layer: Layer) -> Size:
        """Return the (height, width) of the visualizations of a layer."""
        return self.canvases[self.layers.index(layer)]

    @property
    def expected(self) -> dict[str, int]:
        """About how many cells each layer gets, by name."""
        return {layer.name: self.expected_cells(layer) for layer in self.layers}

    def samples(self, layer: Layer) -> int:
        """Return the number of samples of a layer, if all images can be read."""
        return len(self.images) * min(self.config.positions, layer.height * layer.width)

    def expected_cells(self, layer: Layer) -> int:
        """Return about how many cells a layer gets, before its samples are laid out."""
        return max(1, min(round(FILLED * self.config.grid**2), self.samples(layer)))

    def pixels(self, preset: Preset, layer: Layer) -> int:
        """Return the number of pixels of the canvas of a cell, margins included."""
        height, width = self.canvas(layer)
        margin = self.sized(preset).margin
        return (height + 2 * margin) * (width + 2 * margin)

    def cell_passes(self, preset: Preset, layer: Layer) -> float:
        """Return the estimated work for one cell, in forward passes of the network over an image of its input size."""
        area = self.pixels(preset, layer) / math.prod(self.input_size)
        return (STEP_PASSES * self.config.steps + ROBUST_COPIES) * area * layer.cost / max(self.cost, 1.0)


def request_activation_atlas(
    config: ActivationAtlasConfig,
    dataset: Dataset,
    layers: Sequence[Layer],
    preset: Preset,
    logits: Sequence[Layer],
    batch: int,
    input_size: Size,
) -> ActivationAtlasRequest | None:
    """Return what a run samples and visualizes, without the sizes of visualizations; None without layers.

    Args:
        config: The settings.
        dataset: The dataset, of whose images those with the lowest hashes of their paths are chosen.
        layers: Layers of the run that get visualizations.
        preset: The main preset.
        logits: Layers of logits.
        batch: Images in one forward pass.
        input_size: (height, width) of the network's input.

    Raises:
        AtlasError: If a glob matches no layer of the run, there are no images, or the preset has no directions.
    """
    if not config.layers:
        return None
    names = [name for layer in layers for name in (layer.name, layer.alias) if name]
    for pattern in config.layers:
        if not any(matches(layer, pattern) for layer in layers):
            raise AtlasError(
                f"activation_atlas.layers: no layer of this run that gets visualizations matches {pattern!r}. "
                f"{nearest_names(pattern, names)} layers.include adds layers to the run."
            )
    if not len(dataset.images):
        raise AtlasError("activation_atlas.layers needs dataset images: choose some with data=folder data.root=DIR.")
    if isinstance(preset.canvas, FromImage):
        raise AtlasError("activation_atlas.layers: cells start from noise. Choose another render/canvas than image.")
    if any(stage.layer for stage in preset.stages):
        raise AtlasError(
            "activation_atlas.layers: render.schedule optimizes other layers, which the directions of cells do not "
            "fit. Choose another render/schedule."
        )
    chosen = tuple(layer for layer in layers if any(matches(layer, pattern) for pattern in config.layers))
    whole = tuple(range(len(dataset.images)))
    images = choose_images(dataset, config.images) if config.images else whole
    outputs = logits[-1] if logits else None
    return ActivationAtlasRequest(
        chosen, images, outputs, config, batch, input_size, max(layer.cost for layer in layers)
    )
