"""The association of units with labels of a dataset; without PyTorch, for code that only reads results."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Association:
    """Labels associated with C channels, by label number; −1 and NaN where there is none.

    Attributes:
        method: "responses" if computed from activations, "counts" if too few images share a label for statistics:
            then only `over` and `count` are set.
        over: Most over-represented labels among the top 1 % of images, (C, TOP) int32. With "counts": the most
            frequent labels among the dataset examples.
        count: Number of images with these labels among the top images, (C, TOP) int32.
        lift: Share of the label among the top images, divided by its share of all images, (C, TOP) float32.
        best: Label with the highest mean activation, (C,) int32.
        selectivity: Class selectivity of that label, (C,) float32.
        auroc: AUROC of that label against all other images, (C,) float32.
    """

    method: str
    over: np.ndarray
    count: np.ndarray
    lift: np.ndarray
    best: np.ndarray
    selectivity: np.ndarray
    auroc: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as an atlas stores them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
