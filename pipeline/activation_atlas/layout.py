"""Layout of sampled activations: whitening, coordinates in a plane, and the cells of a grid.

After Carter, Armstrong, Schubert, Johnson & Olah 2019, "Activation Atlas" (Distill): samples with similar activations
are put side by side, those of a cell of a grid are averaged, and the average is visualized. The direction that is
visualized is the mean multiplied by the inverse of the second moment of the samples (whitened): without it, the
directions that all samples share dominate every cell.
"""

import numpy as np

from pipeline.activation_atlas.projection import planar, principal_components
from pipeline.activation_atlas.results import CLASSES, NEAREST, AtlasLayout, SamplesPart

# Principal components of the unit vectors that samples are laid out by.
COMPONENTS = 48

# Lower bound of the shrinkage: channels that are never active would else have an infinite inverse.
LEAST_SHRINKAGE = 0.01

# Coordinates end at these percentiles, so that single distant samples do not compress all others.
EDGES = (0.5, 99.5)


def shrunk_moment(vectors: np.ndarray, shrinkage: float | None = None) -> tuple[np.ndarray, float]:
    """Return the second moment of S vectors of C channels, shrunk towards a multiple of the identity.

    It is (1 − λ) M + λ (tr M / C) I with M = Σ x xᵀ / S, as in lucid's activation atlas not centered at the mean.

    Args:
        vectors: The vectors, (S, C).
        shrinkage: λ from 0 to 1; None for the one of Ledoit & Wolf 2004 ("A well-conditioned estimator for
            large-dimensional covariance matrices"), which is the smaller the more samples there are, and at least
            `LEAST_SHRINKAGE`.

    Returns:
        The second moment (C, C) float64, and λ.
    """
    x = np.asarray(vectors, np.float64)
    count, channels = x.shape
    moment = x.T @ x / max(count, 1)
    size = float(np.trace(moment)) / channels
    if shrinkage is None:
        distance = float(np.square(moment).sum()) - channels * size**2
        scatter = (float(np.square(np.square(x).sum(1)).mean()) - float(np.square(moment).sum())) / max(count, 1)
        shrinkage = max(LEAST_SHRINKAGE, min(1.0, scatter / distance)) if distance > 1e-12 * size**2 else 1.0
    return (1 - shrinkage) * moment + shrinkage * size * np.eye(channels), shrinkage


def whitening(moment: np.ndarray) -> np.ndarray:
    """Return the symmetric matrix W with W M W = I for a second moment M, (C, C); 0 where M is 0."""
    values, vectors = np.linalg.eigh(moment)
    usable = values > max(float(values.max()), 0.0) * 1e-12
    scale = np.where(usable, 1 / np.sqrt(np.where(usable, values, 1.0)), 0.0)
    return (vectors * scale) @ vectors.T


def place(vectors: np.ndarray, grid: int) -> tuple[str, np.ndarray, tuple[int, int]]:
    """Return coordinates of vectors in a plane, by the angles between them after their mean was subtracted.

    Args:
        vectors: The vectors, (S, C), S > 0.
        grid: Number of cells on the longer side.

    Returns:
        The name of the method; x and y of each vector in cells, (S, 2) float32; and the numbers of rows and columns.
    """
    centered = vectors - vectors.mean(0, dtype=np.float64).astype(np.float32)
    method, places = planar(principal_components(_unit(centered), COMPONENTS))
    places = np.asarray(places, np.float64)
    low, high = np.percentile(places, EDGES, axis=0)
    # One scale for both axes: distances in the plane are all that the layout means.
    scale = max(float((high - low).max()), 1e-12)
    shape = np.maximum(np.ceil((high - low) / scale * grid - 1e-6), 1).astype(int)
    cells = np.clip((places - low) / scale * grid, 0, shape - 1e-4)
    return method, cells.astype(np.float32), (int(shape[1]), int(shape[0]))


