"""The result of a complete dataset pass."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.examples.channel_stats import HistogramRange
from pipeline.examples.label_association import Association
from pipeline.examples.localize import TopExamples
from pipeline.examples.sweep import PassResult


@dataclasses.dataclass(frozen=True)
class DatasetPassResult:
    """All that an atlas keeps of a dataset, for the layers of a plan in their order.

    `looks` are the arrays of the second look, pieces joined; `associations` are None where there are no labels.
    """

    sweep: PassResult
    ranges: HistogramRange
    chosen: Sequence[TopExamples]
    looks: Mapping[str, np.ndarray]
    associations: Sequence[Association | None]
    store: str
    edges: tuple[float, ...]
    labels: tuple[str, ...]
