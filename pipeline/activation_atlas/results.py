"""Samples of activations, their layout, and the visualizations of its cells."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# Samples nearest to the mean of a cell, and classes of a cell, that are listed.
NEAREST = 6
CLASSES = 5


@dataclasses.dataclass(frozen=True)
class SamplesPart:
    """Activations at random positions of some dataset images.

    Attributes:
        index: The images, (n,) int32.
        top: The largest output of each, (n,) int32; −1 for a network without a classifier.
        vectors: For each layer of C channels, the activations at P positions of each image, (n, P, C) float32.
        places: For each layer, row and column of these positions, (n, P, 2) int16.
        failed: Images that could not be read, with the reason.
    """

    index: np.ndarray
    top: np.ndarray
    vectors: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]
    failed: tuple[tuple[int, str], ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["SamplesPart"], failed: Sequence[tuple[int, str]] = ()) -> "SamplesPart":
        """Return several parts as one, in their order; `failed` are further images that could not be read."""
        reasons = (*(one for part in parts for one in part.failed), *failed)
        filled = [part for part in parts if len(part.index)]
        if not filled:
            empty = np.zeros(0, np.int32)
            return cls(empty, empty, (), (), reasons)
        return cls(
            np.concatenate([part.index for part in filled]),
            np.concatenate([part.top for part in filled]),
            tuple(np.concatenate(own) for own in zip(*(part.vectors for part in filled), strict=True)),
            tuple(np.concatenate(own) for own in zip(*(part.places for part in filled), strict=True)),
            reasons,
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as a shard stores them."""
        arrays = {"index": self.index, "top": self.top}
        for i, (vectors, places) in enumerate(zip(self.vectors, self.places, strict=True)):
            arrays |= {f"{i}/vectors": vectors, f"{i}/places": places}
        arrays["failed/index"] = np.array([i for i, _ in self.failed], np.int32)
        arrays["failed/reason"] = np.array([reason for _, reason in self.failed], object)
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "SamplesPart":
        """Create from the result of `arrays`."""
        count = sum(name.endswith("/vectors") for name in arrays)
        failed = zip(arrays["failed/index"].tolist(), map(str, arrays["failed/reason"].tolist()), strict=True)
        return cls(
            arrays["index"],
            arrays["top"],
            tuple(arrays[f"{i}/vectors"] for i in range(count)),
            tuple(arrays[f"{i}/places"] for i in range(count)),
            tuple(failed),
        )


@dataclasses.dataclass(frozen=True)
class AtlasLayout:
    """Samples of a layer in a plane, and the K cells of a grid over it that have enough of them.

    Attributes:
        method: How the coordinates were computed: "UMAP", "t-SNE" or "PCA".
        shrinkage: Shrinkage of the second moment that the directions are whitened by, 0 … 1.
        grid: Numbers of rows and columns.
        image: Dataset image of each of the S samples, (S,) int32.
        y: Row of its position in the map of the layer, (S,) int16.
        x: Its column.
        top: The largest output for the image, (S,) int32; −1 without a classifier.
        coordinates: Place of the sample: x from the left and y from the top, in cells, (S, 2) float32; NaN for samples
            without any activation.
        cell: Cell of the sample, (S,) int32; −1 without one.
        row: Row of each cell in the grid, (K,) int16; cells are in the order of rows and columns.
        column: Its column.
        count: Number of samples, (K,) int32.
        mean: Mean activation of the samples, (K, C) float32.
        direction: The direction that is visualized: the mean, whitened, (K, C) float32.
        nearest: Samples with the highest cosine to the mean, the best first, at most one of an image,
            (K, NEAREST) int32; −1 for none.
        classes: Most frequent largest outputs of the samples, (K, CLASSES) int32; −1 for none.
        class_count: Number of samples of each, (K, CLASSES) int32.
    """

    method: str
    shrinkage: float
    grid: tuple[int, int]
    image: np.ndarray
    y: np.ndarray
    x: np.ndarray
    top: np.ndarray
    coordinates: np.ndarray
    cell: np.ndarray
    row: np.ndarray
    column: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    direction: np.ndarray
    nearest: np.ndarray
    classes: np.ndarray
    class_count: np.ndarray

    @property
    def cells(self) -> int:
        """Number of cells that get a visualization, K."""
        return len(self.count)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name; the other values are in `attributes`."""
        return {name: getattr(self, name) for name in LAYOUT_ARRAYS}

    def attributes(self) -> dict[str, object]:
        """Return the values that are no arrays of samples or cells, by name."""
        return {"method": self.method, "shrinkage": self.shrinkage, "grid": np.array(self.grid, np.int32)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, object]) -> "AtlasLayout":
        """Create from the results of `arrays` and `attributes`."""
        rows, columns = np.asarray(attributes["grid"]).tolist()
        own = {name: arrays[name] for name in LAYOUT_ARRAYS}
        return cls(str(attributes["method"]), float(attributes["shrinkage"]), (rows, columns), **own)  # type: ignore[arg-type]


LAYOUT_ARRAYS = tuple(field.name for field in dataclasses.fields(AtlasLayout))[3:]


@dataclasses.dataclass(frozen=True)
class AtlasResult:
    """The activation atlas of a layer.

    Attributes:
        layout: The samples and cells.
        images: Visualization of each cell, (K, H, W, C) uint8.
        activation: Value of the objective for each visualization, (K,) float32.
        failed: Whether the objective did not rise above its value at the start, (K,) bool.
        device: Kinds of the devices that samples and visualizations were made on, such as "cpu".
    """

    layout: AtlasLayout
    images: np.ndarray
    activation: np.ndarray
    failed: np.ndarray
    device: str
