"""Figure of the study of sparsity."""

import pandas as pd
from PIL import Image
from values import Runs

from study_measures.plots import Series, beside, panel


def draw(runs: Runs, table: pd.DataFrame) -> Image.Image:
    """Return sparsity by layer: one panel for trained weights and one for random ones, a line for each network."""
    panels = []
    top = float(table.groupby(["network", "arm", "layer"])["sparsity"].quantile(0.75).max())
    for arm, part in table.groupby("arm", sort=False):
        layers = list(dict.fromkeys(part.sort_values("depth")["layer"]))
        series = [
            Series(str(network), [own.loc[own["layer"] == layer, "sparsity"].dropna().to_numpy() for layer in layers])
            for network, own in part.groupby("network", sort=False)
        ]
        panels.append(panel(f"sparsity, {arm} weights", layers, series, top=top))
    return beside(panels)
