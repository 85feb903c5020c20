"""Concept vectors: the direction that separates images that show a concept from images that do not (TCAV).

Kim et al. 2018, "Interpretability Beyond Feature Attribution: Quantitative Testing with Concept Activation Vectors".
"""

import dataclasses

import numpy as np

from pipeline.core.errors import AtlasError
from pipeline.core.ridge import feature_scale
from pipeline.layers.dictionary_files import BIAS, CENTER, DECODER, ENCODER, Arrays

# Parts of cross-validation, and random splits of all images into two sets that the accuracy is compared with.
FOLDS, NULL_SPLITS = 5, 50
# Least number of images of either folder.
MIN_IMAGES = 10


@dataclasses.dataclass(frozen=True)
class Concept:
    """A concept vector and how well it separates.

    Attributes:
        arrays: The dictionary with one latent.
        accuracy: Share of held-out images on the right side, by cross-validation, mean of both sets.
        null: The same for random splits of all images, (`NULL_SPLITS`,).
    """

    arrays: Arrays
    accuracy: float
    null: np.ndarray

    @property
    def p_value(self) -> float:
        """Share of random splits, and this one, that separate at least as well."""
        return float((1 + (self.null >= self.accuracy).sum()) / (1 + len(self.null)))


def fit_concept(positive: np.ndarray, negative: np.ndarray, seed: int) -> Concept:
    """Fit a linear probe to spatial means of activations and compare it with random splits.

    The vector is the probe's weight in units of the activations, of length 1; the value of the latent at a position is
    the projection on it, less that of the mean of all images.

    Args:
        positive: Means of images that show the concept, (n, C).
        negative: Means of images that do not, (m, C).
        seed: Seed of the splits.

    Raises:
        AtlasError: If there are too few images.
    """
    if min(len(positive), len(negative)) < MIN_IMAGES:
        raise AtlasError(
            f"A concept needs at least {MIN_IMAGES} images in each folder; {len(positive)} and {len(negative)} can be "
            "read."
        )
    generator = np.random.default_rng(seed)
    values = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.arange(len(values)) < len(positive)
    splits = [labels, *(generator.permutation(labels) for _ in range(NULL_SPLITS))]
    accuracy = _accuracies(values, np.stack(splits, 1), generator.permutation(len(values)) % FOLDS)
    center, scale = feature_scale(values)
    weight = _probes((values - center) * scale, labels[:, None])[0][:, 0] * scale
    vector = weight / max(float(np.linalg.norm(weight)), 1e-12)
    arrays = {ENCODER: vector[:, None], DECODER: vector[None], BIAS: np.array([-center @ vector]), CENTER: center}
    plain = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    return Concept(plain, float(accuracy[0]), accuracy[1:])


def _accuracies(values: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Return the balanced accuracy on held-out images of each of several labelings, (S,), by cross-validation.

    Args:
        values: (n, C).
        labels: (n, S) bool.
        parts: Number of the part that each image is held out in, (n,).
    """
    right = np.zeros(labels.shape, bool)
    for part in range(FOLDS):
        test = parts == part
        center, scale = feature_scale(values[~test])
        weights, thresholds = _probes((values[~test] - center) * scale, labels[~test])
        right[test] = (((values[test] - center) * scale) @ weights > thresholds) == labels[test]
    return ((right & labels).sum(0) / labels.sum(0) + (right & ~labels).sum(0) / (~labels).sum(0)) / 2


def _probes(values: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit linear probes by ridge regression, with a penalty of as much as each standardized column varies.

    Args:
        values: Standardized values, (n, C).
        labels: Several labelings, (n, S) bool.

    Returns:
        Weights (C, S), and thresholds (S,) in the middle between the means of both sets.
    """
    targets = labels - labels.mean(0)
    weights = np.linalg.solve(values.T @ values + len(values) * np.eye(values.shape[1]), values.T @ targets)
    projected = values @ weights
    first, second = ((projected * side).sum(0) / np.maximum(side.sum(0), 1) for side in (labels, ~labels))
    return weights, (first + second) / 2
