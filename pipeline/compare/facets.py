"""Compare the facets of units between runs: their number, and the monosemanticity of the units.

Runs that can be compared have the same network and dataset; their facets differ if they have other examples, another
embedding or another level.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.core.metric_specs import Metric
from pipeline.store.layer_view import LayerView

MEASURES = {
    "facets": Metric("facets", "facets", "number of groups of the unit's examples that another layer tells apart"),
    "monosemanticity": Metric(
        "monosemanticity", "monosemanticity", "how alike the examples of the unit are in another layer, 0 to 1"
    ),
}


def compared_numbers(views: Sequence[LayerView | None]) -> list[dict[str, np.ndarray]]:
    """Return the numbers `MEASURES` of a layer for each contender, (C',) each; empty where they do not differ.

    Presets of one run have the same facets, as have runs with the same settings.
    """
    numbers = [{} if view is None else view.facet_numbers() for view in views]
    different = {tuple(array.tobytes() for array in found.values()) for found in numbers if found}
    return numbers if len(different) > 1 else [{} for _ in views]
