"""Dictionaries without training by gradient: PCA, ICA and NMF of activations, and given directions."""

import warnings
from typing import Any

import numpy as np
from sklearn.decomposition import NMF, PCA, FastICA
from sklearn.exceptions import ConvergenceWarning

from pipeline.core.errors import AtlasError
from pipeline.core.seeds import seed_of
from pipeline.dictionaries.config import DictionaryConfig
from pipeline.layers.dictionary_files import BIAS, CENTER, DECODER, ENCODER, Arrays

# Most rows that a decomposition is fitted to; drawn at random.
MAX_ROWS = 50_000
# The covariance of whitened directions gets so much of its mean eigenvalue on the diagonal, as in activation atlases.
SHRINKAGE = 0.01


def decompose(rows: np.ndarray, config: DictionaryConfig) -> tuple[Arrays, str]:
    """Return the arrays of a dictionary by "pca", "ica" or "nmf", and its gate.

    - PCA: directions of the largest variance; values are centered projections.
    - ICA (FastICA): independent components, each of variance 1.
    - NMF: non-negative parts of rectified activations. The encoder is the pseudoinverse of the parts behind a ReLU, an
      approximation of the non-negative least squares of NMF itself.

    Args:
        rows: Activations, (n, C) float32.
        config: `method`, `latents` and `seed` are used.

    Raises:
        AtlasError: If there are more latents than channels or rows.
    """
    latents = config.latents or min(rows.shape[1], 64)
    if latents > min(rows.shape):
        raise AtlasError(
            f"latents={latents}: {config.method} finds at most {min(rows.shape)} in {len(rows):,} rows of "
            f"{rows.shape[1]} channels."
        )
    state = seed_of(config.seed, config.method) % 2**32
    if len(rows) > MAX_ROWS:
        rows = rows[np.sort(np.random.default_rng(state).permutation(len(rows))[:MAX_ROWS])]
    if config.method == "nmf":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            settings: dict[str, Any] = {"n_components": latents, "init": "nndsvda", "max_iter": 200}
            nmf: Any = NMF(**settings, random_state=state)
            nmf.fit(np.maximum(rows, 0))
        parts = nmf.components_ / np.maximum(np.linalg.norm(nmf.components_, axis=1, keepdims=True), 1e-12)
        return _arrays(np.linalg.pinv(parts), parts, np.zeros(rows.shape[1])), "relu"
    if config.method == "pca":
        pca: Any = PCA(latents, svd_solver="full", random_state=state).fit(rows)
        return _arrays(pca.components_.T, pca.components_, pca.mean_), "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica: Any = FastICA(latents, whiten="unit-variance", random_state=state, max_iter=400)
        ica.fit(rows.astype(np.float64))
    return _arrays(ica.components_.T, ica.mixing_.T, ica.mean_), "none"


def _arrays(encoder: np.ndarray, decoder: np.ndarray, center: np.ndarray) -> Arrays:
    """Return the arrays of z = W (x − center), x ≈ D z + center."""
    bias = -center @ encoder
    arrays = {ENCODER: encoder, DECODER: decoder, BIAS: bias, CENTER: center}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in arrays.items()}


def directions(vectors: np.ndarray, rows: np.ndarray | None) -> Arrays:
    """Return the arrays of given directions, whitened if rows are given.

    The value of a whitened direction v is vᵀ Σ⁻¹ (x − μ): the direction in which the activations differ most from their
    distribution for one unit of v, as in Carter et al. 2019, "Activation Atlas".

    Args:
        vectors: Directions, (N, C).
        rows: Activations (n, C), of which the covariance Σ and the mean μ are taken; None without whitening.
    """
    vectors = np.atleast_2d(np.asarray(vectors, np.float64))
    if rows is None:
        return _arrays(vectors.T, vectors, np.zeros(vectors.shape[1]))
    covariance = np.cov(rows.astype(np.float64), rowvar=False).reshape(vectors.shape[1], vectors.shape[1])
    covariance += SHRINKAGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return _arrays(np.linalg.solve(covariance, vectors.T), vectors, rows.astype(np.float64).mean(0))
