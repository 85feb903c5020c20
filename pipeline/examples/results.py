"""The result of a complete dataset pass."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline.examples.association import Association
from pipeline.examples.channel_stats import HistogramRange
from pipeline.examples.localizations import Localizations
from pipeline.examples.localize import TopExamples
from pipeline.examples.sweep import PassResult
from pipeline.layers.finding import Layer


@dataclasses.dataclass(frozen=True)
class PathInputs:
    """What path similarity needs beside the arrays `path/…` of the second pass.

    Attributes:
        depths: Fixed depths of the network.
        sample: Random images, (r,).
        sources: Source of each dataset image, (n,).
    """

    depths: Sequence[Layer]
    sample: np.ndarray
    sources: np.ndarray


@dataclasses.dataclass(frozen=True)
class DatasetPassResult:
    """Everything that an atlas stores about a dataset, for the layers of a plan in their order.

    Attributes:
        first_pass: Result of the first pass.
        ranges: Histogram ranges and scales with which the first pass measured.
        examples: Dataset examples of each layer.
        localizations: Arrays of the second pass, as `localize` returns them, with all parts concatenated.
        associations: Label association of each layer; None if the dataset has no labels.
        store: What is stored of the images: "images", "crops" or "ids" (`examples.store`).
        edges: Bounds of the quantile bins, in percent.
        labels: All labels of the dataset; label numbers are positions in this tuple.
        paths: Depths and random images of the path similarity.
        device: Kinds of the devices that images were measured on, such as "cpu cuda"; empty if parts of former versions
            do not say it.
    """

    first_pass: PassResult
    ranges: HistogramRange
    examples: Sequence[TopExamples]
    localizations: Localizations
    associations: Sequence[Association | None]
    store: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
    paths: PathInputs
    device: str = ""
