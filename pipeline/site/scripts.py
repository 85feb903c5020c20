"""Data of the pages as scripts that register themselves: the one way that works from disk as well as from a host.

A shard is `ATLAS.put("name", {…});`. Pages opened from disk may not fetch, but they may add a script.
"""

import json
import math
from typing import Any

import numpy as np


def text(value: Any) -> str:
    """Compact JSON in ASCII with no `<`: nothing in it can end a script element, whoever pastes it where."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def put(name: str, body: str) -> str:
    """A shard under `name`, from JSON that `text` made."""
    return f"ATLAS.put({text(name)},{body});\n"


def exact(values: np.ndarray) -> list[Any]:
    """Floats as the shortest decimals that read back as the same float32; None where there is no finite number."""
    flat = np.asarray(values, np.float32)
    if flat.ndim > 1:
        return [exact(row) for row in flat]
    return [float(str(v)) if math.isfinite(v) else None for v in flat]


def rounded(values: np.ndarray, digits: int = 4) -> list[float | None]:
    """Floats of so many significant digits, for what is only drawn; None where there is no finite number."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]
