"""The association of units with labels of a dataset; without PyTorch, for code that only reads results."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Association:
    """Labels associated with C channels, by label number; −1 and NaN where there is none.

    Attributes:
        method: "responses" if computed from activations, "counts" if too few sources share a label for statistics:
            then only `over` and `count` are set.
        over: Most over-represented labels among the top 1 % of sources, (C, TOP) int32; only labels that pass the
            permutation test. With "counts": the most frequent labels among the dataset examples.
        count: Number of sources with these labels among the top ones or the examples, (C, TOP) int32.
        lift: Share of the label among the top sources, divided by its share of all sources, (C, TOP) float32.
        p: Probability that any label is as significantly over-represented if labels are permuted, (C, TOP) float32.
        best: Label with the highest mean activation in both halves of the sources, (C,) int32; −1 if the halves differ.
        chosen: Label with the highest mean activation in each half, (C, 2) int32.
        selectivity: Class selectivity of the label chosen in one half, measured in the other; mean of both ways, (C,)
            float32. NaN in layers where zero is arbitrary (`Layer.rectified`).
        auroc: AUROC of the label chosen in one half, measured in the other; mean of both ways, (C,) float32.
    """

    method: str
    over: np.ndarray
    count: np.ndarray
    lift: np.ndarray
    p: np.ndarray
    best: np.ndarray
    chosen: np.ndarray
    selectivity: np.ndarray
    auroc: np.ndarray

    @classmethod
    def empty(cls, method: str, channels: int, top: int) -> "Association":
        """Return an association with no labels; `top` is the number of columns of `over`."""
        arrays = {
            "over": np.full((channels, top), -1, np.int32),
            "count": np.zeros((channels, top), np.int32),
            "best": np.full(channels, -1, np.int32),
            "chosen": np.full((channels, 2), -1, np.int32),
        }
        arrays |= {name: np.full((channels, top), np.nan, np.float32) for name in ("lift", "p")}
        arrays |= {name: np.full(channels, np.nan, np.float32) for name in ("selectivity", "auroc")}
        return cls(method, **arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, as an atlas stores them."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "method"}
