"""Effective number of different images of a unit, by activations before its layer and by coarse pixels."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.store.reader import open_atlas

COARSE = 16


def effective_number(responses: np.ndarray) -> np.ndarray:
    """Return the effective number of different visualizations of each unit, (G,), from 1 to V.

    exp(−Σ λ log λ) over the eigenvalues λ of K / V, where K are the cosines between the responses to the V
    visualizations of a unit after subtracting the mean over all visualizations: 1 if all are equal, V if all are
    orthogonal. Negative cosines are not clipped. Source: Friedman & Dieng 2023, "The Vendi Score".

    Args:
        responses: Responses to V visualizations of each unit, (G, V, C).
    """
    centered = responses - responses.reshape(-1, responses.shape[-1]).mean(0)
    unit = centered / np.maximum(np.linalg.norm(centered, axis=-1, keepdims=True), 1e-12)
    shares = np.linalg.eigvalsh(unit @ unit.transpose(0, 2, 1) / responses.shape[1]).clip(0)
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.exp(-(shares * logs).sum(-1))


def coarse(images: np.ndarray) -> np.ndarray:
    """Return (G, V, H, W, 3) uint8 images as 16 × 16 colors in [0, 1], flattened, (G, V, 768)."""
    small = [
        np.asarray(Image.fromarray(image).resize((COARSE, COARSE), Image.Resampling.BOX), np.float64).ravel() / 255
        for image in images.reshape(-1, *images.shape[2:])
    ]
    return np.stack(small).reshape(*images.shape[:2], -1)


def with_facets(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the units of a run with the columns facets and pixel_facets, the same for all images of a unit.

    Layers without an earlier depth of the network have no `facets`.
    """
    parts = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            for preset in layer.presets:
                numbers: dict[str, object] = {"layer": layer.name, "preset": preset, "channel": layer.channels}
                numbers["pixel_facets"] = effective_number(coarse(layer.images(preset)[:]))
                names, responses = layer.depth_activations(preset)
                if names:
                    numbers["facets"] = effective_number(responses.astype(np.float64))
                parts.append(pd.DataFrame(numbers))
    return frame.merge(pd.concat(parts), on=["layer", "preset", "channel"], how="left")
