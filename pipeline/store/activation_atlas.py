"""Activation atlases of layers in `atlas.h5`: what the writer stores, and what the reader returns."""

import dataclasses
from collections.abc import Iterator

import h5py
import numpy as np
import pandas as pd

from pipeline.activation_atlas.results import AtlasResult
from pipeline.store import hdf5
from pipeline.store.hdf5 import write_array

GROUP = "activation_atlas"

# Arrays of the group by the field of `AtlasLayout`.
SAMPLE_ARRAYS = {name: f"samples/{name}" for name in ("image", "y", "x", "top", "coordinates", "cell")}
CELL_ARRAYS = ("row", "column", "count", "mean", "direction", "nearest", "classes", "class_count")


def write_activation_atlas(group: h5py.Group, result: AtlasResult) -> None:
    """Write the activation atlas of a layer into its group."""
    target, layout = group.create_group(GROUP), result.layout
    for name, value in layout.attributes().items():
        target.attrs[name] = value
    target.attrs["device"] = result.device
    for name, path in SAMPLE_ARRAYS.items():
        write_array(target, path, getattr(layout, name))
    for name in CELL_ARRAYS:
        write_array(target, name, getattr(layout, name))
    images = result.images[:, None]  # a stack of images is chunked by image, and has their digests
    write_array(target, "images", images)
    write_array(target, "images_sha256", hdf5.image_digests(images))
    write_array(target, "activation", result.activation)
    write_array(target, "failed", result.failed)


@dataclasses.dataclass(frozen=True)
class ActivationAtlas:
    """The activation atlas of a layer: S samples of its activations in a plane, and K cells of a grid over it.

    Attributes:
        layer: Name of the layer.
        method: How the plane was computed: "UMAP", "t-SNE" or "PCA".
        shrinkage: Shrinkage of the second moment that directions are whitened by, 0 … 1.
        grid: Numbers of rows and columns of the grid.
        images: Visualization of each cell, (K, H, W, C) uint8.
        row: Row of each cell, (K,).
        column: Its column, (K,).
        count: Number of samples of each cell, (K,).
        mean: Mean activation of the samples of each cell, (K, N) float32 for N channels.
        direction: What is visualized: the mean times the inverse second moment of all samples, of length 1, (K, N).
        activation: Value of the objective for each visualization, (K,) float32.
        failed: Whether the objective did not rise above its value at the start, (K,) bool.
        nearest: Samples nearest to the mean of each cell, by cosine, the best first, (K, n); −1 for none.
        classes: Most frequent largest outputs of the network in each cell, (K, k); −1 for none.
        class_count: Number of samples of each of these, (K, k).
        image: Dataset image of each sample, (S,).
        y: Row of its position in the layer's map, (S,).
        x: Its column, (S,).
        top: The largest output of the network for the image of each sample, (S,); −1 without a classifier.
        coordinates: Place of each sample in cells from the left and from the top, (S, 2) float32; NaN for samples
            without any activation.
        cell: Cell of each sample, (S,); −1 without one.
    """

    layer: str
    method: str
    shrinkage: float
    grid: tuple[int, int]
    images: np.ndarray
    row: np.ndarray
    column: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    direction: np.ndarray
    activation: np.ndarray
    failed: np.ndarray
    nearest: np.ndarray
    classes: np.ndarray
    class_count: np.ndarray
    image: np.ndarray
    y: np.ndarray
    x: np.ndarray
    top: np.ndarray
    coordinates: np.ndarray
    cell: np.ndarray

    @property
    def sheet(self) -> np.ndarray:
        """All cells at their places, (rows · H, columns · W, C) uint8; empty cells are white."""
        height, width, channels = self.images.shape[1:]
        rows, columns = self.grid
        sheet = np.full((rows, columns, height, width, channels), 255, np.uint8)
        sheet[self.row, self.column] = self.images
        return sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)

    def share(self, output: int) -> np.ndarray:
        """Return the share of the samples of each cell whose largest output is `output`, (K,) float64."""
        inside = (self.cell >= 0) & (self.top == output)
        return np.bincount(self.cell[inside], minlength=len(self.count)) / np.maximum(self.count, 1)

    def samples(self, cell: int) -> pd.DataFrame:
        """Return the samples of a cell: dataset image, row y and column x in the layer's map, and largest output."""
        own = self.cell == cell
        return pd.DataFrame({name: getattr(self, name)[own] for name in ("image", "y", "x", "top")})


def activation_atlas_faults(group: h5py.Group, dataset_images: int) -> Iterator[str]:
    """Yield what is wrong with the activation atlas in the group of a layer; nothing if there is none.

    Args:
        group: The group of the layer.
        dataset_images: Number of images of the dataset.
    """
    found = read_activation_atlas(group)
    if found is None:
        return
    limits = (
        ("dataset image", found.image, dataset_images),
        ("cell", found.cell, len(found.count)),
        ("nearest sample", found.nearest, len(found.image)),
    )
    yield from hdf5.faults_of_images(hdf5.group(group, GROUP), "the activation atlas", found.images, limits)


@dataclasses.dataclass(frozen=True)
class AtlasExtent:
    """Size of an activation atlas, read without its images and samples.

    Attributes:
        cells: Number of cells with a visualization.
        samples: Number of samples.
        images: Number of dataset images that they are from.
        grid: Numbers of rows and columns of the grid.
        method: How the samples were laid out.
    """

    cells: int
    samples: int
    images: int
    grid: tuple[int, int]
    method: str


def read_extent(group: h5py.Group) -> AtlasExtent | None:
    """Return the extent of the activation atlas in the group of a layer; None if there is none."""
    if GROUP not in group:
        return None
    stored = hdf5.group(group, GROUP)
    rows, columns = hdf5.integer_attribute(stored, "grid")
    image = hdf5.read_array(stored, SAMPLE_ARRAYS["image"])
    cells = hdf5.dataset(stored, "count").shape[0]
    method = hdf5.text_attribute(stored, "method")
    return AtlasExtent(cells, len(image), len(np.unique(image)), (rows, columns), method)


def read_activation_atlas(group: h5py.Group) -> ActivationAtlas | None:
    """Return the activation atlas in the group of a layer; None if there is none."""
    if GROUP not in group:
        return None
    stored = hdf5.group(group, GROUP)
    rows, columns = hdf5.integer_attribute(stored, "grid")
    arrays = {name: hdf5.read_array(stored, path) for name, path in SAMPLE_ARRAYS.items()}
    arrays |= {name: hdf5.read_array(stored, name) for name in (*CELL_ARRAYS, "activation", "failed")}
    return ActivationAtlas(
        layer=hdf5.text_attribute(group, "name"),
        method=hdf5.text_attribute(stored, "method"),
        shrinkage=float(np.asarray(stored.attrs["shrinkage"])),
        grid=(rows, columns),
        images=hdf5.read_array(stored, "images")[:, 0],
        **arrays,
    )
