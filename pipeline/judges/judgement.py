"""What a judge says about feature visualizations: the record that is stored."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

Kind = Literal["class", "unit"]

# Numbers of each kind, in the order of their columns: per visualization, (C', V), except `correlation`, which is the
# same for all visualizations of a unit.
NUMBERS: Mapping[Kind, tuple[str, ...]] = {
    "class": ("rank", "probability"),
    "unit": ("correlation", "quantile", "deviations"),
}
# Lowest and highest possible value of each number.
RANGES = {
    "rank": (1.0, np.inf),
    "probability": (0.0, 1.0),
    "correlation": (-1.0, 1.0),
    "quantile": (0.0, 1.0),
    "deviations": (-np.inf, np.inf),
}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Numbers of one judge for the visualizations of one layer by one preset.

    Attributes:
        judge: Name of the judge.
        weights: sha256 of its weights.
        kind: "class" for class visualizations, "unit" for those of hidden units.
        numbers: `NUMBERS` by name, (C', V) float32; NaN where there is no visualization.
        digest: Digest of everything besides the images that determines the numbers; "" if read from an atlas.
    """

    judge: str
    weights: str
    kind: Kind
    numbers: Mapping[str, np.ndarray]
    digest: str = ""
