"""The map of units: units with correlated activations are close to each other.

A unit is represented by the vector of its activations on the dataset images `Atlas.responses_index`, centered and
scaled to length 1, so that the distance between two units is a function of the correlation of their activations. The
vectors are projected by UMAP (McInnes, Healy & Melville 2018) if `umap-learn` is installed, else to their first two
principal components.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.activation_atlas.projection import AXES, planar

GRID = 4095


def unit_vectors(responses: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return the activations of all layers, (C', n) each, as unit vectors, (units, n) float32.

    A unit whose activation never changes is the zero vector. None if a layer has no activations.
    """
    if not responses or any(r is None or r.shape[1] < 2 for r in responses):
        return None
    stacked = np.concatenate([np.nan_to_num(np.asarray(r, np.float32)) for r in responses])
    stacked -= stacked.mean(1, keepdims=True)
    norm = np.linalg.norm(stacked, axis=1, keepdims=True)
    return np.divide(stacked, norm, out=np.zeros_like(stacked), where=norm > 0)


def layer_components(vectors: np.ndarray, count: int = AXES) -> np.ndarray:
    """Return the leading components of one layer, (units, n) → (units, count), by four steps of subspace iteration.

    They are computed for the layer alone, so that the order of its units does not depend on other layers.
    """
    basis = np.random.default_rng(0).normal(size=(vectors.shape[1], min(count, *vectors.shape))).astype(np.float32)
    for _ in range(4):
        basis, _ = np.linalg.qr(vectors.T @ (vectors @ basis))
    return vectors @ basis


def project(components: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the coordinates of all units on the map; the same vectors give the same coordinates.

    Args:
        components: Principal components of their unit vectors (`unit_vectors`), (units, count).

    Returns:
        The name of the method, and the coordinates, (units, 2) int, 0 … 4095.
    """
    method, places = planar(components, ("UMAP",))
    low, high = (np.percentile(places, q, axis=0) for q in (0.2, 99.8))
    scaled = (np.asarray(places) - low) / np.maximum(high - low, 1e-9)
    return method, np.clip(np.round(scaled * GRID), 0, GRID).astype(int)


def sheet_order(components: np.ndarray, size: int) -> np.ndarray:
    """Return the place of each unit in an order that puts similar units on the same sheet, (n, d) → (n,).

    The set is halved along its widest axis, at a multiple of `size`, until each part fits on a sheet of `size` units.
    """
    order: list[int] = []
    pending = [np.arange(len(components))]
    while pending:
        part = pending.pop()
        if len(part) <= size:
            order += part.tolist()
            continue
        points = components[part]
        axis = int(np.ptp(points, axis=0).argmax())
        part = part[np.argsort(points[:, axis], kind="stable")]
        half = max(1, round(len(part) / 2 / size)) * size
        pending += [part[half:], part[:half]]
    places = np.empty(len(components), int)
    places[order] = np.arange(len(components))
    return places
