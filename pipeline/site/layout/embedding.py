"""All units of an atlas on a plane, near each other where they answer to the same photographs.

Each unit is the vector of its responses to the photographs whose responses the atlas keeps, centred and scaled to
length 1, so that the distance of two units follows from the correlation of their responses. UMAP (McInnes, Healy &
Melville 2018) where `umap-learn` is installed, else the first two principal components.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np

# Principal axes are found on so many units, evenly drawn, and hold for all.
FITTED = 4096
AXES = 8
GRID = 4095


def spectra(responses: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Responses of all layers, (C', n) each, as unit vectors (units, n) float32; None if a layer has none.

    A unit that never changes is the zero vector.
    """
    if not responses or any(r is None or r.shape[1] < 2 for r in responses):
        return None
    stacked = np.concatenate([np.nan_to_num(np.asarray(r, np.float32)) for r in responses])
    stacked -= stacked.mean(1, keepdims=True)
    norm = np.linalg.norm(stacked, axis=1, keepdims=True)
    return np.divide(stacked, norm, out=np.zeros_like(stacked), where=norm > 0)


def axes(vectors: np.ndarray, count: int = AXES) -> np.ndarray:
    """(units, n) → (units, count) principal components, the largest variance first; signs are made definite."""
    fitted = vectors[:: max(1, len(vectors) // FITTED)]
    middle = fitted.mean(0)
    scatter = (fitted - middle).T @ (fitted - middle)
    _, found = np.linalg.eigh(scatter.astype(np.float64))
    chosen = found[:, ::-1][:, :count]
    # An eigenvector's sign is arbitrary: make its largest element positive.
    chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), np.arange(chosen.shape[1])])
    components = (vectors - middle) @ chosen.astype(np.float32)
    return np.pad(components, ((0, 0), (0, max(0, count - components.shape[1]))))


def own_axes(vectors: np.ndarray, count: int = AXES) -> np.ndarray:
    """(units, n) → (units, count): the widest axes of one layer alone, by a few rounds of subspace iteration.

    Not those of the whole atlas, so that a layer's order does not change with another layer.
    """
    found = np.random.default_rng(0).normal(size=(vectors.shape[1], min(count, *vectors.shape))).astype(np.float32)
    for _ in range(4):
        found, _ = np.linalg.qr(vectors.T @ (vectors @ found))
    return vectors @ found


def layout(vectors: np.ndarray, components: np.ndarray) -> tuple[str, np.ndarray]:
    """(method, (units, 2) int in 0 … 4095): where each unit lies; the same vectors give the same places."""
    method, places = "PCA", components[:, :2]
    if importlib.util.find_spec("umap") is not None and len(vectors) >= 16:
        import umap  # pyright: ignore[reportMissingImports]

        method = "UMAP"
        # On a few axes, for distances among a thousand photographs cost more and say little more.
        places = umap.UMAP(n_neighbors=15, min_dist=0.3, random_state=0, n_jobs=1).fit_transform(components)
    low, high = (np.percentile(places, q, axis=0) for q in (0.2, 99.8))
    scaled = (np.asarray(places) - low) / np.maximum(high - low, 1e-9)
    return method, np.clip(np.round(scaled * GRID), 0, GRID).astype(int)


def blocks(components: np.ndarray, size: int) -> np.ndarray:
    """(n, d) → (n,) place of each unit in an order in which like units stand together, `size` to a sheet.

    The set is halved along its widest axis, at a multiple of `size`, until it fits into one sheet.
    """
    order: list[int] = []
    waiting = [np.arange(len(components))]
    while waiting:
        part = waiting.pop()
        if len(part) <= size:
            order += part.tolist()
            continue
        points = components[part]
        axis = int(np.ptp(points, axis=0).argmax())
        part = part[np.argsort(points[:, axis], kind="stable")]
        half = max(1, round(len(part) / 2 / size)) * size
        waiting += [part[half:], part[:half]]
    places = np.empty(len(components), int)
    places[order] = np.arange(len(components))
    return places


def alike(vectors: np.ndarray, rows: slice, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The units of a layer most like those in `rows`: (rows, count) numbers and correlations, best first.

    −1 where there is none: among fewer units, or for one that never changes.
    """
    found = vectors[rows] @ vectors.T
    own = np.arange(len(vectors))[rows]
    found[np.arange(len(own)), own] = -2
    found[:, ~vectors.any(1)] = -2
    found[~vectors[rows].any(1)] = -2
    # The best few first, then these in order, ties by number.
    few = np.sort(np.argpartition(-found, min(count, found.shape[1] - 1), axis=1)[:, :count], axis=1)
    ranked = np.argsort(-np.take_along_axis(found, few, 1), axis=1, kind="stable")
    order = np.take_along_axis(few, ranked, 1)
    value = np.take_along_axis(found, order, 1)
    return np.where(value > -2, order, -1), value
