"""Transfer of visualizations beside that of further dataset examples of the unit."""

from pathlib import Path

import pandas as pd


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the units of a run with the column `behind_examples`, transfer minus its ceiling."""
    return frame.assign(behind_examples=frame["transfer"] - frame["transfer_ceiling"])
