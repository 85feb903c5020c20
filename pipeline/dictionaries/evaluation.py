"""How well a dictionary reconstructs activations, and how many of its latents are used."""

import dataclasses

import numpy as np
import torch

from pipeline.layers.dictionaries import Dictionary, encode

ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Fit:
    """Measures of a dictionary.

    Attributes:
        explained_variance: 1 − Σ |x − x̂|² ÷ Σ |x − mean|² over held-out rows; at most 1.
        l0: Mean number of latents that are not 0 at a position of held-out images.
        dead: Share of latents that are 0 at all positions of all images that were read.
    """

    explained_variance: float
    l0: float
    dead: float


def evaluate(dictionary: Dictionary, train: np.ndarray, held_out: np.ndarray) -> Fit:
    """Return the measures of a dictionary on activations (n, C) and held-out ones (m, C)."""
    active = np.zeros(dictionary.latents, bool)
    for start in range(0, len(train), ROWS):
        active |= (encode(dictionary, torch.from_numpy(train[start : start + ROWS])) != 0).any(0).numpy()
    error, count = 0.0, 0
    decoder, center = torch.from_numpy(dictionary.decoder), torch.from_numpy(dictionary.center)
    for start in range(0, len(held_out), ROWS):
        x = torch.from_numpy(held_out[start : start + ROWS])
        values = encode(dictionary, x)
        active |= (values != 0).any(0).numpy()
        count += int((values != 0).sum())
        error += float((x - values @ decoder - center).double().square().sum())
    variance = float(np.square(held_out.astype(np.float64) - held_out.astype(np.float64).mean(0)).sum())
    return Fit(1 - error / max(variance, 1e-12), count / max(1, len(held_out)), float(1 - active.mean()))
