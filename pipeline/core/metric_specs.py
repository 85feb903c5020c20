"""Metrics of feature visualizations and their ranges. Importable without PyTorch, for code that only reads results."""

import math

import numpy as np

# Metrics computed together with each visualization, with their ranges.
IMAGE_METRICS = {
    "high_frequency": (0.0, 1.0),
    "checkerboard": (0.0, math.inf),
    "total_variation": (0.0, 1.0),
    "spectral_distance": (0.0, math.inf),
    "saturated": (0.0, 1.0),
    "rank": (1.0, math.inf),
}

# Metrics computed once all visualizations are available, with their ranges.
DERIVED_METRICS = {"agreement": (-1.0, 1.0), "transfer": (-1.0, 1.0)}


def activation_ratio(activation: np.ndarray, dataset_max: np.ndarray, negative: bool) -> np.ndarray:
    """Return the activation ratio: activation of a visualization ÷ best activation over the dataset.

    The ratio has no unit. Above 1 the visualization exceeds every dataset image.

    Args:
        activation: Activations of the visualizations, (C, V) for C channels with V visualizations each.
        dataset_max: Best activation over the dataset, (C,); the smallest one if `negative`.
        negative: Whether the visualizations minimize the activation; both values are then below zero.

    Returns:
        (C, V) float32. NaN where the dataset's best activation is zero or has the wrong sign.
    """
    best = np.asarray(dataset_max, np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(-best > 0 if negative else best > 0, activation / best, np.nan).astype(np.float32)
