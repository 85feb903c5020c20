"""Transfer as a share of the way from random images to further dataset examples of the unit."""

from pathlib import Path

import pandas as pd

# Below this distance of ceiling and floor the share is a quotient of noise.
LEAST = 0.05


def values(run: Path, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the units of a run with the column `transfer_share`."""
    way = frame["transfer_ceiling"] - frame["transfer_floor"]
    return frame.assign(transfer_share=((frame["transfer"] - frame["transfer_floor"]) / way).where(way > LEAST))
