"""Activation grids: a photograph as a layer sees it, position by position.

Olah et al. 2018, "The Building Blocks of Interpretability" (lucid's notebook ActivationGrid): for each position of the
layer's map of the photograph, a small visualization of the direction of the activation vector there.
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.acceleration.precision import ieee
from pipeline.activation_atlas.cells import direction_preset
from pipeline.config.schema import Config
from pipeline.core.atomic_io import atomic_path
from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.data import multiband
from pipeline.engine.worker import Worker
from pipeline.layers.finding import Layer, capture
from pipeline.models.loading import Model
from pipeline.runs.layer_worker import layer_worker
from pipeline.visualization.initial_images import preprocess_photograph
from pipeline.visualization.loop import render
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import draw_start

# Side and margin of a cell in pixels, where the preset leaves them open (`render.size=auto`).
CELL_SIDE, CELL_MARGIN = 64, 8

# Largest number of cells on a side; longer maps are averaged over blocks of positions.
MAX_CELLS = 14


@dataclasses.dataclass(frozen=True)
class ActivationGrid:
    """An activation grid of R rows and Q columns; notebooks display it as an image.

    Attributes:
        layer: Name of the layer.
        cells: (R, Q, H, W, C) uint8 visualizations.
        vectors: (R, Q, N) float32 activation vectors of the layer's N channels.
        activation: (R, Q) float32 value of the objective for each cell.
        photograph: (H, W, C) uint8 photograph as the network sees it.
    """

    layer: str
    cells: np.ndarray
    vectors: np.ndarray
    activation: np.ndarray
    photograph: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """The cells side by side, (R · H, Q · W, C) uint8."""
        rows, columns, height, width, channels = self.cells.shape
        return self.cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)

    @property
    def strength(self) -> np.ndarray:
        """Euclidean norm of each activation vector, (R, Q) float32: how much the layer responds at each position."""
        return np.linalg.norm(self.vectors, axis=2)

    def save(self, path: str | Path) -> Path:
        """Write the image as a PNG, and all arrays as an .npz beside it; return the path of the .npz."""
        path = Path(path)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            cells=self.cells,
            vectors=self.vectors,
            strength=self.strength,
            activation=self.activation,
            photograph=self.photograph,
        )
        data = path.with_suffix(".npz")
        for file, content in ((path, self._repr_png_()), (data, buffer.getvalue())):
            with atomic_path(file) as temporary:
                temporary.write_bytes(content)
        return data

    def _repr_png_(self) -> bytes:
        return multiband.to_png(multiband.to_display_image(self.image))


@dataclasses.dataclass(frozen=True)
class GridRequest:
    """What an activation grid is made of.

    Attributes:
        layer: The layer.
        photograph: The photograph, as a file that was read.
        cells: Largest number of cells on a side.
    """

    layer: Layer
    photograph: ConfigFile
    cells: int = MAX_CELLS

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns of cells."""
        factor = -(-max(self.layer.height, self.layer.width) // self.cells)
        return -(-self.layer.height // factor), -(-self.layer.width // factor)

    def batches(self, batch: int) -> int:
        """Return the number of batches of `batch` cells."""
        rows, columns = self.shape
        return -(-rows * columns // batch)


def activation_grid(
    model: Model,
    config: Config,
    candidates: Sequence[Layer],
    request: GridRequest,
    place: Callable[[str], Model],
    on_step: Callable[[], None] = lambda: None,
) -> ActivationGrid:
    """Make the activation grid of a photograph.

    All cells start from the same noise and get the same random transformations, so that similar activations give
    similar cells.

    Args:
        model: The network, on the CPU.
        config: The configuration, of which the main preset is used with another objective.
        candidates: All layers of the network.
        request: Layer, photograph and number of cells.
        place: Returns the network on a device.
        on_step: Called before each optimization step of a batch of `engine.batch` cells.

    Raises:
        AtlasError: If the layer has no map, or the photograph or the preset cannot be used.
    """
    layer = request.layer
    if not layer.spatial or layer.height * layer.width == 1:
        raise AtlasError(f"{layer.name} has no positions: choose a layer with a map for an activation grid.")
    if request.cells < 1:
        raise AtlasError(f"cells={request.cells} is too small: at least 1.")
    if model.preprocessing.channels not in (1, 3):
        raise AtlasError(f"image needs 1 or 3 channels; the network takes {model.preprocessing.channels}.")
    photograph = preprocess_photograph(request.photograph, model.preprocessing, "image")
    vectors = cell_vectors(model, request, photograph)
    config = dataclasses.replace(config, render=cell_preset(config.render, vectors), also=())
    canvas, worker = layer_worker(model, config, candidates, layer, place)
    images, activation = _render_cells(worker, layer, canvas, on_step)
    shape = vectors.shape[:2]
    return ActivationGrid(
        layer.name, images.reshape(*shape, *images.shape[1:]), vectors, activation.reshape(shape), photograph
    )


@ieee()
def cell_vectors(model: Model, request: GridRequest, photograph: np.ndarray) -> np.ndarray:
    """Return the activation vectors of the layer for a photograph, (R, Q, N) float32.

    A map of more positions than cells is averaged over blocks of positions of equal size, as far as it is divisible.

    Args:
        model: The network.
        request: The layer, of N channels, and the number of cells.
        photograph: (H, W, C) uint8 of the network's input size.
    """
    layer = request.layer
    image = torch.from_numpy(np.ascontiguousarray(photograph.transpose(2, 0, 1)))[None].float() / 255
    with torch.no_grad(), capture(model, [layer]) as run:
        maps = run(image)[layer.name].float()
    return F.adaptive_avg_pool2d(maps, request.shape)[0].permute(1, 2, 0).contiguous().cpu().numpy()


def cell_preset(preset: Preset, vectors: np.ndarray) -> Preset:
    """Return a preset with one variant for each of (R, Q, N) vectors."""
    preset = direction_preset(preset, vectors.reshape(-1, vectors.shape[2]), "activations of the photograph")
    if preset.size == "auto":
        return dataclasses.replace(preset, size=CELL_SIDE, margin=CELL_MARGIN)
    return preset


def _render_cells(
    worker: Worker, layer: Layer, canvas: tuple[int, int], on_step: Callable[[], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of all cells, (cells, H, W, C) uint8, and the values of their objectives, (cells,)."""
    config = worker.setup.config
    preset = config.render
    worker.stop = on_step
    job = worker.job(layer.name, canvas, preset)
    units = [(0, cell) for cell in range(preset.variants)]
    size = config.engine.images_per_batch(layer.channels, worker.setup.device)
    key = (layer.name, preset.name)
    batches = worker.in_batches(
        key, units, size, lambda part: draw_start(job, part, 0), lambda start: render(job, start.units, start)
    )
    pictures = list(itertools.chain.from_iterable(batches))
    return np.stack([p.image for p in pictures]), np.array([p.activation for p in pictures], np.float32)
