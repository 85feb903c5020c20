"""Presets that visualize directions of a layer: the cells of activation atlases and of activation grids."""

import dataclasses
import io

import numpy as np

from pipeline.core.config_files import ConfigFile
from pipeline.visualization.objectives import Directions
from pipeline.visualization.preset import Preset

# Power of the cosine in the objective: a cell shows the direction of its activation, not only its largest components.
POWER = 1.0

# Margin of the canvas as a part of the side of the image, at most: the cells are small.
MARGIN = 8


def direction_preset(preset: Preset, vectors: np.ndarray, source: str) -> Preset:
    """Return a preset with one variant for each of (N, C) vectors, which shows its direction.

    Args:
        preset: The preset whose other settings are used.
        vectors: The vectors, (N, C).
        source: What they are, for error messages.
    """
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    objective = Directions(ConfigFile(source, buffer.getvalue()), POWER)
    return dataclasses.replace(preset, objective=objective, variants=len(vectors), couplings=(), attempts=1)


def sized(preset: Preset, side: int, steps: int) -> Preset:
    """Return a preset for the images of cells, of `side` pixels."""
    margin = min(preset.margin, side // MARGIN)
    return dataclasses.replace(preset, size=side, margin=margin, steps=steps, negative=False)
