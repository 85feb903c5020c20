"""Numbers that an atlas has of its feature visualizations: names, titles, ranges and types, each stated once.

The worker, the writer, the reader, the pages, the API and the comparison of runs take them from `METRICS`. Importable
without PyTorch, for code that only reads results.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

# Unit of activations: they can only be compared between visualizations with the same objective.
OBJECTIVE = "objective"

Source = Literal["render", "image", "relation", "dataset", "ratio"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of each feature visualization, or of each unit.

    Attributes:
        name: Name in `atlas.h5`, in tables and in the API.
        title: Title in comparisons.
        description: Explanation in comparisons.
        low: Lowest possible value.
        high: Highest possible value.
        dtype: Data type in `atlas.h5`.
        missing: Value of a visualization that does not exist.
        better: Which values are better.
        unit: `OBJECTIVE`, or a unit such as "s"; empty for numbers without a unit.
        per: What has one value: a visualization, stored as (C', V), or a unit, stored as (C',).
        source: Where it comes from: "render" is recorded by the optimization; "image" is computed from the finished
            image by `visualization.metrics`, and former versions lack it; "relation" is computed once all
            visualizations are available; "dataset" is from the dataset pass; "ratio" is `activation_ratio`, which is
            not stored.
        numerator: For a ratio, the metric that is divided by the maximum activation over the dataset.
        digits: Decimals in tables of studies.
        comparison_order: Position in comparisons; None if it describes how an image was made, not its quality.
        grid_order: Position among the numbers that the grid of a layer can be sorted by; None if it cannot.
    """

    name: str
    title: str
    description: str = ""
    low: float = -math.inf
    high: float = math.inf
    dtype: type[np.generic] = np.float32
    missing: float = math.nan
    better: Literal["higher", "lower", "neither"] = "neither"
    unit: str = ""
    per: Literal["visualization", "unit"] = "visualization"
    source: Source = "render"
    numerator: str = ""
    digits: int = 2
    comparison_order: int | None = None
    grid_order: int | None = None

    @property
    def is_real(self) -> bool:
        """Whether its values are floating-point numbers."""
        return np.issubdtype(self.dtype, np.floating)

    @property
    def is_json_text(self) -> bool:
        """Whether JSON has it as text: a double cannot represent all integers of 64 bits."""
        return not self.is_real and np.dtype(self.dtype).itemsize > 4


_DATASET_MAX = "÷ the maximum activation over the dataset, by the same objective"

