"""What is measured of a picture, within which ends, and achieved ÷ natural; without torch, for those who only read."""

import math

import numpy as np

# Measures of each picture that are made with it, and what is made of them when all are there; the ends of each.
MEASURES = {
    "high_frequency": (0.0, 1.0),
    "checkerboard": (0.0, math.inf),
    "total_variation": (0.0, 1.0),
    "spectral_distance": (0.0, math.inf),
    "saturated": (0.0, 1.0),
    "rank": (1.0, math.inf),
}
RELATIONS = {"agreement": (-1.0, 1.0), "transfer": (-1.0, 1.0)}


def gain(reached: np.ndarray, natural: np.ndarray, negative: bool) -> np.ndarray:
    """Achieved ÷ natural: `reached` (C', V) by pictures, by the best photograph `natural` (C',) → (C', V) float32.

    Without unit; above 1 the picture goes beyond every photograph. Of a `negative` both are below zero. NaN where the
    photographs never came to the right side of zero, for a ratio to that says nothing.
    """
    best = np.asarray(natural, np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(-best > 0 if negative else best > 0, reached / best, np.nan).astype(np.float32)
