"""Projections of vectors to a plane, in which similar vectors are close to each other.

By UMAP (McInnes, Healy & Melville 2018, arXiv 1802.03426) if `umap-learn` is installed, by t-SNE (van der Maaten &
Hinton 2008) if `scikit-learn` is, else to the first two principal components.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np

# Principal components are computed from about this many vectors, evenly spaced, and applied to all.
FITTED = 4096
AXES = 8

# Fewer vectors are projected to principal components: they have too few neighbors for the other methods.
FEWEST = 16
# Vectors that t-SNE lays out at most, evenly spaced, in about a minute; each of the others is placed at its nearest.
MOST_TSNE = 12_000
PERPLEXITY = 30.0
# Vectors that are compared with all others at once.
BLOCK = 1024


def principal_components(vectors: np.ndarray, count: int = AXES) -> np.ndarray:
    """Return principal components, (units, n) → (units, count), by decreasing variance and with fixed signs."""
    sample = vectors[:: max(1, len(vectors) // FITTED)]
    mean = sample.mean(0)
    scatter = (sample - mean).T @ (sample - mean)
    _, eigenvectors = np.linalg.eigh(scatter.astype(np.float64))
    directions = eigenvectors[:, ::-1][:, :count]
    # The sign of an eigenvector is arbitrary: make its largest element positive.
    largest = directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])]
    directions = directions * np.sign(largest)
    components = (vectors - mean) @ directions.astype(np.float32)
    return np.pad(components, ((0, 0), (0, max(0, count - components.shape[1]))))


def planar(components: np.ndarray, methods: Sequence[str] = ("UMAP", "t-SNE")) -> tuple[str, np.ndarray]:
    """Return the name of the method and coordinates in a plane, (n, d) → (n, 2); the same input gives the same output.

    Args:
        components: Principal components of the vectors, by decreasing variance.
        methods: Methods to use if they are installed, the best first; principal components otherwise.
    """
    packages = {"UMAP": "umap", "t-SNE": "sklearn"}
    for method in methods if len(components) >= FEWEST else ():
        if importlib.util.find_spec(packages[method]) is not None:
            return method, _umap(components) if method == "UMAP" else _tsne(components)
    return "PCA", components[:, :2]


def _umap(components: np.ndarray) -> np.ndarray:
    import umap  # pyright: ignore[reportMissingImports]

    # On a few components: distances in a thousand dimensions cost more and hardly change the map.
    return np.asarray(umap.UMAP(n_neighbors=15, min_dist=0.3, random_state=0, n_jobs=1).fit_transform(components))


def _tsne(components: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE  # pyright: ignore[reportMissingImports]
    from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingImports]

    chosen = np.unique(np.linspace(0, len(components) - 1, min(len(components), MOST_TSNE)).round().astype(int))
    fitted = np.ascontiguousarray(components[chosen], np.float32)
    perplexity = min(PERPLEXITY, (len(fitted) - 1) / 3)
    # The gradient is summed over threads: with one, the sum does not depend on their number.
    with threadpool_limits(1):
        # Begun from the principal components, which keep the large structure.
        start = fitted[:, :2] / max(float(fitted[:, 0].std()), 1e-12) * 1e-4
        method = TSNE(perplexity=perplexity, init=start, learning_rate="auto", random_state=0)  # type: ignore[arg-type]
        places = method.fit_transform(fitted)
    return places if len(chosen) == len(components) else places[_nearest(components, fitted)]


def _nearest(vectors: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return the row of `among` (m, d) that is nearest to each of `vectors` (n, d), (n,)."""
    squares = np.square(among).sum(1)
    blocks = [vectors[i : i + BLOCK] for i in range(0, len(vectors), BLOCK)]
    return np.concatenate([(squares - 2 * block @ among.T).argmin(1) for block in blocks])
