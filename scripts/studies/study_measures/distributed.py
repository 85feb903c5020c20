"""Figure of the study of single channels and directions."""

import pandas as pd
from PIL import Image
from values import Runs

from study_measures.plots import Series, beside, panel


def draw(runs: Runs, table: pd.DataFrame) -> Image.Image:
    """Return rotation number and monosemanticity by stage, for layers before a rectifier and linear ones."""
    table = table.assign(linear=~table["layer"].str.endswith("conv_pw"))
    stages = list(dict.fromkeys(table.loc[table["linear"], "layer"]))
    panels = []
    for measure, dashed in (("rotation", 0.05), ("monosemanticity", None)):
        series = []
        for (network, linear), own in table.groupby(["network", "linear"], sort=False):
            names = [stage if linear else f"{stage}.conv_pw" for stage in stages]
            values = [own.loc[own["layer"] == name, measure].dropna().to_numpy() for name in names]
            series.append(
                Series(f"{network}, {'block outputs' if linear else 'before a rectifier'}", values, not linear)
            )
        panels.append(panel(measure.replace("rotation", "rotation number"), stages, series, dashed))
    return beside(panels)
