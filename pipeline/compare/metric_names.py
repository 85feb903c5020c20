"""Titles, descriptions and directions of the measures that feature visualizations are compared by."""

import dataclasses
from collections.abc import Iterable

HIGHER, LOWER, NEITHER = "higher", "lower", "neither"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a feature visualization.

    Attributes:
        name: Name of its data set in the atlas.
        title: Title on pages.
        better: Which values are better: `higher`, `lower` or `neither`.
        description: Explanation on pages.
        objective_units: Whether it is in the units of the objective, so that it can only be compared between
            contenders with the same objective.
    """

    name: str
    title: str
    better: str = NEITHER
    description: str = ""
    objective_units: bool = False


MAIN = "gain"
_DATASET_MAX = "÷ the maximum activation over the dataset, by the same objective"

# In display order. Other measures of an atlas are shown after these, under their own names.
_KNOWN = (
    Measure(MAIN, "activation ratio", HIGHER, f"activation of the saved image {_DATASET_MAX}"),
    Measure(
        "robust_gain", "robust activation ratio", HIGHER, f"mean activation over 16 transformed copies {_DATASET_MAX}"
    ),
    Measure("rank", "rank", LOWER, "rank of the unit among its layer’s channels by their activations for the image"),
    Measure(
        "agreement", "agreement", HIGHER, "similarity of the layer’s activations for the unit’s feature visualizations"
    ),
    Measure(
        "transfer",
        "transfer",
        HIGHER,
        "similarity of the layer’s activations for the image and for the unit’s dataset examples",
    ),
    Measure("high_frequency", "high frequencies", LOWER, "share of the Fourier energy above ¼ cycle per pixel"),
    Measure("checkerboard", "checkerboard", LOWER, "Fourier energy at the frequencies of the network’s strides"),
    Measure("total_variation", "total variation", LOWER, "mean absolute difference of neighboring pixels"),
    Measure(
        "spectral_distance",
        "spectral distance",
        LOWER,
        "distance of the amplitude spectrum from that of natural images",
    ),
    Measure("saturated", "saturation", LOWER, "share of values at black or white"),
    Measure("activation", "activation", HIGHER, "objective of the saved 8-bit image, without transformations", True),
    Measure("robust", "robust activation", HIGHER, "mean objective over 16 transformed copies", True),
    Measure("start", "start", NEITHER, "objective before the first step", True),
    Measure("steps", "steps", NEITHER, "number of optimization steps"),
    Measure("seconds", "seconds", LOWER, "computation time of the image, on the machine that made it"),
)
_BY_NAME = {measure.name: measure for measure in _KNOWN}


def measure_named(name: str) -> Measure:
    """Return the measure called `name`; a name that is not described here becomes its own title."""
    return _BY_NAME.get(name, Measure(name, name.replace("_", " ")))


def ordered_measures(names: Iterable[str]) -> tuple[Measure, ...]:
    """Return measures in display order; those not described here come by name before the plain activation."""
    positions = {measure.name: i for i, measure in enumerate(_KNOWN)}
    undescribed = positions["activation"] - 0.5
    ordered = sorted(set(names), key=lambda name: (positions.get(name, undescribed), name))
    return tuple(measure_named(name) for name in ordered)