def lay_out(samples: SamplesPart, number: int, grid: int, min_count: int) -> AtlasLayout:
    """Return the layout of the samples of a layer.

    Samples without any activation have no direction, and are in no cell.

    Args:
        samples: All samples.
        number: Number of the layer among those of the samples.
        grid: Number of cells on the longer side.
        min_count: Smallest number of samples of a cell.
    """
    vectors = samples.vectors[number] if samples.vectors else np.zeros((0, 1, 1), np.float32)
    positions, channels = vectors.shape[1:]
    vectors = vectors.reshape(-1, channels)
    places = samples.places[number].reshape(-1, 2) if samples.places else np.zeros((0, 2), np.int16)
    image, top = (np.repeat(values, positions).astype(np.int32) for values in (samples.index, samples.top))
    active = np.flatnonzero(np.isfinite(vectors).all(1) & vectors.any(1))
    coordinates = np.full((len(vectors), 2), np.nan, np.float32)
    method, shape, shrinkage = "PCA", (1, 1), 1.0
    cell = np.full(len(vectors), -1, np.int32)
    keys = np.zeros(0, np.int64)
    if len(active):
        method, coordinates[active], shape = place(vectors[active], grid)
        column, row = np.floor(coordinates[active]).astype(np.int64).T
        found, inverse, counts = np.unique(row * shape[1] + column, return_inverse=True, return_counts=True)
        numbers = np.where(counts >= min_count, np.cumsum(counts >= min_count) - 1, -1)
        cell[active] = numbers[inverse]
        keys = found[counts >= min_count]
    mean = _means(vectors, cell, len(keys))
    direction = np.zeros_like(mean)
    if len(keys):
        moment, shrinkage = shrunk_moment(vectors[active])
        matrix = whitening(moment)
        # Of length 1: the objective, and the step sizes with it, must not depend on the cell.
        direction = _unit(mean.astype(np.float64) @ matrix @ matrix).astype(np.float32)
    classes, class_count = _classes(top, cell, len(keys))
    return AtlasLayout(
        method=method,
        shrinkage=float(shrinkage),
        grid=shape,
        image=image,
        y=places[:, 0].astype(np.int16),
        x=places[:, 1].astype(np.int16),
        top=top,
        coordinates=coordinates,
        cell=cell,
        row=(keys // shape[1]).astype(np.int16),
        column=(keys % shape[1]).astype(np.int16),
        count=np.bincount(cell[cell >= 0], minlength=len(keys)).astype(np.int32),
        mean=mean,
        direction=direction,
        nearest=_nearest_samples(vectors, image, cell, mean),
        classes=classes,
        class_count=class_count,
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (K, C) of length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _means(vectors: np.ndarray, cell: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of the vectors of each cell, (count, C) float32."""
    mean = np.zeros((count, vectors.shape[1]), np.float64)
    inside = cell >= 0
    np.add.at(mean, cell[inside], vectors[inside].astype(np.float64))
    return (mean / np.maximum(np.bincount(cell[inside], minlength=count), 1)[:, None]).astype(np.float32)


def _nearest_samples(vectors: np.ndarray, image: np.ndarray, cell: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the samples nearest to the mean of each cell, (K, NEAREST) int32; see `AtlasLayout.nearest`."""
    nearest = np.full((len(mean), NEAREST), -1, np.int32)
    order = np.argsort(cell, kind="stable")
    ends = np.searchsorted(cell[order], np.arange(len(mean) + 1))
    for number, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        own = order[start:end]
        norms = np.linalg.norm(vectors[own], axis=1) * np.linalg.norm(mean[number])
        cosine = vectors[own] @ mean[number] / np.maximum(norms, 1e-12)
        ranked = own[np.argsort(-cosine, kind="stable")]
        first = np.sort(np.unique(image[ranked], return_index=True)[1])[:NEAREST]
        nearest[number, : len(first)] = ranked[first]
    return nearest


def _classes(top: np.ndarray, cell: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most frequent classes of each cell and their numbers of samples, (K, CLASSES) int32 each."""
    classes = np.full((count, CLASSES), -1, np.int32)
    numbers = np.zeros((count, CLASSES), np.int32)
    known = (cell >= 0) & (top >= 0)
    if not known.any():
        return classes, numbers
    width = int(top.max()) + 1
    pairs, counts = np.unique(cell[known].astype(np.int64) * width + top[known], return_counts=True)
    order = np.lexsort((pairs, -counts, pairs // width))
    owner = pairs[order] // width
    rank = np.arange(len(order)) - np.searchsorted(owner, owner)
    kept = rank < CLASSES
    classes[owner[kept], rank[kept]] = (pairs[order] % width)[kept]
    numbers[owner[kept], rank[kept]] = counts[order][kept]
    return classes, numbers
