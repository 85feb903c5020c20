"""How unlike two pictures are, wherever in them things stand: by their colours, and by the scale of their detail."""

import functools
from itertools import combinations

import numpy as np
from PIL import Image

SIDE = 64
LEVELS = 4
RINGS = 10
FEATURES = LEVELS**3 + RINGS


def features(image: Image.Image) -> np.ndarray:
    """(74,) shares of an RGB picture: 64 of its pixels by colour, and 10 of its energy by scale; each part sums to 1.

    Colours are binned in 4 × 4 × 4 (Swain & Ballard, "Color indexing", IJCV 7, 1991); energy is that of the Fourier
    transform of its 64 × 64 luminance without the mean, in rings half an octave wide. Neither knows where
    in the picture anything is: two pictures of a unit never put it at the same place. A picture without contrast has
    all its energy in the first ring.
    """
    small = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0))
    bins = (small.astype(np.int64) * LEVELS // 256) @ np.array([LEVELS * LEVELS, LEVELS, 1])
    colours = np.bincount(bins.ravel(), minlength=LEVELS**3) / SIDE**2
    grey = small.astype(np.float64).mean(2)
    energy = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    rings = np.bincount(_rings().ravel(), energy.ravel(), RINGS)
    total = rings.sum()
    scales = rings / total if total > 1e-6 else np.eye(RINGS)[0]
    return np.concatenate([colours, scales])


@functools.cache
def _rings() -> np.ndarray:
    """(64, 64) number of the ring that each frequency lies in: half octaves from 1 cycle a picture up."""
    along = np.fft.fftfreq(SIDE) * SIDE
    radius = np.hypot(along[:, None], along[None, :])
    return np.clip(np.floor(2 * np.log2(np.maximum(radius, 1))), 0, RINGS - 1).astype(np.int64)


def difference(found: np.ndarray) -> np.ndarray:
    """(n contenders, C, 74) features → (C,) mean difference of the pairs that are there, 0 (alike) … 1; NaN of none.

    Of a pair: half the absolute difference of shares, summed (total variation distance), the mean of both parts.
    """
    pairs = [np.abs(found[a] - found[b]) for a, b in combinations(range(len(found)), 2)]
    cut = LEVELS**3
    each = np.array([(p[:, :cut].sum(1) + p[:, cut:].sum(1)) / 4 for p in pairs])
    there = np.isfinite(each)
    count = there.sum(0)
    return np.where(count > 0, np.where(there, each, 0).sum(0) / np.maximum(count, 1), np.nan)
