"""Overlap of the channels that carry images of the layer objective between starts."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.store.reader import open_atlas

SHARE = 0.1


def winners(responses: np.ndarray, count: int) -> list[frozenset[int]]:
    """Return the `count` channels with the largest values of each of (V, C) responses."""
    return [frozenset(np.argsort(-row, kind="stable")[:count].tolist()) for row in responses]


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each pair of starts of a layer and preset: overlap, chance and their difference."""
    rows = []
    with open_atlas(run) as atlas:
        for layer in atlas:
            deviation = np.maximum(layer.stats()["sd"], 1e-12)
            for preset in layer.presets:
                activations = layer.image_activations(preset)
                assert activations is not None
                responses = activations[0].astype(np.float64) / deviation
                count = max(1, round(SHARE * responses.shape[1]))
                sets = winners(responses, count)
                for pair, (a, b) in enumerate(itertools.combinations(sets, 2)):
                    overlap, chance = len(a & b) / count, count / responses.shape[1]
                    rows.append(
                        {
                            "layer": layer.name, "preset": preset, "channel": pair, "variant": 0,
                            "overlap": overlap, "chance": chance, "excess": overlap - chance,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)
