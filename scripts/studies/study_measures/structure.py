"""The lattice at the periods of the strides of a network, also for images that were made without them."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.store.reader import open_atlas

# Periods in pixels of the strides before and in the layers of this study.
PERIODS = (2, 4, 8)
# Frequencies next to a multiple of a stride's, in bins, that it is compared with.
NEIGHBORS = (1, 2, 3)


def lattice(images: np.ndarray) -> np.ndarray:
    """Return the energy at the frequencies of a lattice divided by that of their neighbors, (N,).

    At the multiples of 1 / p cycles per pixel along each axis for p in 2, 4 and 8, without 0: the mean of the power
    spectrum of the lightness over the lattice's bins, divided by the mean over bins 1 to 3 beside them. 1 for an image
    without a lattice.

    Args:
        images: (N, H, W, 3) uint8, with sides that are multiples of 8.
    """
    light = images.astype(np.float64).mean(-1) / 255
    light -= light.mean((1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(light)) ** 2
    height, width = power.shape[1:]
    at, beside = np.zeros(len(images)), np.zeros(len(images))
    largest = max(PERIODS)
    rows, columns = height // largest, width // largest
    count = 0
    for i in range(0, largest, 1):
        for j in range(0, largest, 1):
            if i == j == 0:
                continue
            y, x = i * rows, j * columns
            at += power[:, y, x]
            near = [power[:, (y + dy * a) % height, (x + dx * a) % width]
                    for a in NEIGHBORS for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]  # fmt: skip
            beside += np.mean(near, 0)
            count += 1
    return at / np.maximum(beside, 1e-12 * count)


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the units of a run with the column `lattice`."""
    parts = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            for preset in layer.presets:
                images = layer.images(preset)[:]
                units, variants = images.shape[:2]
                parts.append(
                    pd.DataFrame(
                        {
                            "layer": layer.name,
                            "preset": preset,
                            "channel": np.repeat(layer.channels, variants),
                            "variant": np.tile(np.arange(variants), units),
                            "lattice": lattice(images.reshape(-1, *images.shape[2:])),
                        }
                    )
                )
    return frame.merge(pd.concat(parts), on=["layer", "preset", "channel", "variant"], how="left")
