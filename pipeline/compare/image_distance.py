"""Distance between two images by their colors and by the spatial scales of their details, regardless of position."""

import functools
from itertools import combinations

import numpy as np
from PIL import Image

SIDE = 64
LEVELS = 4
RINGS = 10
FEATURES = LEVELS**3 + RINGS


def features(image: Image.Image) -> np.ndarray:
    """Return the (74,) features of an RGB image: a histogram of 64 colors and one of energy at 10 scales.

    Colors are binned in 4 × 4 × 4 (Swain & Ballard, "Color indexing", IJCV 7, 1991). Energy is the squared amplitude of
    the Fourier transform of the 64 × 64 luminance without its mean, in rings half an octave wide. Each histogram sums
    to 1. Neither depends on position, because two visualizations of a unit never show a feature at the same place.
    All the energy of an image without contrast is in the first ring.
    """
    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0))
    bins = (small.astype(np.int64) * LEVELS // 256) @ np.array([LEVELS * LEVELS, LEVELS, 1])
    colors = np.bincount(bins.ravel(), minlength=LEVELS**3) / SIDE**2
    luminance = small.astype(np.float64).mean(2)
    energy = np.abs(np.fft.fft2(luminance - luminance.mean())) ** 2
    rings = np.bincount(_rings().ravel(), energy.ravel(), RINGS)
    total = rings.sum()
    scales = rings / total if total > 1e-6 else np.eye(RINGS)[0]
    return np.concatenate([colors, scales])


@functools.cache
def _rings() -> np.ndarray:
    """Return the (64, 64) ring index of each frequency: half octaves upwards from 1 cycle per image."""
    along = np.fft.fftfreq(SIDE) * SIDE
    radius = np.hypot(along[:, None], along[None, :])
    return np.clip(np.floor(2 * np.log2(np.maximum(radius, 1))), 0, RINGS - 1).astype(np.int64)


def difference(image_features: np.ndarray) -> np.ndarray:
    """Return the mean distance between the contenders' images of each unit.

    The distance of a pair is the mean of two total variation distances (half the sum of absolute differences), one of
    the color histograms and one of the scale histograms.

    Args:
        image_features: (n contenders, C, 74) features; NaN for a missing image.

    Returns:
        (C,) means over the pairs that exist, 0 (identical histograms) to 1; NaN without a pair.
    """
    pairs = [np.abs(image_features[a] - image_features[b]) for a, b in combinations(range(len(image_features)), 2)]
    colors = LEVELS**3
    distances = np.array([(p[:, :colors].sum(1) + p[:, colors:].sum(1)) / 4 for p in pairs])
    exists = np.isfinite(distances)
    count = exists.sum(0)
    return np.where(count > 0, np.where(exists, distances, 0).sum(0) / np.maximum(count, 1), np.nan)
