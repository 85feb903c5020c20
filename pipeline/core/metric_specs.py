"""Numbers that an atlas has of its feature visualizations: names, titles, ranges and types, each stated once.

The worker, the writer, the reader, the pages, the API and the comparison of runs take them from `METRICS`. Importable
without PyTorch, for code that only reads results.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

# A channel counts in standard scores only if its standard deviation over dataset images exceeds this share of the
# layer's median. Trained networks have channels whose weights went to 0: what is left is rounding, or changes of a
# thousandth, and images that are not natural move it by hundreds of its deviations, so that no other would count.
MIN_DEVIATION = 1e-3

# Unit of activations: they can only be compared between visualizations with the same objective.
OBJECTIVE = "objective"

Source = Literal["render", "image", "relation", "dataset", "ratio"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of each feature visualization, or of each unit.

    Attributes:
        name: Name in `atlas.h5`, in tables and in the API.
        title: Title in comparisons and on the pages of layers and units.
        description: What it is, there.
        low: Lowest possible value.
        high: Highest possible value.
        dtype: Data type in `atlas.h5`.
        missing: Value of a visualization that does not exist.
        better: Which values are better.
        unit: `OBJECTIVE`, or a unit such as "s"; empty for numbers without a unit.
        per: What has one value: a visualization, stored as (C', V), or a unit, stored as (C',).
        source: Where it comes from: "render" is recorded by the optimization; "image" is computed from the finished
            image by `images.metrics`, and former versions lack it; "relation" is computed once all
            visualizations are available; "dataset" is from the dataset pass; "ratio" is the ratio of two others, which
            is not stored.
        numerator: For a ratio, the metric that is divided.
        denominator: For a ratio, what it is divided by: `DATASET_PEAK`, `DATASET_MEAN`, or another metric.
        since: First schema version of `atlas.h5` in which a stored array of this name has this meaning; readers ignore
            it in older files.
        digits: Decimals in tables of studies.
        comparison_order: Position in comparisons; None if it describes how an image was made, not its quality.
        grid_order: Position of the measure in the list that a layer's grid can be sorted by; None if it is not listed.
        unit_order: Position in the table of the quality of a unit's visualizations; None if it is not shown there.
        percent: Whether that table shows it in percent.
        reading: How to read its values, in sentences, in that table.
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
    denominator: str = ""
    since: int = 1
    digits: int = 2
    comparison_order: int | None = None
    grid_order: int | None = None
    unit_order: int | None = None
    percent: bool = False
    reading: str = ""

    @property
    def explanation(self) -> str:
        """The description as a sentence, and how to read the values."""
        sentence = f"{self.description[:1].upper()}{self.description[1:]}." if self.description else ""
        return f"{sentence} {self.reading}".strip()

    @property
    def is_real(self) -> bool:
        """Whether its values are floating-point numbers."""
        return np.issubdtype(self.dtype, np.floating)

    @property
    def is_json_text(self) -> bool:
        """Whether JSON has it as text: a double cannot represent all integers of 64 bits."""
        return not self.is_real and np.dtype(self.dtype).itemsize > 4


# Denominators of ratios: the unit's largest activation at any position of any dataset image, and its largest mean of a
# map on any dataset image; of minimized units the smallest ones.
DATASET_PEAK = "dataset peak"
DATASET_MEAN = "dataset mean"

# In the order of storage and of the API.
METRICS = (
    Metric("seed", "seed", "seed of the image", dtype=np.int64, missing=-1),
    Metric("steps", "steps", "number of optimization steps", dtype=np.int32, missing=0, digits=0, comparison_order=18),
    Metric(
        "activation",
        "activation",
        "objective of the saved 8-bit image, without transformations",
        better="higher",
        unit=OBJECTIVE,
        comparison_order=15,
    ),
    Metric(
        "robust",
        "robust activation",
        "mean objective over 16 transformed copies",
        better="higher",
        unit=OBJECTIVE,
        comparison_order=16,
    ),
    Metric("start", "start", "objective before the first step", unit=OBJECTIVE, comparison_order=17),
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
        comparison_order=19,
    ),
    Metric(
        "peak_ratio",
        "activation ratio (peak)",
        "largest activation on the saved image ÷ largest activation on any dataset image",
        better="higher",
        source="ratio",
        numerator="peak",
        denominator=DATASET_PEAK,
        comparison_order=0,
        reading="Above 1, the image activates the unit more than any dataset image.",
        unit_order=0,
    ),
    Metric(
        "mean_ratio",
        "activation ratio (mean)",
        "mean activation over the saved image ÷ largest mean activation over any dataset image",
        better="higher",
        source="ratio",
        numerator="spatial_mean",
        denominator=DATASET_MEAN,
        comparison_order=1,
        reading="Larger than that of peaks: a visualization fills the map with its feature, a photograph has it once.",
        unit_order=1,
    ),
    Metric(
        "robust_share",
        "robust share",
        "mean objective over 16 transformed copies ÷ objective of the saved image",
        better="higher",
        source="ratio",
        numerator="robust",
        denominator="activation",
        comparison_order=2,
        grid_order=0,
        reading="Far below 1, the activation depends on single pixels.",
        unit_order=2,
    ),
    Metric("peak", "peak", "largest activation of the unit at any position of its map", unit=OBJECTIVE, source="image"),
    Metric("spatial_mean", "spatial mean", "mean of the unit’s activation map", unit=OBJECTIVE, source="image"),
    Metric(
        "high_frequency",
        "high frequencies",
        "share of the Fourier energy above ¼ cycle per pixel",
        0.0,
        1.0,
        better="lower",
        source="image",
        digits=3,
        comparison_order=9,
        grid_order=6,
        reading="Photographs: 1 to 15 %; white noise: 80 %.",
        unit_order=14,
        percent=True,
    ),
    Metric(
        "checkerboard",
        "checkerboard",
        "Fourier energy at the frequencies of the network’s strides ÷ energy around them",
        0.0,
        better="lower",
        source="image",
        digits=1,
        comparison_order=10,
        grid_order=7,
        reading="Photographs: 1.3 to 5; from 10, a grid is visible.",
        unit_order=15,
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
        comparison_order=11,
        reading="Photographs: 0.01 to 0.08; white noise: 0.33.",
        unit_order=16,
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
        grid_order=5,
        reading="In powers of ten. Photographs: 0.04 to 0.2; white noise: 0.53.",
        unit_order=13,
    ),
    Metric(
        "saturation",
        "saturation",
        "share of values within 5 % of black or white",
        0.0,
        1.0,
        better="lower",
        source="image",
        digits=3,
        comparison_order=14,
        grid_order=10,
        reading="Photographs: 6 %.",
        unit_order=19,
        percent=True,
    ),
    Metric("contrast", "contrast", "standard deviation of luminance", 0.0, 0.5, source="image", digits=3),
    Metric(
        "chroma",
        "chroma",
        "mean difference of the largest and the smallest color value",
        0.0,
        1.0,
        source="image",
        digits=3,
    ),
    Metric(
        "contrast_quantile",
        "contrast quantile",
        "share of dataset images with less contrast",
        0.0,
        1.0,
        source="relation",
        comparison_order=12,
        grid_order=8,
        reading="Contrast is the standard deviation of luminance.",
        unit_order=17,
        percent=True,
    ),
    Metric(
        "chroma_quantile",
        "chroma quantile",
        "share of dataset images with less chroma",
        0.0,
        1.0,
        source="relation",
        comparison_order=13,
        grid_order=9,
        reading="Chroma is the largest − the smallest color value.",
        unit_order=18,
        percent=True,
    ),
    Metric(
        "margin",
        "margin",
        "standard score of the unit’s activation − largest standard score of another channel of the layer",
        better="higher",
        unit="sd",
        source="relation",
        comparison_order=3,
        grid_order=1,
        reading="Standard scores are over the dataset. Negative: another channel is activated more unusually.",
        unit_order=3,
    ),
    Metric(
        "agreement",
        "agreement",
        "similarity of the layer’s activations for the unit’s feature visualizations",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        comparison_order=4,
        grid_order=4,
        reading="1: identical; 0: as for visualizations of any two units.",
        unit_order=11,
    ),
    Metric(
        "depth_agreement",
        "agreement at a depth",
        "the same for the spatial means of the last depth before the layer",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        comparison_order=5,
        reading="No diversity term compares that layer. 1: identical; 0: as for images of any two units.",
        unit_order=12,
    ),
    Metric(
        "transfer",
        "transfer",
        "similarity of the other channels’ activations for the image and for the unit’s dataset examples",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        since=5,
        comparison_order=6,
        grid_order=2,
        reading="The unit’s own channel is left out. 1: identical; 0: unrelated.",
        unit_order=4,
    ),
    Metric(
        "transfer_ceiling",
        "transfer of dataset examples",
        "the same for one of the unit’s dataset examples and the others",
        -1.0,
        1.0,
        per="unit",
        source="relation",
        reading="What an image can be expected to reach.",
        unit_order=5,
    ),
    Metric(
        "transfer_floor",
        "transfer of random images",
        "the same for random dataset images: 95th percentile",
        -1.0,
        1.0,
        per="unit",
        source="relation",
        unit_order=6,
    ),
    Metric(
        "path_ratio",
        "path similarity ÷ natural",
        "similarity of the layers up to the unit for the image and for the unit’s dataset examples ÷ the same of these "
        "with each other",
        better="higher",
        source="relation",
        comparison_order=7,
        grid_order=3,
        reading="1: in the layers up to the unit, the image is as similar to the unit’s dataset examples as "
        "these are to each other. 0: it activates the unit in another way than they do. None if the "
        "examples are no more similar to each other than to random images.",
        unit_order=7,
    ),
    Metric(
        "path_similarity",
        "path similarity",
        "similarity of the layers up to the unit for the image and for the unit’s dataset examples",
        -1.0,
        1.0,
        better="higher",
        source="relation",
        reading="Mean over the layers.",
        unit_order=8,
    ),
    Metric(
        "path_natural",
        "path similarity of dataset examples",
        "the same for the unit’s dataset examples with each other",
        -1.0,
        1.0,
        per="unit",
        source="relation",
        unit_order=9,
    ),
    Metric(
        "path_random",
        "path similarity of random images",
        "the same for the unit’s dataset examples with random dataset images",
        -1.0,
        1.0,
        per="unit",
        source="relation",
        unit_order=10,
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
# In the order of their rows in the table of a unit's page.
UNIT_METRICS = tuple(
    sorted((m for m in METRICS if m.unit_order is not None), key=lambda metric: metric.unit_order or 0)
)
# Names of the metrics that pages and comparisons show first: the first of them that an atlas has.
MAIN_METRICS = ("peak_ratio", "mean_ratio")

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


def is_minimized(natural: str) -> bool:
    """Return whether visualizations minimize the activation, by the dataset statistic `natural` of their objective."""
    return natural in ("least", "min")


def ratios(
    values: Mapping[str, np.ndarray], denominators: Mapping[str, np.ndarray], negative: bool
) -> dict[str, np.ndarray]:
    """Return the metrics of `RATIO_METRICS` whose numerators are known.

    An activation ratio is the activation of a visualization ÷ the best one over the dataset. Above 1 the visualization
    exceeds every dataset image. Both are peaks (largest activations of a map) or both are means of a map: a
    visualization fills the map with a feature that a photograph contains once, so that the ratio of means is several
    times as large as that of peaks.

    Args:
        values: Metrics of visualizations, arrays of one shape by name.
        denominators: Best activations over the dataset, by `DATASET_PEAK` and `DATASET_MEAN`; they are broadcast.
        negative: Whether the visualizations minimize the activation; activations are then below zero.

    Returns:
        float32 by name, without units. NaN where the denominator is zero or has the wrong sign.
    """
    known = {**denominators, **values}
    return {
        metric.name: share(values[metric.numerator], known[metric.denominator], negative)
        for metric in RATIO_METRICS
        if metric.numerator in values and metric.denominator in known
    }


def share(part: np.ndarray, whole: np.ndarray, negative: bool) -> np.ndarray:
    """Return part ÷ whole as float32; NaN where the whole is not positive, or if `negative` not negative."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(-whole > 0 if negative else whole > 0, part / whole, np.nan).astype(np.float32)