# In the order of storage and of the API.
METRICS = (
    Metric("seed", "seed", "seed of the image", dtype=np.int64, missing=-1),
    Metric("steps", "steps", "number of optimization steps", dtype=np.int32, missing=0, digits=0, comparison_order=13),
    Metric(
        "activation",
        "activation",
        "objective of the saved 8-bit image, without transformations",
        better="higher",
        unit=OBJECTIVE,
        comparison_order=10,
    ),
    Metric(
        "robust",
        "robust activation",
        "mean objective over 16 transformed copies",
        better="higher",
        unit=OBJECTIVE,
        comparison_order=11,
    ),
    Metric("start", "start", "objective before the first step", unit=OBJECTIVE, comparison_order=12),
    Metric(
        "natural",
        "dataset maximum",
        "maximum activation over the dataset, by the same objective",
        unit=OBJECTIVE,
        per="unit",
        source="dataset",
    ),
    Metric(
        "seconds",
        "seconds",
        "computation time of the image, on the machine that made it",
        better="lower",
        unit="s",
        digits=1,
        comparison_order=14,
    ),
    Metric(
        "gain",
        "activation ratio",
        f"activation of the saved image {_DATASET_MAX}",
        better="higher",
        source="ratio",
        numerator="activation",
        comparison_order=0,
    ),
    Metric(
        "robust_gain",
        "robust activation ratio",
        f"mean activation over 16 transformed copies {_DATASET_MAX}",
        better="higher",
        source="ratio",
        numerator="robust",
        comparison_order=1,
        grid_order=0,
    ),
    Metric(
        "high_frequency",
        "high frequencies",
        "share of the Fourier energy above ¼ cycle per pixel",
        0.0,
        1.0,
        better="lower",
        source="image",
        digits=3,
        comparison_order=5,
        grid_order=5,
    ),
    Metric(
        "checkerboard",
        "checkerboard",
        "Fourier energy at the frequencies of the network’s strides",
        0.0,
        better="lower",
        source="image",
        digits=1,
        comparison_order=6,
        grid_order=6,
    ),
    Metric(
        "total_variation",
        "total variation",
        "mean absolute difference of neighboring pixels",
        0.0,
        1.0,
        better="lower",
        source="image",
        digits=3,
        comparison_order=7,
    ),
    Metric(
        "spectral_distance",
        "spectral distance",
        "distance of the amplitude spectrum from that of natural images",
        0.0,
        better="lower",
        unit="decades",
        source="image",
        digits=3,
        comparison_order=8,
        grid_order=4,
    ),
    Metric(
        "saturated",
        "saturation",
        "share of values at black or white",
        0.0,
        1.0,
        better="lower",
        source="image",
        digits=3,
        comparison_order=9,
        grid_order=7,
    ),
    Metric(
        "rank",
        "rank",
        "rank of the unit among its layer’s channels by their activations for the image",
        1.0,
        better="lower",
        source="image",
        digits=0,
        comparison_order=2,
        grid_order=3,
    ),
    Metric(
        "agreement",
        "agreement",
        "similarity of the layer’s activations for the unit’s feature visualizations",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        comparison_order=3,
        grid_order=2,
    ),
    Metric(
        "transfer",
        "transfer",
        "similarity of the layer’s activations for the image and for the unit’s dataset examples",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        comparison_order=4,
        grid_order=1,
    ),
)


def _from_source(source: Source) -> tuple[Metric, ...]:
    return tuple(metric for metric in METRICS if metric.source == source)


RENDER_METRICS = _from_source("render")
IMAGE_METRICS = _from_source("image")
RELATION_METRICS = _from_source("relation")
RATIO_METRICS = _from_source("ratio")
# In the order of their columns in the grid of a layer.
GRID_METRICS = tuple(
    sorted((m for m in METRICS if m.grid_order is not None), key=lambda metric: metric.grid_order or 0)
)
# Name of the metric that pages and comparisons show first.
MAIN_METRIC = "gain"

_BY_NAME = {metric.name: metric for metric in METRICS}


def find_metric(name: str) -> Metric | None:
    """Return the metric called `name`; None for an array that is not described here."""
    return _BY_NAME.get(name)


def metric_named(name: str) -> Metric:
    """Return the metric called `name`; a name that is not described here becomes its own title."""
    return _BY_NAME.get(name) or Metric(name, name.replace("_", " "))


def in_comparison_order(names: Iterable[str]) -> tuple[Metric, ...]:
    """Return metrics in the order of comparisons; those without a position come by name before the activation."""
    before_activation = (_BY_NAME["activation"].comparison_order or 0) - 0.5

    def position(metric: Metric) -> tuple[float, str]:
        order = metric.comparison_order
        return before_activation if order is None else order, metric.name

    return tuple(sorted(map(metric_named, set(names)), key=position))


def activation_ratio(activation: np.ndarray, dataset_max: np.ndarray, negative: bool) -> np.ndarray:
    """Return the activation ratio: activation of a visualization ÷ best activation over the dataset.

    The ratio has no unit. Above 1 the visualization exceeds every dataset image.

    Args:
        activation: Activations of the visualizations, (C, V) for C channels with V visualizations each.
        dataset_max: Best activation over the dataset, (C,); the smallest one if `negative`.
        negative: Whether the visualizations minimize the activation; both values are then below zero.

    Returns:
        (C, V) float32. NaN where the dataset's best activation is zero or has the wrong sign.
    """
    best = np.asarray(dataset_max, np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(-best > 0 if negative else best > 0, activation / best, np.nan).astype(np.float32)
