"""Page data as JavaScript files that register themselves: `ATLAS.put("name", {…});`.

A page that is opened from disk may not use `fetch`, but it may add a script element, so this works from disk and from
a host alike.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson

# Arrays of at least this size are rounded to decimals by NumPy operations instead of one by one.
VECTORIZED_SIZE = 48


def to_json(value: Any) -> str:
    """Return `value` as compact ASCII JSON without `<`, so that it cannot end a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def shard_script(name: str, body: str) -> str:
    """Return the script that registers the JSON `body` under `name`."""
    return f"ATLAS.put({to_json(name)},{body});\n"


def shortest_decimals(values: np.ndarray) -> list[Any]:
    """Return the shortest decimals that read back as the same float32, as nested lists; None for non-finite values."""
    # orjson writes the shortest decimals of float32 arrays and null for NaN and infinity.
    array = np.ascontiguousarray(values, np.float32)
    return orjson.loads(orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY))


def rounded_decimals(values: np.ndarray, digits: int = 4) -> list[Any]:
    """Return values rounded to significant digits, for display only, as nested lists; None for non-finite values."""
    array = np.asarray(values, np.float64)

    def round_one(value: float) -> float:
        return float(f"{value:.{digits}g}")

    if array.size < VECTORIZED_SIZE:
        return _nested([round_one(v) if math.isfinite(v) else None for v in array.ravel().tolist()], array.shape)
    finite = np.isfinite(array)
    result = np.where(finite, array, 0.0)
    in_range, exponent = _decimal_exponent(result)
    one_by_one = finite & ~in_range & (result != 0)
    decimals = _to_digits(result, exponent, digits)
    result[in_range] = decimals[in_range]
    return _filled(result, finite, one_by_one, round_one)


def _decimal_exponent(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a mask of the values that `_to_digits` can round, and their decimal exponents (0 elsewhere)."""
    size = np.abs(values)
    in_range = (size > 1e-12) & (size < 1e15)
    return in_range, np.floor(np.log10(np.where(in_range, size, 1.0)))


def _to_digits(values: np.ndarray, exponent: np.ndarray, digits: int) -> np.ndarray:
    """Round float64 `values` with the decimal `exponent` to `digits` significant digits, to the nearest doubles."""
    place = digits - 1 - exponent
    with np.errstate(invalid="ignore", over="ignore"):
        power = 10.0 ** np.clip(np.abs(place), 0, 22)
        return np.where(place >= 0, np.rint(values * power) / power, np.rint(values / power) * power)


def _filled(
    values: np.ndarray, finite: np.ndarray, one_by_one: np.ndarray, convert: Callable[[float], float]
) -> list[Any]:
    """Return `values` as nested lists: `convert` is applied where `one_by_one`, and None replaces non-finite values."""
    flat = values.ravel().tolist()
    for i in np.flatnonzero(one_by_one).tolist():
        flat[i] = convert(flat[i])
    for i in np.flatnonzero(~finite).tolist():
        flat[i] = None
    return _nested(flat, values.shape)


def _nested(flat: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """Return a flat list as nested lists of `shape`, which has at least one axis."""
    for length in reversed(shape[1:]):
        flat = [flat[i : i + length] for i in range(0, len(flat), length)] if length else []
    return flat if len(shape) < 2 or math.prod(shape[1:]) else [[] for _ in range(shape[0])]
